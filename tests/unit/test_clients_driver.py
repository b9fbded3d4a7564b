"""`make test-clients`' driver: what counts as a failure, what is pinned. The clients themselves are not installed here."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CLIENTS = Path(__file__).resolve().parents[1] / "clients"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The driver, whose clients and environments are in a folder of the test's."""
    spec = importlib.util.spec_from_file_location("clients_driver", CLIENTS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clients_driver", module)
    spec.loader.exec_module(module)
    (tmp_path / "support").symlink_to(CLIENTS / "support")
    (tmp_path / "some").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "ENVIRONMENTS", tmp_path / "environments")
    return module


def report_on(driver: ModuleType, checks: str, **options: str):
    """Run `checks` as the client `some`, whose package is pytest, in this very Python."""
    (driver.HERE / "some/check_it.py").write_text(checks)
    served = driver.Served(url="http://127.0.0.1:9", model="tiny", key="secret", has_keys=True)
    return driver.run_checks(driver.Client(name="some", package="pytest"), served, interpreter=[sys.executable], **options)


def test_each_check_counts_and_a_failing_one_tells_its_reason(driver: ModuleType):
    report = report_on(
        driver,
        "def check_good(): pass\nasync def check_bad(): assert 1 == 2, 'not so'\ndef helper(): raise RuntimeError\n",
    )

    assert report.version == pytest.__version__
    assert report.num_checks == 2
    ((check, reason),) = report.failures
    assert check == "bad"
    assert reason.startswith("AssertionError: not so (check_it.py:2")


def test_checks_are_told_where_the_server_is_and_inherit_no_settings_of_a_client(driver: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")

    report = report_on(
        driver,
        "import os, served\n"
        "def check_it():\n"
        "    assert served.URL + '/v1' == os.environ['OPENAI_BASE_URL'] == 'http://127.0.0.1:9/v1'\n"
        "    assert served.KEY == os.environ['OPENAI_API_KEY'] == os.environ['ANTHROPIC_API_KEY'] == 'secret'\n"
        "    assert not {'OPENAI_ORG_ID', 'HTTPS_PROXY'} & set(os.environ)\n",
    )

    assert report.failures == ()


def test_a_client_that_dies_half_way_has_failed(driver: ModuleType):
    report = report_on(driver, "import os\ndef check_first(): pass\ndef check_second(): os._exit(7)\n")

    assert report.num_checks == 2
    ((check, reason),) = report.failures
    assert check == "reaches its end"
    assert "status 7" in reason


def test_a_client_that_hangs_has_failed(driver: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "TIME_LIMIT_S", 0.5)

    report = report_on(driver, "import time\ndef check_it(): time.sleep(60)\n")

    assert "did not end within" in report.failures[0][1]


def test_checks_that_cannot_be_imported_have_failed(driver: ModuleType):
    report = report_on(driver, "import nothing_of_that_name\n")

    assert "No module named 'nothing_of_that_name'" in report.failures[0][1]


def test_only_the_checks_asked_for_run(driver: ModuleType):
    report = report_on(driver, "def check_a_stream(): pass\ndef check_an_error(): raise ValueError\n", only="stream")

    assert (report.num_checks, report.failures) == (1, ())


def test_clients_are_chosen_by_name(driver: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert driver.parse_arguments([]).clients == []
    assert [client.name for client in driver.parse_arguments(["litellm", "openai"]).clients] == ["litellm", "openai"]
    with pytest.raises(SystemExit):
        driver.parse_arguments(["opanai"])
    assert "no client is called 'opanai'; there are openai," in capsys.readouterr().err


def test_the_table_has_a_row_for_each_client_and_names_what_failed(driver: ModuleType):
    good = driver.Report(client="openai", version="3.54.0", num_checks=3, failures=(), seconds=1.25)
    bad = driver.Report(client="litellm", version="1.2", num_checks=2, failures=(("streams", "ValueError: no"),), seconds=2)

    lines = driver.table([good, bad]).split("\n")

    assert lines[2].split() == ["openai", "3.54.0", "3", "3", "1.2"]
    assert lines[3].split() == ["litellm", "1.2", "2", "1", "2.0"]
    assert lines[-2:] == ["FAILED litellm: streams: ValueError: no", "4 passed, 1 failed"]


def test_an_environment_is_made_anew_when_its_pins_change(driver: ModuleType, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[object]] = []

    def install(command: list[object], **_: object) -> None:
        commands.append(command)
        (driver.ENVIRONMENTS / "some").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(subprocess, "run", install)
    pins = driver.HERE / "some/requirements.txt"
    client = driver.Client(name="some", package="some")
    made = []
    for text in ("some==1", "some==1", "some==2"):
        pins.write_text(text)
        commands.clear()
        driver.make_environment(client)
        made.append(len(commands))

    assert made == [2, 0, 2]  # an environment and what goes into it, nothing, both again


def test_every_client_is_pinned_has_checks_and_stays_out_of_pytests_way():
    spec = importlib.util.spec_from_file_location("clients_driver_as_it_is", CLIENTS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    driver = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)

    for client in driver.CLIENTS:
        assert client.check_files
        assert not any(re.match(r"test_|.*_test\.py$", file.name) for file in client.check_files)
        if client.is_node:
            dependencies = json.loads((CLIENTS / client.name / "package.json").read_text())["dependencies"]
            assert client.package in dependencies
            assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in dependencies.values())
        else:
            pins = (CLIENTS / client.name / "requirements.txt").read_text().splitlines()
            (wanted,) = (CLIENTS / client.name / "requirements.in").read_text().splitlines()
            assert re.sub(r"\[.*\]", "", wanted) in pins
            assert all(re.match(r"#|[\w.-]+==[\w.]+( ;.*)?$", line) for line in pins)
