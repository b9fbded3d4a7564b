"""Choosing tokens against plain NumPy: sorting instead of bisecting, float64 instead of float32."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.constraints import words_of
from engine.sampling import (
    Knobs,
    SlotEntries,
    SlotState,
    adjust,
    choose_tokens,
    empty_slots,
    logprobs_of,
    look_up,
    restrict,
    uniforms,
    write_masks,
    write_slot,
)

Floats = NDArray[np.float32]
DEFAULTS = {
    "slots": np.int32(0),
    "sample_positions": np.int32(0),
    "choices": np.int32(0),
    "top_k": np.int32(0),
    "mask_end": np.int32(0),
    "is_masked": np.int32(0),
    "temperature": np.float32(1),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "presence_penalty": np.float32(0),
    "frequency_penalty": np.float32(0),
    "repetition_penalty": np.float32(1),
}


def knobs(num_rows: int, *, seeds: Any = 0, **given: Any) -> Knobs:
    """One row each; a field is one value for all rows or one per row."""
    fields = {
        name: jnp.asarray(np.broadcast_to(np.asarray(given.get(name, value), value.dtype), num_rows)) for name, value in DEFAULTS.items()
    }
    words = [divmod(int(seed) & 0xFFFF_FFFF_FFFF_FFFF, 1 << 32) for seed in np.broadcast_to(seeds, num_rows)]
    return Knobs(**fields, seeds=jnp.asarray(np.array(words, np.uint32).view(np.int32)))


run_restrict, run_look_up, run_choose_checked = jax.jit(restrict), jax.jit(look_up), jax.jit(choose_tokens)


def run_choose(logits: Any, state: SlotState, knobs: Knobs) -> Any:
    """Tokens of rows that are all sound."""
    token_ids, is_sound = run_choose_checked(logits, state, knobs)
    assert np.all(is_sound)
    return token_ids


def weights_of(logits: NDArray[Any]) -> Floats:
    """As `choose_tokens` makes them: the largest is exactly 1."""
    return np.exp(logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)


def distributions(vocab_size: int) -> dict[str, Floats]:
    random = np.random.default_rng(vocab_size)
    few_values = random.choice([1.0, 0.5, 0.25, 0.125], vocab_size)
    return {
        "flat": np.ones(vocab_size, np.float32),
        "nearly flat": weights_of(0.01 * random.standard_normal(vocab_size)),
        "like a model's": weights_of(3 * random.standard_normal(vocab_size)),
        "many ties": few_values.astype(np.float32) / np.float32(few_values.max()),
        "one token": np.eye(1, vocab_size, vocab_size // 2, dtype=np.float32)[0],
        "two tokens": weights_of(np.where(np.arange(vocab_size) % (vocab_size - 1) == 0, 0.0, -80.0)),
    }


def assert_restricted(weights: Floats, kept: Floats, *, top_k: int, top_p: float, min_p: float) -> None:
    """`kept` is what min-p, then top-k, then top-p leave; equal weights are taken in the order of ids."""
    vocab_size = len(weights)
    is_kept = kept > 0
    np.testing.assert_array_equal(kept[is_kept], weights[is_kept])
    order = np.argsort(-weights, kind="stable")
    order = order[(weights[order] >= np.float32(min_p)) & (weights[order] > 0)]
    if 0 < top_k < vocab_size:
        order = order[:top_k]
    num_kept = int(is_kept.sum())
    np.testing.assert_array_equal(np.flatnonzero(is_kept), np.sort(order[:num_kept]))
    if np.float32(top_p) >= 1:
        assert num_kept == len(order)
        return
    mass = np.cumsum(weights[order].astype(np.float64))
    share, rounding = mass / mass[-1], 2e-6
    assert num_kept == 1 or share[num_kept - 2] < np.float32(top_p) + rounding
    assert num_kept == len(order) or share[num_kept - 1] >= np.float32(top_p) - rounding


def combinations(vocab_size: int) -> list[dict[str, Any]]:
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    alone = [{"top_k": k} for k in (1, 5, vocab_size - 1, vocab_size, 0)]
    alone += [{"top_p": p} for p in (0.0, 1e-7, 0.1, 0.5, 0.9, 0.999999)]
    alone += [{"min_p": p} for p in (1e-6, 0.05, 0.5, 1.0)]
    together = [{"top_k": 7, "top_p": 0.5}, {"top_k": vocab_size // 2, "top_p": 0.7, "min_p": 0.01}, {"min_p": 0.3, "top_p": 0.9}]
    return [{**off, **one} for one in alone + together]


@pytest.mark.parametrize("vocab_size", [131, 4096])
def test_min_p_top_k_and_top_p_keep_what_a_sort_keeps(vocab_size: int):
    cases = [(weights, combination) for weights in distributions(vocab_size).values() for combination in combinations(vocab_size)]
    weights = np.stack([weights for weights, _ in cases])
    given = {name: [combination[name] for _, combination in cases] for name in ("top_k", "top_p", "min_p")}

    kept = np.asarray(run_restrict(jnp.asarray(weights), knobs(len(cases), **given)))

    for row, (before, combination) in enumerate(cases):
        assert_restricted(before, kept[row], **combination)


def test_restricting_is_exact_over_grok_1s_whole_vocabulary():
    vocab_size = 131_072
    cases = [
        (np.ones(vocab_size, np.float32), {"top_k": 0, "top_p": 0.75, "min_p": 0.0}),
        (np.ones(vocab_size, np.float32), {"top_k": 100_000, "top_p": 1.0, "min_p": 0.0}),
        (distributions(vocab_size)["nearly flat"], {"top_k": vocab_size - 1, "top_p": 0.9, "min_p": 0.0}),
        (distributions(vocab_size)["like a model's"], {"top_k": 40_000, "top_p": 0.99, "min_p": 1e-5}),
    ]
    given = {name: [combination[name] for _, combination in cases] for name in ("top_k", "top_p", "min_p")}

    kept = np.asarray(run_restrict(jnp.asarray(np.stack([weights for weights, _ in cases])), knobs(len(cases), **given)))

    for row, (weights, combination) in enumerate(cases):
        assert_restricted(weights, kept[row], **combination)
    assert np.flatnonzero(kept[0]).tolist() == list(range(vocab_size * 3 // 4))
    assert np.flatnonzero(kept[1]).tolist() == list(range(100_000))


@pytest.mark.parametrize("vocab_size", [131, 4096, 131_072])
def test_every_uniform_number_finds_the_token_of_the_inverse_distribution(vocab_size: int):
    """With small integers as weights the sums are exact, and so must be the token."""
    random = np.random.default_rng(vocab_size)
    weights = random.integers(0, 4, vocab_size).astype(np.float32)
    weights[[0, -1]] = 0
    ends = np.cumsum(weights.astype(np.int64))
    grid = np.concatenate([np.linspace(0, 1, 61, dtype=np.float32)[:-1], np.float32([1e-30, 1e-7, 1 - 2**-24])])

    found = np.asarray(run_look_up(jnp.asarray(np.broadcast_to(weights, (len(grid), vocab_size))), jnp.asarray(grid)))

    expected = np.searchsorted(ends, (grid * np.float32(ends[-1])).astype(np.float64), side="right")
    np.testing.assert_array_equal(found, expected)
    assert (weights[found] > 0).all()


def test_a_token_of_weight_zero_is_never_found_however_the_sums_round():
    random = np.random.default_rng(0)
    weights = weights_of(4 * random.standard_normal((256, 4096))) * (random.random((256, 4096)) < 0.02)
    weights[:, 7] = 1
    uniform = np.where(np.arange(256) % 2, np.float32(1 - 2**-24), random.random(256, np.float32))

    found = np.asarray(run_look_up(jnp.asarray(weights), jnp.asarray(uniform)))

    rows = np.arange(256)
    assert (weights[rows, found] > 0).all()
    ends = np.cumsum(weights.astype(np.float64), axis=-1) / weights.astype(np.float64).sum(axis=-1, keepdims=True)
    assert (ends[rows, found] > uniform - 1e-5).all()
    assert (ends[rows, found] - weights[rows, found] / weights.astype(np.float64).sum(axis=-1) <= uniform + 1e-5).all()


def choose(logits: Floats, state: SlotState | None = None, *, num_rows: int, **given: Any) -> NDArray[np.int32]:
    """Tokens for `num_rows` rows; plain rows are added up to a multiple of 64, so that few shapes are compiled."""
    num_padding, vocab_size = -num_rows % 64, logits.shape[-1]
    table = np.pad(np.broadcast_to(logits, (num_rows, vocab_size)), ((0, num_padding), (0, 0)))
    wanted = jax.tree.map(lambda field: jnp.pad(field, [(0, num_padding)] + [(0, 0)] * (field.ndim - 1)), knobs(num_rows, **given))
    state = empty_slots(2, vocab_size) if state is None else state
    return np.asarray(run_choose(jnp.asarray(table), state, wanted))[:num_rows]


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=["plain", "cold", "hot", "top-k", "top-p", "min-p"],
)
def test_frequencies_over_many_seeds_are_the_probabilities(given: dict[str, Any]):
    logits = np.random.default_rng(1).standard_normal(131).astype(np.float32) * 2
    draws = 8192
    wide = np.exp((logits - logits.max()).astype(np.float64) / given.get("temperature", 1.0))
    limits = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **{name: value for name, value in given.items() if name != "temperature"}}
    kept = np.asarray(run_restrict(jnp.asarray(wide[None], jnp.float32), knobs(1, **limits)))[0]
    assert_restricted(wide.astype(np.float32), kept, **limits)
    expected = np.where(kept > 0, wide, 0) / wide[kept > 0].sum() * draws

    counts = np.bincount(choose(logits, num_rows=draws, seeds=np.arange(draws), **given), minlength=131)

    assert not counts[expected == 0].any()
    common = expected >= 5
    pairs = [(counts[common], expected[common]), (counts[~common].sum(), expected[~common].sum())]
    chi_square = sum(np.sum((seen - wanted) ** 2 / np.maximum(wanted, 1)) for seen, wanted in pairs)
    assert chi_square < common.sum() + 4 * np.sqrt(2 * common.sum())


def test_seed_choice_and_position_all_give_different_numbers():
    seeds = [0, 1, -1, 2**32, 2**32 - 1, -(2**63), 2**63 - 1]
    everything = [(seed, choice, position) for seed in seeds for choice in range(3) for position in (1, 2, 3, 8191)]
    columns = list(zip(*everything, strict=True))

    found = np.asarray(uniforms(knobs(len(everything), seeds=columns[0], choices=columns[1], sample_positions=columns[2])))
    again = np.asarray(uniforms(knobs(len(everything), seeds=columns[0], choices=columns[1], sample_positions=columns[2])))

    assert len(set(found.tolist())) == len(everything)
    assert ((found >= 0) & (found < 1)).all()
    np.testing.assert_array_equal(found, again)


def test_successive_positions_of_one_seed_are_spread_evenly():
    found = np.asarray(uniforms(knobs(4096, seeds=12, sample_positions=np.arange(4096))))

    counts = np.histogram(found, bins=32, range=(0, 1))[0]
    assert np.sum((counts - 128) ** 2 / 128) < 32 + 4 * np.sqrt(64)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05


def test_greedy_takes_the_lowest_id_of_equal_logits_beside_rows_that_sample():
    logits = np.zeros(131, np.float32)
    logits[[40, 41, 130]] = 3

    chosen = choose(logits, num_rows=4, temperature=[0, 1, 0, 1], seeds=[1, 2, 3, 4])

    assert chosen[[0, 2]].tolist() == [40, 40]


def test_a_tiny_temperature_is_greedy_and_stays_finite():
    logits = np.random.default_rng(3).standard_normal((64, 131)).astype(np.float32) * 50

    chosen = choose(logits, num_rows=64, temperature=1e-6, seeds=np.arange(64))

    np.testing.assert_array_equal(chosen, logits.argmax(axis=-1))


def test_extreme_logits_are_sampled_without_overflow():
    logits = np.full((32, 131), -3e38, np.float32)
    logits[:, [5, 9]] = 3e38

    assert set(choose(logits, num_rows=32, seeds=np.arange(32)).tolist()) == {5, 9}


def filled_slots(vocab_size: int) -> SlotState:
    random = np.random.default_rng(8)
    counts = random.poisson(0.3, (3, vocab_size)).astype(np.int32)
    return SlotState(
        output_counts=jnp.asarray(counts),
        is_in_prompt=jnp.asarray(random.random((3, vocab_size)) < 0.2),
        bias=jnp.asarray(random.choice([0, 0, 2.5, -100], (3, vocab_size)).astype(np.float32)),
        is_end=jnp.asarray(random.random((3, vocab_size)) < 0.05),
        last_tokens=jnp.asarray(random.integers(0, vocab_size, 3).astype(np.int32)),
        masks=jnp.asarray(random.integers(-(2**31), 2**31, (3, -(-vocab_size // 32))).astype(np.int32)),
    )


def test_penalties_bias_and_mask_follow_their_formulas():
    vocab_size = 131
    state = filled_slots(vocab_size)
    logits = np.random.default_rng(9).standard_normal((4, vocab_size)).astype(np.float32) * 3
    slots = [2, 0, 1, 2]
    given = {
        "repetition_penalty": [1.0, 1.7, 0.6, 1.3],
        "frequency_penalty": [0.0, 0.5, -0.7, 2.0],
        "presence_penalty": [0.0, 1.1, -0.3, 2.0],
        "mask_end": [0, 1, 0, 1],
    }

    found = np.asarray(adjust(jnp.asarray(logits), state, knobs(4, slots=slots, **given)))

    for row, slot in enumerate(slots):
        counts = np.asarray(state.output_counts[slot])
        is_seen = (counts > 0) | np.asarray(state.is_in_prompt[slot])
        expected = logits[row].astype(np.float64)
        factor = given["repetition_penalty"][row]
        expected[is_seen] = np.where(expected > 0, expected / factor, expected * factor)[is_seen]
        expected -= given["frequency_penalty"][row] * counts + given["presence_penalty"][row] * (counts > 0)
        expected += np.asarray(state.bias[slot])
        expected[np.asarray(state.is_end[slot]) & bool(given["mask_end"][row])] = -np.inf
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def test_without_knobs_the_logits_pass_unchanged():
    logits = np.random.default_rng(9).standard_normal((2, 131)).astype(np.float32)

    found = adjust(jnp.asarray(logits), empty_slots(1, 131), knobs(2))

    np.testing.assert_array_equal(found, logits)


def test_end_tokens_are_never_chosen_while_masked():
    logits = np.zeros(131, np.float32)
    logits[[2, 50]] = 60
    state = empty_slots(2, 131)
    state = replace(state, is_end=state.is_end.at[1, jnp.asarray([2, 50])].set(True))

    chosen = choose(logits, state, num_rows=4, slots=[1, 1, 1, 0], mask_end=[1, 1, 0, 1], temperature=[0, 1, 0, 0], seeds=[1, 2, 3, 4])

    assert chosen[0] == 0
    assert chosen[1] not in (2, 50)
    assert chosen[[2, 3]].tolist() == [2, 2]


@pytest.mark.parametrize("vocab_size", [131, 131_072])
def test_logprobs_are_the_log_softmax_and_the_chosen_float_is_the_one_in_top(vocab_size: int):
    logits = np.random.default_rng(11).standard_normal((5, vocab_size)).astype(np.float32) * 4
    logits[4] = 0
    logits[3, 17] = logits[3, 90] = 40
    order = np.argsort(-logits, axis=-1, kind="stable")
    chosen = order[np.arange(5), [0, 3, 19, 1, 19]].astype(np.int32)

    found = jax.tree.map(np.asarray, jax.jit(logprobs_of, static_argnums=2)(jnp.asarray(logits), jnp.asarray(chosen), 20))

    wide = logits.astype(np.float64)
    expected = wide - wide.max(axis=-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=-1, keepdims=True))
    np.testing.assert_array_equal(found.top_ids, order[:, :20])
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order[:, :20], axis=-1), rtol=0, atol=2e-5)
    for row, token in enumerate(chosen):
        assert found.chosen[row] == found.top[row, found.top_ids[row].tolist().index(token)]


def write(state: SlotState, slot: int, *, is_first: bool, **columns: list[Any]) -> SlotState:
    """Enter `columns` of `SlotEntries`, padded to 256 tokens."""
    fills = {"ids": (-1, np.int32), "bias": (0, np.float32), "is_end": (0, bool), "is_in_prompt": (0, bool), "num_outputs": (0, np.int32)}
    arrays = {name: np.full(256, fill, dtype) for name, (fill, dtype) in fills.items()}
    for name, column in columns.items():
        arrays[name][: len(column)] = column
    return write_slot(state, jnp.int32(slot), jnp.asarray(is_first), SlotEntries(**{k: jnp.asarray(v) for k, v in arrays.items()}))


def test_taking_a_slot_resets_all_of_it_and_nothing_else():
    before = filled_slots(1000)
    biased = list(range(600, 1000))

    after = write(before, 1, is_first=True, ids=biased[:256], bias=[token / 10 for token in biased[:256]])
    after = write(after, 1, is_first=False, ids=biased[256:], bias=[token / 10 for token in biased[256:]])
    after = write(after, 1, is_first=False, ids=[2, 700], is_end=[True, True])

    assert not np.asarray(after.output_counts[1]).any()
    assert not np.asarray(after.is_in_prompt[1]).any()
    np.testing.assert_allclose(after.bias[1], np.where(np.arange(1000) >= 600, np.arange(1000) / 10, 0), rtol=1e-6)
    assert np.flatnonzero(after.is_end[1]).tolist() == [2, 700]
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one[np.array([0, 2])], other[np.array([0, 2])])


def test_a_slot_can_begin_with_tokens_that_were_seen_before():
    after = write(
        filled_slots(50),
        1,
        is_first=True,
        ids=[3, 9, 9, 12],
        is_in_prompt=[True, True, False, False],
        num_outputs=[0, 0, 2, 1],
    )

    assert np.flatnonzero(after.is_in_prompt[1]).tolist() == [3, 9]
    assert {token: int(after.output_counts[1, token]) for token in np.flatnonzero(after.output_counts[1])} == {9: 2, 12: 1}


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 131])
def test_only_tokens_of_the_mask_are_left_in_rows_that_have_one(vocab_size: int):
    logits = np.random.default_rng(3).standard_normal((4, vocab_size)).astype(np.float32)
    allowed = np.random.default_rng(4).random((3, vocab_size)) < 0.5
    state = empty_slots(3, vocab_size)
    words = np.stack([words_of(np.flatnonzero(row).tolist(), vocab_size=vocab_size) for row in allowed])
    masks = write_masks(state.masks, jnp.asarray([2, 0, 3, 1], jnp.int32), jnp.asarray(np.stack([*words[[2, 0]], words[0], words[1]])))

    found = adjust(jnp.asarray(logits), replace(state, masks=masks), knobs(4, slots=[0, 1, 2, 1], is_masked=[1, 1, 1, 0]))

    expected = np.stack([*np.where(allowed, logits[:3], -np.inf), logits[3]])
    np.testing.assert_array_equal(found, expected)


def test_masks_of_slots_that_do_not_exist_are_padding_and_the_others_stay():
    before = filled_slots(70).masks

    after = write_masks(before, jnp.asarray([3, 1, 3], jnp.int32), jnp.ones((3, 3), jnp.int32))

    np.testing.assert_array_equal(after, np.stack([before[0], np.ones(3, np.int32), before[2]]))


def test_a_masked_neighbour_changes_no_bit_of_a_row():
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((2, 300)), jnp.float32)
    state = replace(empty_slots(2, 300), masks=jnp.full((2, 10), 0x0F0F0F0F, jnp.int32))
    alone, beside = (
        run_choose_checked(logits, state, knobs(2, slots=[0, 1], temperature=0.7, top_p=0.9, seeds=[4, 5], is_masked=[0, is_masked]))
        for is_masked in (0, 1)
    )

    assert alone[0][0] == beside[0][0]
    assert int(beside[0][1]) % 8 < 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_overflows_fails_its_row_alone(temperature: float):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 300)), jnp.float32)
    state = empty_slots(2, 300)
    state = replace(state, is_in_prompt=jnp.ones_like(state.is_in_prompt))

    token_ids, is_sound = run_choose_checked(
        logits, state, knobs(2, temperature=temperature, repetition_penalty=np.array([1e-39, 1.1], np.float32))
    )

    assert is_sound.tolist() == [False, True]
    assert np.all(np.asarray(token_ids) < 300)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("field", ["mask_end", "is_masked"])
def test_a_row_whose_every_token_is_masked_fails(temperature: float, field: str):
    state = empty_slots(1, 10)
    state = replace(state, is_end=jnp.ones_like(state.is_end))

    token_ids, is_sound = run_choose_checked(jnp.zeros((1, 10)), state, knobs(1, temperature=temperature, **{field: 1}))

    assert is_sound.tolist() == [False]
    assert 0 <= int(token_ids[0]) < 10
