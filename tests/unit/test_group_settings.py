"""Which of several machines this one is: by flags, environment, YAML, or LeaderWorkerSet's variables."""

from pathlib import Path

import pytest

from engine.config import GroupConfig
from engine.errors import ConfigError
from server.engine_options import engine_options
from server.settings import LEADER_WORKER_SET, Settings, load_settings

CLUSTER = {"LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3", "LWS_LEADER_ADDRESS": "grok-0.grok.default"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GROK_SERVER_{name.upper()}", raising=False)
    for variable in LEADER_WORKER_SET.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def in_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in CLUSTER.items():
        monkeypatch.setenv(variable, value)


def test_one_process_is_no_group():
    assert engine_options(load_settings({})).group is None


def test_processes_of_one_machine_need_no_address():
    group = engine_options(load_settings({"processes_per_node": "2"})).group

    assert group == GroupConfig(processes_per_node=2, host="127.0.0.1", port=0, start_timeout_s=1620.0)
    assert group.num_processes == 2


def test_nodes_meet_at_the_address_of_the_first():
    flags = {"nnodes": "2", "node_rank": "1", "master_addr": "10.0.0.1", "processes_per_node": "4", "engine_start_timeout": "100"}

    group = engine_options(load_settings(flags)).group

    assert group == GroupConfig(num_nodes=2, processes_per_node=4, host="10.0.0.1", port=29501, start_timeout_s=90.0)
    assert group.num_processes == 8


@pytest.mark.usefixtures("in_a_cluster")
def test_a_cluster_says_which_node_this_is():
    settings = load_settings({})

    assert (settings.nnodes, settings.node_rank, settings.master_addr) == (4, 3, "grok-0.grok.default")


@pytest.mark.usefixtures("in_a_cluster")
def test_whatever_was_said_on_purpose_wins_over_the_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "serve.yaml").write_text("nnodes: 2\n")
    monkeypatch.setenv("GROK_SERVER_MASTER_ADDR", "10.0.0.1")

    settings = load_settings({"config": str(tmp_path / "serve.yaml"), "node_rank": "1"})

    assert (settings.nnodes, settings.node_rank, settings.master_addr) == (2, 1, "10.0.0.1")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"nnodes": "2"}, "--master-addr: several nodes need the address of the one with rank 0"),
        ({"nnodes": "2", "node_rank": "2", "master_addr": "a"}, "--node-rank: of 2 nodes the last has rank 1, found 2"),
        ({"node_rank": "1"}, "--node-rank: of 1 nodes the last has rank 0, found 1"),
        ({"nnodes": "0"}, "--nnodes: input should be greater than or equal to 1, found '0'"),
        ({"processes_per_node": "0"}, "--processes-per-node: input should be greater than or equal to 1, found '0'"),
        ({"master_port": "65536"}, "--master-port: input should be less than or equal to 65535, found '65536'"),
    ],
)
def test_a_node_that_cannot_be_is_refused(flags: dict[str, str], complaint: str):
    with pytest.raises(ConfigError) as caught:
        engine_options(load_settings(flags))

    assert str(caught.value) == complaint
