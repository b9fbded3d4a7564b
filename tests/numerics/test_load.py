"""From checked files to the devices: what is read, what memory it takes, what is told meanwhile, and what becomes of changed files."""

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_checkpoints import CONFIG, converted, opened, write_released

from engine.checkpoint import device_slices
from engine.checkpoint.dequantize import real_slice
from engine.checkpoint.device_slices import InFlight, blocks, put_slices
from engine.checkpoint.load import load_params
from engine.checkpoint.read_ahead import GAP_BYTES, HINT_BYTES, ReadAhead, Wanted, byte_runs, scaled
from engine.checkpoint.tensors import Checkpoint, FileArray, StoredArray
from engine.config import MeshConfig, ModelConfig
from engine.errors import CheckpointError
from engine.model.params import each_spec, param_specs
from engine.model.quantized import is_quantized
from engine.sharding import make_meshes
from engine.types import Progress

MODEL = replace(CONFIG, num_kv_heads=8, row_parallel_scale_groups=8)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("model"), config=MODEL)


def loaded(
    checkpoint: Checkpoint, *, tensor: int = 8, keep_int8: bool = True, config: ModelConfig = MODEL, heard: list[Progress] | None = None
) -> dict[str, Any]:
    """By released name."""
    (mesh,) = make_meshes(MeshConfig(tensor=tensor), config)
    report = [].append if heard is None else heard.append
    params = load_params(checkpoint, config, dtype="float32", mesh=mesh, keep_int8=keep_int8, report=report)
    return dict(zip([spec.name for spec in each_spec(param_specs(config))], jax.tree.leaves(params, is_leaf=is_quantized), strict=True))


class Recording:
    """An array of a file that counts how often each of its numbers is read."""

    def __init__(self, source: FileArray, counts: np.ndarray) -> None:
        self.dtype, self.shape, self.num_bytes, self.regions = source.dtype, source.shape, source.num_bytes, source.regions
        self._source, self._counts = source, counts

    def open(self) -> "_RecordingArray":
        return _RecordingArray(self._source.open(), self._counts)


class _RecordingArray:
    def __init__(self, array: np.ndarray, counts: np.ndarray) -> None:
        self._array, self._counts, self.shape, self.dtype = array, counts, array.shape, array.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        self._counts[index] += 1
        return self._array[index]


# What is read


@pytest.mark.parametrize("keep_int8", [True, False])
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_every_number_of_every_weight_is_read_once(model_dir: Path, tensor: int, keep_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_slices, "BLOCK_BYTES", 1000)
    checkpoint = opened(model_dir)
    counts = {name: np.zeros(each.spec.shape, np.int32) for name, each in checkpoint.tensors.items()}
    recorded = {name: replace(each, weight_source=Recording(each.weight_source, counts[name])) for name, each in checkpoint.tensors.items()}  # type: ignore[arg-type]

    params = loaded(replace(checkpoint, tensors=recorded), tensor=tensor, keep_int8=keep_int8)

    assert all((count == 1).all() for count in counts.values())
    for name, each in checkpoint.tensors.items():
        whole = tuple(slice(0, size) for size in each.spec.shape)
        if is_quantized(params[name]):
            np.testing.assert_array_equal(np.asarray(params[name].weight), np.asarray(each.weight[whole]))
        else:
            np.testing.assert_array_equal(np.asarray(params[name]), real_slice(each, whole, np.float32))


def test_a_heads_columns_are_read_for_the_devices_that_hold_it(tmp_path: Path) -> None:
    few = replace(CONFIG, num_kv_heads=2)
    checkpoint = opened(write_released(tmp_path, config=few))
    name = "transformer/decoder_layer_0/multi_head_attention/key"
    tensor = checkpoint.tensors[name]
    counts = np.zeros(tensor.spec.shape, np.int32)
    recorded = checkpoint.tensors | {name: replace(tensor, weight_source=Recording(tensor.weight_source, counts))}  # type: ignore[arg-type]

    loaded(replace(checkpoint, tensors=recorded), config=few)

    assert (counts == 4).all()  # 8 devices, 2 heads


def test_what_all_devices_hold_is_read_once_and_is_everywhere() -> None:
    (mesh,) = make_meshes(MeshConfig(tensor=8), MODEL)
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    asked: list[Any] = []

    def read(index: Any) -> np.ndarray:
        asked.append(index)
        return numbers[index]

    sharding = NamedSharding(mesh, PartitionSpec())
    array = put_slices((4, 6), jnp.dtype(jnp.float32), sharding, read, in_flight=InFlight(1), advance=lambda _: None)

    assert asked == [(slice(0, 4), slice(0, 6))]
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), numbers)


@pytest.mark.parametrize("max_numbers", [1, 7, 60, 64, 1000])
def test_blocks_are_small_and_make_up_the_whole(max_numbers: int) -> None:
    counts = np.zeros((3, 10, 12), np.int32)
    box = (slice(1, 3), slice(0, 9), slice(4, 12))

    cut = list(blocks(box, max_numbers=max_numbers))
    for block in cut:
        counts[block] += 1

    assert counts[box].min() == counts[box].max() == 1
    assert counts.sum() == counts[box].size
    assert max(counts[block].size for block in cut) <= max_numbers


# Reading ahead


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 4), slice(0, 300), slice(0, 40_000)),
        (slice(1, 3), slice(0, 300), slice(0, 40_000)),
        (slice(0, 4), slice(100, 200), slice(0, 40_000)),
        (slice(0, 4), slice(0, 300), slice(10_000, 20_000)),
        (slice(2, 3), slice(7, 8), slice(5, 6)),
        (slice(0, 2), slice(0, 300), slice(0, 39_000)),
    ],
)
def test_what_is_read_ahead_is_what_is_wanted_and_the_gaps_between_pages(box: tuple[slice, ...]) -> None:
    array = StoredArray(dtype="int8", shape=(4, 300, 40_000), offset=153)
    wanted = np.zeros(array.shape, bool)
    wanted[box] = True
    flat = wanted.reshape(-1)

    runs = list(byte_runs(array, box))

    hinted = np.zeros(153 + array.num_bytes, bool)
    for offset, length in runs:
        assert 0 < length <= HINT_BYTES
        assert not hinted[offset : offset + length].any()
        hinted[offset : offset + length] = True
    assert runs == sorted(runs)
    assert hinted[153:][flat].all()
    surplus = hinted[153:] & ~flat
    assert surplus.sum() <= GAP_BYTES * (np.diff(flat.astype(np.int8)) == 1).sum()
    if flat.sum() < flat.size / 3:
        assert surplus.sum() < GAP_BYTES


def test_a_part_is_found_in_a_file_with_half_the_rows_or_fewer_heads() -> None:
    assert scaled((slice(4, 8), slice(0, 6)), (8, 12), (4, 12)) == (slice(2, 4), slice(0, 6))
    assert scaled((slice(3, 5),), (16,), (4,)) == (slice(0, 2),)


def wanted_files(tmp_path: Path, *, count: int, size: int) -> Iterator[Wanted]:
    for number in range(count):
        path = tmp_path / f"file{number}"
        path.write_bytes(bytes(size))
        array = FileArray(path=path, file_size=size, stored=StoredArray(dtype="int8", shape=(size,), offset=0))
        yield Wanted(name=path.name, parts=((array, (slice(0, size),)),))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no hints")
def test_the_disk_is_never_further_ahead_than_the_limit_and_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 16 << 20
    hinted, is_idle = [0], Event()

    def note(_file: int, _offset: int, length: int, _advice: int) -> None:
        hinted[0] += length

    monkeypatch.setattr(os, "posix_fadvise", note)
    wanted = list(wanted_files(tmp_path, count=4, size=size))

    with ReadAhead(wanted, limit_bytes=size) as ahead:
        first = _settled(hinted, is_idle)
        ahead.is_done("file0")
        second = _settled(hinted, is_idle)
        for one in wanted:
            ahead.is_done(one.name)

    assert first == size
    assert second == 2 * size


def _settled(numbers: list[int], never: Event) -> int:
    before = -1
    while before != numbers[0] or not before:
        before = numbers[0]
        never.wait(0.1)
    return before


def test_reading_ahead_ends_with_its_context_and_minds_no_missing_file(tmp_path: Path) -> None:
    wanted = list(wanted_files(tmp_path, count=3, size=1000))
    wanted[0].parts[0][0].path.unlink()

    with ReadAhead(wanted, limit_bytes=0):
        pass


# Memory


def test_slices_on_their_way_keep_within_the_bound_but_one_is_always_let_through() -> None:
    in_flight, is_in, may_leave = InFlight(10), Event(), Event()

    def hold() -> None:
        with in_flight.room_for(11):
            is_in.set()
            may_leave.wait()

    def come_late() -> None:
        with in_flight.room_for(1):
            entered.append(may_leave.is_set())

    entered: list[bool] = []
    holder, late = Thread(target=hold), Thread(target=come_late)
    holder.start()
    is_in.wait()
    late.start()
    late.join(0.1)
    may_leave.set()
    holder.join()
    late.join()

    assert entered == [True]


@pytest.mark.parametrize(("keep_int8", "tensor"), [(True, 8), (True, 1), (False, 8), (False, 1)])
def test_loading_takes_less_than_one_more_tensor_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_int8: bool, tensor: int
) -> None:
    monkeypatch.setattr(device_slices, "BLOCK_BYTES", 64 << 10)
    config = replace(MODEL, emb_size=256, ffn_size=8192, num_layers=1)
    checkpoint = opened(write_released(tmp_path, config=config))
    largest = max(each.num_bytes for each in checkpoint.tensors.values())
    loaded(checkpoint, config=config, tensor=tensor, keep_int8=keep_int8)  # imports and caches

    tracemalloc.start()
    try:
        params = loaded(checkpoint, config=config, tensor=tensor, keep_int8=keep_int8)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= now + largest
    assert peak - now < largest


# What is told


@pytest.mark.parametrize("weights", ["released", "int4", "bfloat16"])
def test_progress_only_grows_and_ends_with_every_byte_and_tensor(model_dir: Path, tmp_path: Path, weights: Any) -> None:
    if weights != "released":
        converted(model_dir, tmp_path / "store", weights)
    checkpoint = opened(model_dir if weights == "released" else tmp_path / "store")
    heard: list[Progress] = []

    loaded(checkpoint, tensor=2, heard=heard)

    assert [each.done for each in heard] == sorted(each.done for each in heard)
    assert [each.tensors_done for each in heard] == sorted(each.tensors_done for each in heard)
    assert {(each.phase, each.unit, each.total, each.tensors_total) for each in heard} == {("load", "bytes", checkpoint.num_bytes, 26)}
    assert (heard[-1].done, heard[-1].tensors_done) == (checkpoint.num_bytes, 26)
    assert heard[-1].left_s == 0
    assert {each.detail for each in heard} == set(checkpoint.tensors)


# Files that change


@pytest.mark.parametrize("change", ["removed", "truncated", "replaced by a directory"])
def test_a_file_that_changes_after_the_check_is_one_clear_error(tmp_path: Path, change: str) -> None:
    checkpoint = opened(write_released(tmp_path, config=MODEL))
    path = checkpoint.tensors["transformer/decoder_layer_1/moe/linear"].path
    if change == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    if change == "replaced by a directory":
        path.mkdir()

    with pytest.raises(CheckpointError, match=path.name) as caught:
        loaded(checkpoint)

    assert "\n" not in str(caught.value)


def test_whoever_cannot_be_told_any_more_ends_the_load(model_dir: Path) -> None:
    (mesh,) = make_meshes(MeshConfig(tensor=2), MODEL)

    def report(_: Progress) -> None:
        raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError, match="the server is gone"):
        load_params(opened(model_dir), MODEL, dtype="float32", mesh=mesh, keep_int8=True, report=report)
