"""How the processes of a machine share its GPUs, as far as that can be told without any."""

from pathlib import Path

import pytest

from engine.config import GroupConfig
from engine.errors import ConfigError
from engine.group.distributed import _local_device_ids, own_cache_dir

GROUP = GroupConfig(num_nodes=2, processes_per_node=2)


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")


def test_processes_of_a_machine_have_an_equal_share_of_its_visible_gpus_each():
    shares = [list(_local_device_ids(GROUP, process_id) or ()) for process_id in range(4)]

    assert shares == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_gpus_that_cannot_be_shared_evenly_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")

    with pytest.raises(ConfigError, match="2 processes cannot share the 3 GPUs of this machine evenly"):
        _local_device_ids(GROUP, 0)


def test_the_only_process_of_a_machine_has_them_all():
    assert _local_device_ids(GroupConfig(num_nodes=2), 1) is None


def test_a_cpu_is_not_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    assert _local_device_ids(GROUP, 0) is None


def test_each_process_keeps_its_programs_apart(tmp_path: Path):
    kept = {own_cache_dir(str(tmp_path), GROUP, process_id=process_id) for process_id in range(4)}

    assert len(kept) == 4
    assert own_cache_dir(None, GROUP, process_id=0) is None
