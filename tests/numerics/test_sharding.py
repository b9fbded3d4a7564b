"""Several fake devices, tensor and expert parallel, give what one gives and the references give, with no more talk than promised."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_harness import Answer, ForwardHarness, engine_config, finish, no_report, small_model
from numpy.typing import NDArray
from numpy_grok import numpy_logits

from engine.build import build_engine
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import load_params
from engine.checkpoint.save import random_tensors, save_checkpoint
from engine.config import EngineConfig, MeshConfig, ModelConfig, read_model_config
from engine.errors import ConfigError
from engine.model.params import Params
from engine.programs import Programs, shapes_of, step_layouts
from engine.sharding import make_meshes
from engine.types import GenerationRequest, SamplingParams, TokenLogprob

pytestmark = pytest.mark.timeout(400)  # sharded programs compile slowly

TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"
TOLERANCE = 1e-4
MODEL = small_model(
    vocab_size=144,
    emb_size=24,
    key_size=6,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=1,
    num_experts=4,
    ffn_size=48,
    row_parallel_scale_groups=4,
)
PROMPTS = [np.random.default_rng(5).integers(0, 144, length).tolist() for length in (37, 5)]
REQUESTS = [
    GenerationRequest(
        request_id=str(i),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=144, prompt_logprobs=144),
    )
    for i, prompt in enumerate(PROMPTS)
]

DEEP_MODEL = replace(MODEL, num_layers=12, num_experts=8)
DEEP_PROMPT = PROMPTS[0][:29]

ALLOWED = (1, 33, 64, 96, 143)
BANNED_PAIRS = [([token], token) for token in ALLOWED]
FEW_ALLOWED = GenerationRequest(
    request_id="few allowed",
    prompt_token_ids=tuple(PROMPTS[1]),
    sampling=replace(
        REQUESTS[1].sampling, prompt_logprobs=None, allowed_token_ids=ALLOWED, bad_words=tuple((token, token) for token in ALLOWED)
    ),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eight-heads")
    save_checkpoint(directory, MODEL, make_tensor=random_tensors(MODEL, seed=6))
    return directory


def config_on(mesh: MeshConfig, model_dir: Path) -> EngineConfig:
    return replace(engine_config(MODEL, mesh=mesh, model_dir=str(model_dir), max_num_batched_tokens=16), max_logprobs=144)


@pytest.fixture(scope="module")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("twelve-layers")
    save_checkpoint(directory, DEEP_MODEL, make_tensor=random_tensors(DEEP_MODEL, seed=9))
    return directory


@pytest.fixture(scope="module")
def on_one_device(deep_model_dir: Path) -> NDArray[np.float32]:
    return deep_logits(MeshConfig(), deep_model_dir)


def deep_logits(mesh: MeshConfig, model_dir: Path) -> NDArray[np.float32]:
    """Logits of a prompt in chunks; the last eight tokens come one at a time."""
    config = engine_config(DEEP_MODEL, mesh=mesh, model_dir=str(model_dir), max_num_batched_tokens=16)
    params = load(mesh, model_dir, model=DEEP_MODEL)
    (logits,) = ForwardHarness(config, params).run([(DEEP_PROMPT, [16, 5, *[1] * 8])])
    return logits


def load(mesh: MeshConfig, model_dir: Path, *, model: ModelConfig = MODEL, keep_int8: bool = False) -> Params:
    checkpoint = open_checkpoint(model_dir, model)
    return load_params(checkpoint, model, dtype="float32", mesh=make_meshes(mesh, model)[0], keep_int8=keep_int8, report=no_report)


def assert_answers_are_right(found: dict[str, Answer], model_dir: Path) -> None:
    """Greedy tokens, and at every position the log-probabilities of the whole vocabulary."""
    params = load(MeshConfig(), model_dir)
    for request in REQUESTS:
        answer, prompt = found[request.request_id], list(request.prompt_token_ids)
        logits = numpy_logits(params, prompt + answer.token_ids[:-1], MODEL)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        entries = answer.prompt_logprobs + answer.logprobs
        np.testing.assert_allclose([by_id(entry) for entry in entries], expected, rtol=0, atol=TOLERANCE)
        assert answer.token_ids == expected[len(prompt) - 1 :].argmax(axis=-1).tolist()


def assert_choices_are_allowed(answer: Answer) -> None:
    """Each token the likeliest of those that are allowed and complete no run that is not."""
    for position, entry in enumerate(answer.logprobs):
        logprobs = by_id(entry)
        allowed = [token for token in ALLOWED if (answer.token_ids[position - 1 : position], token) not in BANNED_PAIRS]
        assert answer.token_ids[position] == max(allowed, key=lambda token: logprobs[token])


def by_id(entry: TokenLogprob) -> list[float]:
    return [logprob for _, logprob in sorted(entry.top)]


def test_an_engine_on_eight_devices_answers_as_the_reference_does(model_dir: Path):
    core = build_engine(config_on(MeshConfig(tensor=8), model_dir), report=no_report)

    assert core.info.num_devices == 8
    assert_answers_are_right(finish(core, REQUESTS), model_dir)
    assert_choices_are_allowed(finish(core, [FEW_ALLOWED, REQUESTS[0]])[FEW_ALLOWED.request_id])


def test_int8_weights_split_over_experts_and_widths_give_the_logits_of_the_reference(model_dir: Path):
    """Two devices along the widths share four scale groups, and each has two of the four experts' matrices."""
    mesh = MeshConfig(tensor=2, expert=2)
    harness = ForwardHarness(config_on(mesh, model_dir), load(mesh, model_dir, keep_int8=True))

    found = harness.run([(PROMPTS[0], [11, 11, 11, 4]), (PROMPTS[1], [5])])

    params = load(MeshConfig(), model_dir)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        np.testing.assert_allclose(logits, numpy_logits(params, prompt, MODEL), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(tensor=2), MeshConfig(tensor=4), MeshConfig(tensor=8), MeshConfig(expert=8), MeshConfig(expert=4, tensor=2)],
    ids=["2 widths", "4 widths", "8 widths", "8 experts", "4 experts x 2 widths"],
)
def test_twelve_layers_give_the_logits_and_the_choices_of_one_device(
    deep_model_dir: Path, on_one_device: NDArray[np.float32], mesh: MeshConfig
):
    logits = deep_logits(mesh, deep_model_dir)

    np.testing.assert_allclose(logits, on_one_device, rtol=0, atol=TOLERANCE)
    assert (logits.argmax(axis=-1) == on_one_device.argmax(axis=-1)).all()


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=4), MeshConfig(expert=4)], ids=["widths", "experts"])
def test_on_several_devices_too_the_bits_do_not_depend_on_the_company(model_dir: Path, mesh: MeshConfig):
    harness = ForwardHarness(config_on(mesh, model_dir), load(mesh, model_dir))
    (alone,) = harness.run([(PROMPTS[0], [16, 16, 5])])

    together, _ = harness.run([(PROMPTS[0], [11, 1, 15, 9, 1]), (PROMPTS[1], [5])])

    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("tensor", [2, 4], ids=["a kv head each", "two devices for a kv head"])
@pytest.mark.parametrize("keep_int8", [False, True], ids=["float32", "int8"])
def test_the_released_model_in_small_gives_its_logits_on_several_devices(tensor: int, *, keep_int8: bool):
    """tests/data/tiny-a has two kv heads, the outputs beside it are the released code's."""
    model, mesh, oracle = read_model_config(TINY_A), MeshConfig(tensor=tensor), np.load(TINY_A / "oracle.npz")
    config = engine_config(model, mesh=mesh, max_num_batched_tokens=80)
    params = load(mesh, TINY_A, model=model, keep_int8=keep_int8)
    prompt = oracle["prompt_0"].tolist()

    (logits,) = ForwardHarness(config, params, layouts=step_layouts(config)[-1:]).run([(prompt, [len(prompt)])])

    np.testing.assert_allclose(logits, oracle["f32/full_logits_0"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=8), MeshConfig(expert=4, tensor=2)], ids=["8 widths", "4 experts x 2 widths"])
def test_a_decoding_step_has_two_all_reduces_in_a_layer_and_one_for_the_embedding_and_one_all_gather_of_logits(
    tmp_path: Path, mesh: MeshConfig
):
    model = replace(MODEL, num_layers=3)
    save_checkpoint(tmp_path, model, make_tensor=random_tensors(model, seed=2))
    config = engine_config(model, mesh=mesh, max_num_batched_tokens=16)
    programs = Programs(config, shapes_of(load(mesh, tmp_path, model=model)), make_meshes(mesh, model)[0])
    layout = programs.layouts[0]

    programs.compile_greedy(layout)

    assert collectives(programs.greedy_steps[layout]) == {"all-reduce": 2 * model.num_layers + 1, "all-gather": 1}


def collectives(program: Any) -> Counter[str]:
    """How many of each kind the compiled program holds."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return Counter(re.findall(rf"\b({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=4, expert=2), MeshConfig(tensor=8)], ids=["groups split", "groups are cut"])
def test_each_device_holds_only_its_share_of_the_matrices(model_dir: Path, mesh: MeshConfig):
    layer = load(mesh, model_dir, keep_int8=True).layers[0]

    def share(name: str, part: str) -> tuple[int, ...]:
        return getattr(getattr(layer, name), part).addressable_shards[0].data.shape

    tensor, experts = mesh.tensor, MODEL.num_experts // mesh.expert
    assert share("query", "weight") == (24, 96 // 8)
    assert share("query", "scales") == (1, 96 // 8)
    assert share("key", "weight") == (24, 48 // 8)
    assert share("attention_out", "weight") == (96 // 8, 24)
    assert share("attention_out", "scales") == (1, 24)
    assert share("experts_gate", "weight") == (experts, 24, 48 // tensor)
    assert share("experts_down", "weight") == (experts, 48 // tensor, 24)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(tensor=3), "tensor parallel size 3 neither divides num_kv_heads 8 nor is a multiple of it"),
        (MeshConfig(tensor=32), "tensor parallel size 32 does not divide num_q_heads 16"),
        (MeshConfig(expert=3), "expert parallel size 3 does not divide num_experts 4"),
        (MeshConfig(tensor=16), "wants 16 devices, 8 are here"),
    ],
    ids=["kv heads", "heads", "experts", "devices"],
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(mesh: MeshConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        make_meshes(mesh, MODEL)[0]


def test_a_vocabulary_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="tensor parallel size 8 does not divide vocab_size 131"):
        make_meshes(MeshConfig(tensor=8), replace(MODEL, vocab_size=131))


def test_an_expert_width_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="tensor parallel size 8 does not divide ffn_size 44"):
        make_meshes(MeshConfig(tensor=8), replace(MODEL, ffn_size=44))
