"""int8 and int4 kept packed on a CPU (`--cpu-weights packed`): the floats' logits, the same bits in any company, and the bytes saved."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, finish, no_report
from small_checkpoints import CONFIG, converted, opened, write_released

from engine.build import build_engine
from engine.checkpoint.load import load_params
from engine.checkpoint.logits import Arithmetic, prompt_logits
from engine.config import MeshConfig, read_model_config
from engine.sharding import make_meshes
from engine.types import GenerationRequest, SamplingParams
from server.settings import default_model_dir

PROMPTS = [np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist() for seed, length in enumerate((30, 7, 19))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in both forms of int4, and a small one."""
    folder = tmp_path_factory.mktemp("models")
    for group in (64, 128):
        converted(default_model_dir(), folder / f"int4-{group}", "int4", group=group)
    converted(write_released(folder / "released"), folder / "int4", "int4")
    return folder


@pytest.mark.parametrize("form", ["int8", "int4-64"])
def test_the_default_models_logits_are_those_of_its_weights_as_floats(models: Path, form: str):
    model_dir = default_model_dir() if form == "int8" else models / form
    prompt = [1, *np.random.default_rng(8).integers(3, 3000, 40).tolist()]

    (packed,) = prompt_logits(model_dir, [prompt], Arithmetic(keeps_packed=True))
    (plain,) = prompt_logits(model_dir, [prompt], Arithmetic(keeps_packed=False))

    np.testing.assert_allclose(packed, plain, rtol=0, atol=1e-4 * plain.std())
    assert not np.array_equal(packed, plain)  # it was computed in another way


@pytest.mark.parametrize("group", [64, 128])
def test_int4_of_the_default_model_takes_at_most_54_hundredths_of_int8_on_disk_and_in_memory(models: Path, group: int):
    model_dir, int8_dir = models / f"int4-{group}", default_model_dir()

    on_disk = [sum(opened(directory).file_sizes.values()) for directory in (model_dir, int8_dir)]
    in_memory: list[int] = []
    for directory in (model_dir, int8_dir):
        model = read_model_config(directory)
        (mesh,) = make_meshes(MeshConfig(), model)
        params = load_params(opened(directory), model, dtype="float32", mesh=mesh, keep_int8=True, report=no_report)
        matrices = [getattr(layer, name) for layer in params.layers for name in ("query", "attention_out", "experts_up", "experts_down")]
        in_memory.append(sum(leaf.nbytes for leaf in jax.tree.leaves(matrices)))

    assert on_disk[0] <= 0.54 * on_disk[1]
    assert in_memory[0] <= 0.54 * in_memory[1]


@pytest.mark.parametrize("form", ["released", "int4"])
def test_packed_weights_give_the_same_bits_whatever_the_chunks_and_neighbours(models: Path, form: str):
    config = engine_config(CONFIG, max_num_batched_tokens=40, block_size=4)
    (mesh,) = make_meshes(config.mesh, CONFIG)
    params = load_params(opened(models / form), CONFIG, dtype="float32", mesh=mesh, keep_int8=True, report=no_report)
    harness = ForwardHarness(config, params)

    together = harness.run([(PROMPTS[0], [3, 9, 18]), (PROMPTS[1], [7]), (PROMPTS[2], [1, 8, 10])])

    for prompt, logits in zip(PROMPTS, together, strict=True):
        (alone,) = harness.run([(prompt, [len(prompt)])])
        np.testing.assert_array_equal(logits, alone)


def test_an_engine_with_packed_weights_holds_fewer_bytes_and_generates_the_same_tokens(models: Path):
    config = engine_config(CONFIG, model_dir=str(models / "released"), max_num_batched_tokens=16, max_num_seqs=2)
    request = GenerationRequest(
        request_id="", prompt_token_ids=(1, 9, 4), sampling=SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    )

    plain = build_engine(config, report=no_report)
    packed = build_engine(replace(config, cpu_weights="packed"), report=no_report)

    checkpoint = opened(models / "released")
    assert packed.info.weight_bytes == checkpoint.num_bytes
    assert plain.info.weight_bytes == 4 * checkpoint.num_params
    assert finish(packed, [request])[""].token_ids == finish(plain, [request])[""].token_ids
