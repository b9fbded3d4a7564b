"""The model against a plain float64 re-implementation, for shapes that no released checkpoint has."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, small_model
from numpy_grok import numpy_logits

from engine.config import ModelConfig
from engine.model.params import random_params
from engine.ops import tiles

TOLERANCE = 1e-4  # absolute, on logits of standard deviation about 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: ModelConfig
    block_size: int = 16
    chunk: int = 16


CASES = {
    "many query heads on one kv head, wider than the model, one block per token": Case(
        model=small_model(emb_size=20, key_size=6, num_q_heads=5, num_kv_heads=1, num_experts=3, num_selected_experts=1, ffn_size=13),
        block_size=1,
        chunk=7,
    ),
    "as many kv heads as query heads, all experts, blocks of three": Case(
        model=small_model(emb_size=24, key_size=2, num_q_heads=3, num_kv_heads=3, num_experts=3, num_selected_experts=3, ffn_size=40),
        block_size=3,
        chunk=5,
    ),
    "grouped heads, three of five experts, a cap that bites, a vocabulary of 131": Case(
        model=small_model(
            vocab_size=131,
            emb_size=33,
            key_size=10,
            num_q_heads=6,
            num_kv_heads=2,
            num_experts=5,
            num_selected_experts=3,
            ffn_size=27,
            attn_logit_cap=0.3,
            attn_output_multiplier=1.7,
        ),
        block_size=64,
    ),
    "one expert, a large eps, another rope base, another head multiplier": Case(
        model=small_model(
            emb_size=7,
            key_size=4,
            num_q_heads=4,
            num_kv_heads=2,
            num_experts=1,
            num_selected_experts=1,
            ffn_size=9,
            rms_norm_eps=0.1,
            rope_base=50.0,
            output_multiplier_scale=1.5,
        ),
    ),
    "twelve layers": Case(model=small_model(num_layers=12, emb_size=16, num_experts=2, num_selected_experts=2, ffn_size=24)),
    "heads and experts wider than a tile of any kernel": Case(
        model=small_model(
            vocab_size=1031, emb_size=160, key_size=48, num_q_heads=6, num_kv_heads=3, num_experts=4, num_selected_experts=2, ffn_size=432
        ),
        chunk=11,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_those_of_plain_numpy(case: Case):
    config = engine_config(case.model, block_size=case.block_size, num_blocks=2 * 80 // case.block_size + 2, max_num_batched_tokens=16)
    params = random_params(case.model, seed=1, dtype="float32")
    random = np.random.default_rng(2)
    prompts = [random.integers(0, case.model.vocab_size, length).tolist() for length in (69, 3)]
    chunks = [[min(case.chunk, len(prompt) - start) for start in range(0, len(prompt), case.chunk)] for prompt in prompts]

    harness = ForwardHarness(config, params)
    found = [harness.run([work])[0] for work in zip(prompts, chunks, strict=True)]

    for prompt, logits in zip(prompts, found, strict=True):
        np.testing.assert_allclose(logits, numpy_logits(params, prompt, case.model), rtol=0, atol=TOLERANCE)


def test_every_field_of_the_configuration_matters_to_the_reference():
    """Otherwise the comparison above could not see it ignored."""
    base = {"num_layers": 1, "num_experts": 3, "num_selected_experts": 2, "attn_output_multiplier": 1.7}
    params = random_params(small_model(**base), seed=1, dtype="float32")
    changes = {
        "attn_logit_cap": 0.5,
        "attn_output_multiplier": 1.0,
        "rms_norm_eps": 1e-2,
        "rope_base": 100.0,
        "num_selected_experts": 1,
        "embedding_multiplier_scale": 0.5,
        "output_multiplier_scale": 0.9,
    }
    variants = [small_model(**base)] + [small_model(**{**base, name: value}) for name, value in changes.items()]

    logits = [numpy_logits(params, list(range(12)), variant) for variant in variants]

    assert all(np.abs(a - b).max() > 10 * TOLERANCE for a, b in itertools.combinations(logits, 2))


def test_whole_buckets_as_other_backends_compute_them_give_the_same_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "loops_over_tiles", lambda: False)
    model = small_model(
        num_layers=2, emb_size=28, key_size=6, num_q_heads=6, num_kv_heads=3, num_experts=5, num_selected_experts=2, ffn_size=20
    )
    params = random_params(model, seed=3, dtype="float32")
    prompts = [list(range(1, 38)), [5, 9, 2]]

    harness = ForwardHarness(engine_config(model, max_num_batched_tokens=48), params)
    found = harness.run([(prompts[0], [20, 16, 1]), (prompts[1], [1, 1, 1])])

    assert len(harness.batcher.layouts) > 2, "a bucket for every power of two"
    for prompt, logits in zip(prompts, found, strict=True):
        np.testing.assert_allclose(logits, numpy_logits(params, prompt, model), rtol=0, atol=TOLERANCE)
