"""How far a conversion moves the logits of given prompts, and what is refused before it begins."""

import json
from pathlib import Path

import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, no_report
from small_checkpoints import CONFIG, converted, opened, write_released
from tiny_tokenizer import tiny_model_proto

from engine.checkpoint.__main__ import prompts_of
from engine.checkpoint.compare_logits import MAX_PROMPT_TOKENS, REPORT_NAME, LogitError, check, compare_logits
from engine.checkpoint.convert import Settings
from engine.checkpoint.load import load_params
from engine.checkpoint.logits import Arithmetic, prompt_logits
from engine.errors import CheckpointError
from engine.sharding import make_meshes
from engine.tokenizer import Tokenizer

RUNS = ((1, 5, 9, 31, 2, 7, 7), (3,))
PROMPTS = {"seven tokens": RUNS[0], "one": RUNS[1]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as released, in int8 and in int4."""
    folder = tmp_path_factory.mktemp("models")
    released = write_released(folder / "released")
    converted(released, folder / "int8")
    converted(released, folder / "int4", "int4")
    return folder


def compared(models: Path, target: str) -> list[LogitError]:
    return compare_logits(models / "released", models / target, PROMPTS, report=lambda _: None)


def test_the_logits_are_those_of_the_serving_forward_pass(models: Path):
    config = engine_config(CONFIG, num_blocks=16, block_size=4)
    (mesh,) = make_meshes(config.mesh, CONFIG)
    params = load_params(opened(models / "released"), CONFIG, dtype="float32", mesh=mesh, keep_int8=False, report=no_report)
    expected = ForwardHarness(config, params).run([(run, [len(run)]) for run in RUNS])

    found = list(prompt_logits(models / "released", RUNS, Arithmetic()))

    assert [logits.shape for logits in found] == [(len(run), CONFIG.vocab_size) for run in RUNS]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_what_was_not_rounded_has_no_error_and_int4_has_one(models: Path):
    same, rounded = compared(models, "int8"), compared(models, "int4")

    assert [error.max_error for error in same] == [0, 0]
    assert [error.same_likeliest for error in same] == [1, 1]
    for error, run in zip(rounded, RUNS, strict=True):
        assert error.num_tokens == len(run)
        assert 0.001 * error.std_of_logits < error.rms_error < error.max_error < 10 * error.std_of_logits


def test_the_errors_are_kept_beside_the_weights_which_still_load(models: Path):
    found = compared(models, "int4")

    kept = json.loads((models / "int4" / REPORT_NAME).read_bytes())
    assert kept["source"] == str(models / "released")
    assert [LogitError(**error) for error in kept["prompts"]] == found
    assert len(opened(models / "int4").tensors) == 26


PLENTY = 1 << 50


@pytest.mark.parametrize(
    ("token_ids", "complaint"),
    [
        ((CONFIG.vocab_size,), "token id 32 to compare is outside the vocabulary of 32"),
        ((1,) * 65, "is 65 tokens, must be 1 to 64"),
        ((), "is 0 tokens"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused_before_the_conversion(models: Path, token_ids: tuple[int, ...], complaint: str):
    with pytest.raises(CheckpointError, match=complaint):
        check(models / "released", {"": token_ids}, memory_bytes=PLENTY, settings=Settings(weights="int4", group=64))


def test_a_prompt_of_all_the_context_is_taken(models: Path):
    assert CONFIG.sequence_len < MAX_PROMPT_TOKENS
    check(models / "released", {"": (1,) * CONFIG.sequence_len}, memory_bytes=PLENTY)


def test_a_text_begins_a_document_and_token_ids_are_taken_as_they_are(tmp_path: Path):
    released = write_released(tmp_path / "released")
    (released / "tokenizer.model").write_bytes(tiny_model_proto())

    prompts = prompts_of(released, texts=["once upon a time"], token_ids=["7 8"])

    text_token_ids = Tokenizer(tiny_model_proto()).encode("once upon a time")
    assert prompts == {"7 8": [7, 8], "once upon a time": [CONFIG.bos_token, *text_token_ids]}


def test_a_text_without_a_tokenizer_is_refused(models: Path):
    with pytest.raises(CheckpointError, match=r"there is no tokenizer.model for --compare-prompt; give --compare-token-ids instead"):
        prompts_of(models / "released", texts=["once"], token_ids=[])


def test_a_model_that_is_too_large_for_the_machine_is_refused_before_the_conversion(models: Path):
    with pytest.raises(CheckpointError, match=r"comparing logits takes about [0-9,]+ bytes of memory, 1,000 are here"):
        check(models / "released", PROMPTS, memory_bytes=1000, settings=Settings(weights="int4", group=64))


def test_bfloat16_weights_count_as_the_floats_that_they_become(models: Path):
    def needed(settings: Settings | None) -> int:
        with pytest.raises(CheckpointError) as refused:
            check(models / "released", PROMPTS, memory_bytes=0, settings=settings)
        return int(str(refused.value).split("about ")[1].split(" bytes")[0].replace(",", ""))

    num_matrix_params = sum(tensor.spec.num_params for tensor in opened(models / "released").tensors.values() if tensor.spec.is_quantized)
    assert 2 * num_matrix_params < needed(Settings(weights="bfloat16")) - needed(None) < 3 * num_matrix_params
    assert needed(Settings(weights="int4", group=64)) == needed(None)  # the source's int8 is the larger one
