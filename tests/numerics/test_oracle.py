"""The model on tiny-a against the released code's own outputs (`tests/data/tiny-a/README.md` says how they were made)."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, finish, no_report
from numpy.typing import NDArray
from numpy_grok import numpy_logits

from engine.build import build_engine
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import load_params
from engine.config import DType, read_model_config
from engine.model.quantized import QuantizedArray, dequantize
from engine.programs import step_layouts
from engine.sharding import make_meshes
from engine.types import FinishReason, GenerationRequest, SamplingParams

pytestmark = pytest.mark.timeout(400)  # two dozen seconds of compiling, on whatever a busy machine leaves

TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"
TOLERANCE = 1e-4  # absolute, on logits of standard deviation about 2
MODEL = read_model_config(TINY_A)
ORACLE = np.load(TINY_A / "oracle.npz")
PROMPTS = range(6)


@cache
def harness(dtype: DType, *, keep_int8: bool = False) -> ForwardHarness:
    config = engine_config(MODEL, dtype=dtype, max_num_batched_tokens=80)
    params = load_params(
        open_checkpoint(TINY_A, MODEL),
        MODEL,
        dtype=dtype,
        mesh=make_meshes(config.mesh, MODEL)[0],
        keep_int8=keep_int8,
        report=no_report,
    )
    return ForwardHarness(config, params, layouts=step_layouts(config)[-1:])


def prompt(i: int) -> list[int]:
    return ORACLE[f"prompt_{i}"].tolist()


def prompt_and_output(i: int) -> list[int]:
    """What the released code had read when it chose its last token."""
    return prompt(i) + ORACLE[f"f32/decode_tokens_{i}"].tolist()[:-1]


def chunks_of(size: int, length: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def bf16_oracle(name: str) -> NDArray[np.float32]:
    return (ORACLE[name].astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("chunk", [80, 13, 1], ids=["whole", "in chunks", "token by token"])
def test_float32_logits_are_those_of_the_released_code_at_every_position(chunk: int):
    found = harness("float32").run([(prompt(i), chunks_of(chunk, len(prompt(i)))) for i in (5, 0)])
    found += harness("float32").run([(prompt(i), chunks_of(chunk, len(prompt(i)))) for i in (1, 2, 3, 4)])

    for i, logits in zip((5, 0, 1, 2, 3, 4), found, strict=True):
        np.testing.assert_allclose(logits, ORACLE[f"f32/full_logits_{i}"], rtol=0, atol=TOLERANCE, err_msg=f"prompt {i}")


@pytest.mark.parametrize("i", PROMPTS)
def test_float32_decode_logits_are_those_of_the_released_code(i: int):
    (logits,) = harness("float32").run([(prompt_and_output(i), [len(prompt_and_output(i))])])

    np.testing.assert_allclose(logits[len(prompt(i)) - 1 :], ORACLE[f"f32/decode_logits_{i}"], rtol=0, atol=TOLERANCE)


def test_the_engine_chooses_the_tokens_of_the_released_code():
    config = engine_config(MODEL, model_dir=str(TINY_A), max_num_batched_tokens=16, max_model_len=80)
    phases: list[str] = []
    core = build_engine(config, report=lambda progress: phases.append(progress.phase))

    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_token_ids=tuple(prompt(i)),
            sampling=SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=5, prompt_logprobs=5),
        )
        for i in PROMPTS
    ]
    found = finish(core, requests)

    assert phases == sorted(phases, reverse=True)
    assert set(phases) == {"load", "compile"}
    for i in PROMPTS:
        assert found[str(i)].token_ids == ORACLE[f"f32/decode_tokens_{i}"].tolist()
        assert found[str(i)].finish_reason is FinishReason.LENGTH
        assert_logprobs(found[str(i)].logprobs, ORACLE[f"f32/decode_logits_{i}"])
        assert_logprobs(found[str(i)].prompt_logprobs, ORACLE[f"f32/full_logits_{i}"][:-1])
        assert [entry.token_id for entry in found[str(i)].prompt_logprobs] == prompt(i)[1:]


def assert_logprobs(found: list[Any], logits: NDArray[np.float32]) -> None:
    """Entries are the log-softmax of the logits' rows, and their top entries its largest."""
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    assert len(found) == len(expected)
    for entry, row in zip(found, expected, strict=True):
        assert abs(entry.logprob - row[entry.token_id]) < TOLERANCE
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][: len(entry.top)], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose([row[token] for token, _ in entry.top], [value for _, value in entry.top], rtol=0, atol=TOLERANCE)


def test_bfloat16_agrees_statistically_with_the_released_code():
    worst: list[NDArray[Any]] = []
    is_same: list[NDArray[Any]] = []
    for i in PROMPTS:
        (logits,) = harness("bfloat16").run([(prompt(i), [len(prompt(i))])])
        expected = bf16_oracle(f"bf16/full_logits_{i}")
        worst.append(np.abs(logits - expected).max(axis=-1))
        is_same.append(logits.argmax(axis=-1) == expected.argmax(axis=-1))

    assert np.median(np.concatenate(worst)) < 0.3
    assert np.concatenate(is_same).mean() >= 0.85


def test_weights_kept_as_int8_give_the_same_logits():
    (logits,) = harness("float32", keep_int8=True).run([(prompt(4), [len(prompt(4))])])

    np.testing.assert_allclose(logits, ORACLE["f32/full_logits_4"], rtol=0, atol=TOLERANCE)


def test_loading_dequantises_exactly_as_the_quantised_array_does():
    plain, quantised = harness("float32").params, harness("float32", keep_int8=True).params

    restored = jax.tree.map(
        lambda leaf: dequantize(leaf, np.dtype(np.float32)) if isinstance(leaf, QuantizedArray) else leaf,
        quantised,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )

    assert any(isinstance(leaf, QuantizedArray) for leaf in quantised_leaves(quantised))
    jax.tree.map(np.testing.assert_array_equal, restored, plain)


def quantised_leaves(params: Any) -> Iterable[Any]:
    return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def test_the_float64_reference_agrees_with_the_released_code():
    """So that what the reference proves of other shapes means something."""
    found = numpy_logits(harness("float32").params, prompt(4), MODEL)

    np.testing.assert_allclose(found, ORACLE["f32/full_logits_4"], rtol=0, atol=TOLERANCE)
