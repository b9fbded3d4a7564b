"""Two data shards of four devices each give the tokens of one device, hold the same weights from one reading, and are ready together."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from forward_harness import Answer, engine_config, finish, no_report, small_model

from engine.build import build_engine, compile_ahead, copy_params, use_compile_cache
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import load_params
from engine.checkpoint.save import random_tensors, save_checkpoint
from engine.config import EngineConfig, MeshConfig
from engine.replicas import Replicas
from engine.sharding import make_meshes
from engine.types import GenerationRequest, Progress, SamplingParams

pytestmark = pytest.mark.timeout(400)  # sharded programs compile slowly

MODEL = small_model(
    vocab_size=132,
    emb_size=24,
    key_size=6,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=1,
    num_experts=4,
    ffn_size=48,
    row_parallel_scale_groups=4,
)
TWO_BY_FOUR = MeshConfig(data=2, tensor=4)
REQUESTS = [
    GenerationRequest(
        request_id=str(index),
        prompt_token_ids=tuple(np.random.default_rng(index).integers(0, 132, 4 + 7 * index).tolist()),
        sampling=SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=3),
    )
    for index in range(6)
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four-heads")
    save_checkpoint(directory, MODEL, make_tensor=random_tensors(MODEL, seed=6))
    return directory


@pytest.fixture(scope="module")
def compile_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("compiled")
    use_compile_cache(None)


def config_on(mesh: MeshConfig, model_dir: Path, compile_cache_dir: Path) -> EngineConfig:
    config = engine_config(MODEL, mesh=mesh, model_dir=str(model_dir), max_num_batched_tokens=16, max_num_seqs=4)
    return replace(config, compile_cache_dir=str(compile_cache_dir))


def tokens_of(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


def test_two_shards_of_four_devices_give_the_tokens_of_one_device(model_dir: Path, compile_cache_dir: Path):
    one = build_engine(config_on(MeshConfig(), model_dir, compile_cache_dir), report=no_report)
    reports: list[Progress] = []
    two = build_engine(config_on(TWO_BY_FOUR, model_dir, compile_cache_dir), report=reports.append)
    assert isinstance(two, Replicas)

    found = finish(two, REQUESTS)

    assert tokens_of(found) == tokens_of(finish(one, REQUESTS))
    for request in REQUESTS:
        logprobs = [entry.logprob for entry in found[request.request_id].logprobs]
        assert np.isfinite(logprobs).all()
    assert [core.stats().num_steps > 10 for core in two.cores] == [True, True]
    assert two.stats().num_late_compilations == 0
    assert_all_are_told_of(reports, two, one.info.weight_bytes)


def assert_all_are_told_of(reports: list[Progress], two: Replicas, weight_bytes: int) -> None:
    """Every tensor once and the programs of both shards in the progress, all devices and copies in the facts."""
    loads = [each for each in reports if each.phase == "load"]
    assert len({each.detail for each in loads}) == loads[-1].tensors_done == loads[-1].tensors_total
    assert loads[-1].done == loads[-1].total
    compiled = [each.done for each in reports if each.phase == "compile"]
    assert compiled == list(range(1, two.info.num_programs + 1))
    assert {each.total for each in reports if each.phase == "compile"} == {two.info.num_programs}
    assert (two.info.num_devices, two.info.weight_bytes) == (8, 2 * weight_bytes)
    assert (two.info.max_num_seqs, two.info.num_blocks) == (8, 2 * two.cores[0].info.num_blocks)


def test_programs_that_were_compiled_ahead_serve_all_shards(model_dir: Path, compile_cache_dir: Path):
    config = config_on(TWO_BY_FOUR, model_dir, compile_cache_dir)
    reports: list[Progress] = []

    engine = build_engine(config, report=reports.append, programs=compile_ahead(config))

    assert {each.phase for each in reports} == {"load"}
    assert engine.info.compile_s == 0
    assert finish(engine, REQUESTS).keys() == {request.request_id for request in REQUESTS}
    assert engine.stats().num_late_compilations == 0


@pytest.mark.parametrize("shard", [MeshConfig(data=2, tensor=4), MeshConfig(data=4, expert=2)], ids=["widths", "experts"])
def test_copies_are_equal_and_lie_on_the_devices_of_their_own_shard(model_dir: Path, shard: MeshConfig):
    meshes = make_meshes(shard, MODEL)
    checkpoint = open_checkpoint(model_dir, MODEL)
    params = load_params(checkpoint, MODEL, dtype="float32", mesh=meshes[0], keep_int8=True, report=no_report)

    for mesh in meshes[1:]:
        copies = copy_params(params, meshes[0], to=mesh)

        for original, copy in zip(jax.tree.leaves(params), jax.tree.leaves(copies), strict=True):
            assert copy.sharding == jax.NamedSharding(mesh, original.sharding.spec)
            assert [shard.device for shard in copy.addressable_shards] == list(mesh.devices.flat)
            np.testing.assert_array_equal(np.asarray(copy), np.asarray(original), strict=True)
