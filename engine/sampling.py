"""Logits to tokens and log-probabilities, all on the device.

Nothing here sorts the vocabulary. Top-k and top-p find their threshold by bisecting the ordered bits of the float32 values, which is
exact for any k and any distribution; equal values at the threshold are kept in the order of their ids, as a stable sort would. One uniform
number per token, a function of (seed, choice, position) only, is looked up in the cumulative distribution.

The order: repetition, frequency and presence penalties, bias, end-token mask, mask of allowed tokens, temperature, min-p, top-k, top-p.
Log-probabilities are the log-softmax of the logits before any of these.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.batch import StepInput
from engine.shapes import Array, Bool, Float32, Int32

CDF_BLOCK = 128  # tokens per block of the two-level cumulative sum
WORD_BITS = 32  # tokens per word of a mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SlotState:
    """What sampling remembers of each running sequence, one row per slot; a row is reset whole when a sequence takes the slot."""

    output_counts: Any  # int32 [slots, V] how often each token was generated
    is_in_prompt: Any  # bool [slots, V]
    bias: Any  # float32 [slots, V] added to the logits
    is_end: Any  # bool [slots, V] tokens that end the sequence
    last_tokens: Any  # int32 [slots] chosen by the last step that chose one
    masks: Any  # int32 [slots, V / 32] a bit per token that may be chosen, the lowest first; counts where the step says so


class Knobs(NamedTuple):
    """The sampling fields of `StepInput` for some rows."""

    slots: Any
    sample_positions: Any
    choices: Any
    seeds: Any
    top_k: Any
    mask_end: Any
    is_masked: Any
    temperature: Any
    top_p: Any
    min_p: Any
    presence_penalty: Any
    frequency_penalty: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, step: StepInput) -> "Knobs":
        return cls(*(getattr(step, name) for name in cls._fields))


class Logprobs(NamedTuple):
    """Log-probability of one given token per row, and the likeliest tokens."""

    chosen: Any  # float32 [rows]
    top_ids: Any  # int32 [rows, num_top]
    top: Any  # float32 [rows, num_top]


def empty_slots(num_slots: int, vocab_size: int) -> SlotState:
    """State of slots that nobody took yet."""
    shape = (num_slots, vocab_size)
    return SlotState(
        output_counts=jnp.zeros(shape, jnp.int32),
        is_in_prompt=jnp.zeros(shape, bool),
        bias=jnp.zeros(shape, jnp.float32),
        is_end=jnp.zeros(shape, bool),
        last_tokens=jnp.zeros(num_slots, jnp.int32),
        masks=jnp.zeros((num_slots, -(-vocab_size // WORD_BITS)), jnp.int32),
    )


class SlotEntries(NamedTuple):
    """What is entered for some tokens of a slot; ids of -1 are padding."""

    ids: Any  # int32 [m]
    bias: Any  # float32 [m] added to what is there
    is_end: Any  # bool [m]
    is_in_prompt: Any  # bool [m]
    num_outputs: Any  # int32 [m] added to what is there


def write_slot(state: SlotState, slot: Int32[Array, ""], is_first: Bool[Array, ""], entries: SlotEntries) -> SlotState:
    """Reset a slot (with `is_first`) and enter something for some tokens."""
    index = jnp.where(entries.ids < 0, state.bias.shape[1], entries.ids)
    keep = jnp.logical_not(is_first)
    return SlotState(
        output_counts=state.output_counts.at[slot].set(
            jnp.where(keep, state.output_counts[slot], 0).at[index].add(entries.num_outputs, mode="drop")
        ),
        is_in_prompt=state.is_in_prompt.at[slot].set((state.is_in_prompt[slot] & keep).at[index].max(entries.is_in_prompt, mode="drop")),
        bias=state.bias.at[slot].set(jnp.where(keep, state.bias[slot], 0.0).at[index].add(entries.bias, mode="drop")),
        is_end=state.is_end.at[slot].set((state.is_end[slot] & keep).at[index].max(entries.is_end, mode="drop")),
        last_tokens=state.last_tokens,
        masks=state.masks,
    )


def write_masks(masks: Int32[Array, "slots w"], slots: Int32[Array, "m"], words: Int32[Array, "m w"]) -> Int32[Array, "slots w"]:
    """Enter the masks of some slots; a slot that does not exist is padding."""
    return masks.at[slots].set(words, mode="drop")


def resolve_tokens(state: SlotState, step: StepInput) -> StepInput:
    """The step with its pending token ids filled in."""
    pending = state.last_tokens[step.slots[step.token_rows]]
    return step._replace(token_ids=jnp.where(step.token_ids < 0, pending, step.token_ids))


def remember_tokens(state: SlotState, step: StepInput, token_ids: Int32[Array, "s"], *, is_dropped: Bool[Array, "s"]) -> SlotState:
    """Keep what the step's rows chose, for the next step to start from."""
    chooses = (jnp.arange(step.slots.shape[0], dtype=jnp.int32) < step.counts[1]) & ~is_dropped
    slots = jnp.where(chooses, step.slots, state.last_tokens.shape[0])
    return replace(state, last_tokens=state.last_tokens.at[slots].set(token_ids, mode="drop"))


def count_tokens(state: SlotState, step: StepInput, *, is_dropped: Bool[Array, "s"]) -> SlotState:
    """Enter the step's own tokens, which are the newest of their sequences."""
    num_slots = state.bias.shape[0]
    is_real = (jnp.arange(step.token_ids.shape[0], dtype=jnp.int32) < step.counts[0]) & ~is_dropped[step.token_rows]
    slots = jnp.where(is_real, step.slots[step.token_rows], num_slots)
    is_output = step.is_output > 0
    return replace(
        state,
        output_counts=state.output_counts.at[slots, step.token_ids].add(step.is_output, mode="drop"),
        is_in_prompt=state.is_in_prompt.at[slots, step.token_ids].max(~is_output, mode="drop"),
    )


def log_normalizer(logits: Float32[Array, "rows v"]) -> Float32[Array, "rows"]:
    """log of the sum of exp."""
    highest = jnp.max(logits, axis=-1)
    return highest + jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1))


def logprobs_of(logits: Float32[Array, "rows v"], token_ids: Int32[Array, "rows"], num_top: int) -> Logprobs:
    """Log-softmax at `token_ids` and at the `num_top` largest logits; the same token has the same float in both."""
    normalizer = log_normalizer(logits)
    top, top_ids = jax.lax.top_k(logits, num_top)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)[:, 0]
    return Logprobs(chosen - normalizer, top_ids.astype(jnp.int32), top - normalizer[:, None])


def choose_tokens(logits: Float32[Array, "rows v"], state: SlotState, knobs: Knobs) -> tuple[Int32[Array, "rows"], Bool[Array, "rows"]]:
    """The next token of every row, and whether it means something.

    It does not where the adjusted logits hold a NaN or a positive infinity, or leave no token at all (extreme penalties, everything
    masked): such a row has failed, and its token is merely some id below the vocabulary's size.
    """
    adjusted = adjust(logits, state, knobs)
    is_sound = jnp.isfinite(jnp.max(adjusted, axis=-1)) & ~jnp.any(jnp.isnan(adjusted), axis=-1)
    adjusted = jnp.where(is_sound[:, None], adjusted, 0.0)
    is_greedy = knobs.temperature <= 0
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, "rows"]:
        temperature = jnp.where(is_greedy, 1.0, knobs.temperature)
        # Subtracting first keeps tiny temperatures finite.
        scaled = (adjusted - jnp.max(adjusted, axis=-1, keepdims=True)) / temperature[:, None]
        weights = restrict(jnp.exp(scaled), knobs)
        return look_up(weights, uniforms(knobs))

    return jnp.where(is_greedy, greedy, jax.lax.cond(jnp.all(is_greedy), lambda: greedy, draw)), is_sound


def adjust(logits: Float32[Array, "rows v"], state: SlotState, knobs: Knobs) -> Float32[Array, "rows v"]:
    """Logits after penalties, bias, end-token mask and the mask of allowed tokens."""
    counts = state.output_counts[knobs.slots]
    is_seen = (counts > 0) | state.is_in_prompt[knobs.slots]
    repetition = knobs.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(is_seen, penalized, logits)
    logits = logits - knobs.frequency_penalty[:, None] * counts.astype(jnp.float32)
    logits = logits - jnp.where(counts > 0, knobs.presence_penalty[:, None], 0.0)
    logits = logits + state.bias[knobs.slots]
    logits = jnp.where(state.is_end[knobs.slots] & (knobs.mask_end > 0)[:, None], -jnp.inf, logits)
    is_masked = knobs.is_masked > 0

    def mask() -> Float32[Array, "rows v"]:
        places = jnp.arange(WORD_BITS, dtype=jnp.int32)[None, None, :]
        bits = (state.masks[knobs.slots][:, :, None] >> places) & 1
        is_allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] > 0
        return jnp.where(is_allowed | ~is_masked[:, None], logits, -jnp.inf)

    return jax.lax.cond(jnp.any(is_masked), mask, lambda: logits)


def restrict(weights: Float32[Array, "rows v"], knobs: Knobs) -> Float32[Array, "rows v"]:
    """Unnormalised probabilities (the largest is 1) with everything outside min-p, top-k and top-p set to zero."""
    vocab_size = weights.shape[1]
    weights = jnp.where(weights >= knobs.min_p[:, None], weights, 0.0)
    uses_top_k = (knobs.top_k > 0) & (knobs.top_k < vocab_size)
    top_k = jnp.where(uses_top_k, knobs.top_k, vocab_size)
    weights = jax.lax.cond(jnp.any(uses_top_k), lambda: keep_top_k(weights, top_k), lambda: weights)
    uses_top_p = knobs.top_p < 1
    top_p = jnp.where(uses_top_p, knobs.top_p, 2.0)
    return jax.lax.cond(jnp.any(uses_top_p), lambda: keep_top_p(weights, top_p), lambda: weights)


def keep_top_k(weights: Float32[Array, "rows v"], top_k: Int32[Array, "rows"]) -> Float32[Array, "rows v"]:
    """Zero all but the `top_k` largest of each row."""

    def reaches(threshold: Int32[Array, "rows"]) -> Bool[Array, "rows"]:
        return jnp.sum(_bits(weights) >= threshold[:, None], axis=-1, dtype=jnp.int32) >= top_k

    threshold = _highest(reaches, weights.shape[0])
    num_above = jnp.sum(_bits(weights) > threshold[:, None], axis=-1, dtype=jnp.int32)
    return _keep(weights, threshold, num_equal=top_k - num_above)


def keep_top_p(weights: Float32[Array, "rows v"], top_p: Float32[Array, "rows"]) -> Float32[Array, "rows v"]:
    """Zero all but the smallest set of largest weights whose share of the row's sum reaches `top_p`; above 1 keeps everything."""
    goal = top_p * jnp.sum(weights, axis=-1)

    def mass(is_in: Bool[Array, "rows v"]) -> Float32[Array, "rows"]:
        return jnp.sum(jnp.where(is_in, weights, 0.0), axis=-1)

    def reaches(threshold: Int32[Array, "rows"]) -> Bool[Array, "rows"]:
        return mass(_bits(weights) >= threshold[:, None]) >= goal

    threshold = _highest(reaches, weights.shape[0])
    missing = goal - mass(_bits(weights) > threshold[:, None])
    value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    num_equal = jnp.where(value > 0, jnp.ceil(missing / value), jnp.float32(weights.shape[1]))
    num_equal = jnp.clip(num_equal, 1.0, jnp.float32(weights.shape[1])).astype(jnp.int32)
    return _keep(weights, threshold, num_equal=num_equal)


def _bits(weights: Float32[Array, "rows v"]) -> Int32[Array, "rows v"]:
    """Non-negative floats in the order of their bits."""
    return jax.lax.bitcast_convert_type(weights, jnp.int32)


def _highest(reaches: Any, num_rows: int) -> Int32[Array, "rows"]:
    """The largest bit pattern from 0 to that of 1.0 for which `reaches` holds, 0 if none; `reaches` falls from true to false."""

    def halve(
        _: Int32[Array, ""], bounds: tuple[Int32[Array, "rows"], Int32[Array, "rows"]]
    ) -> tuple[Int32[Array, "rows"], Int32[Array, "rows"]]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        is_reached = reaches(middle)
        return jnp.where(is_reached, middle, low), jnp.where(is_reached, high, middle - 1)

    one = 0x3F800000
    return jax.lax.fori_loop(0, 30, halve, (jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, one, jnp.int32)))[0]


def _keep(
    weights: Float32[Array, "rows v"], threshold: Int32[Array, "rows"], *, num_equal: Int32[Array, "rows"]
) -> Float32[Array, "rows v"]:
    """Keep what lies above the threshold and the first `num_equal` of what equals it."""
    bits = _bits(weights)
    is_equal = bits == threshold[:, None]
    rank = jnp.cumsum(is_equal, axis=-1, dtype=jnp.int32)
    return jnp.where((bits > threshold[:, None]) | (is_equal & (rank <= num_equal[:, None])), weights, 0.0)


def uniforms(knobs: Knobs) -> Float32[Array, "rows"]:
    """One number in [0, 1) per row, from its seed, choice and position alone."""

    def one(seed: Int32[Array, "2"], choice: Int32[Array, ""], position: Int32[Array, ""]) -> Float32[Array, ""]:
        key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, choice), position))

    return jax.vmap(one)(knobs.seeds, knobs.choices, knobs.sample_positions)


def look_up(weights: Float32[Array, "rows v"], uniform: Float32[Array, "rows"]) -> Int32[Array, "rows"]:
    """The token at which the cumulative sum of `weights`, in the order of ids, first exceeds `uniform` times the whole sum.

    A token of weight zero is never chosen. Two levels: sums of blocks, then inside one block.
    """
    num_rows, vocab_size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab_size % CDF_BLOCK))).reshape(num_rows, -1, CDF_BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    goal = uniform * ends[:, -1]
    block = _first_or_last(ends > goal[:, None], sums > 0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)
    place = _first_or_last(before + jnp.cumsum(inside, axis=-1) > goal[:, None], inside > 0)
    return block * CDF_BLOCK + place


def _first_or_last(is_past: Bool[Array, "rows n"], has_weight: Bool[Array, "rows n"]) -> Int32[Array, "rows"]:
    """Index of the first entry with weight that is past the goal; where rounding left none, of the last entry with weight."""
    is_candidate = is_past & has_weight
    last = has_weight.shape[1] - 1 - jnp.argmax(has_weight[:, ::-1], axis=-1)
    return jnp.where(jnp.any(is_candidate, axis=-1), jnp.argmax(is_candidate, axis=-1), last).astype(jnp.int32)
