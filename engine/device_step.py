"""What the devices do in a step: the forward pass, and the choice of tokens behind it. Pure functions, which `engine/programs.py` compiles.

A greedy step is one program. Any other is two, the forward pass and the choice of tokens, so that masks which depend on the step before
may be entered while the forward pass runs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from engine.batch import TILE, StepInput, StepKind, StepLayout
from engine.config import EngineConfig
from engine.model.cache import KVCache
from engine.model.params import Params
from engine.model.transformer import forward, logits_of
from engine.ops import tiles
from engine.ops.tiles import map_rows, map_slices
from engine.sampling import Knobs, Logprobs, SlotState, choose_tokens, count_tokens, logprobs_of, remember_tokens, resolve_tokens

CHOOSE_BYTES = 1 << 20  # of one array over the vocabulary while tokens are chosen, where a backend loops over tiles
SCORE_ROWS = 128  # positions whose logits exist at the same time, where a backend computes whole buckets


class StepOutput(NamedTuple):
    """Result of a step; S rows, T tokens. What its kind does not compute is None."""

    token_ids: Any  # int32 [S]
    is_finite: Any  # bool [S] False where the logits, raw or adjusted, are not finite numbers: that row has failed
    logprobs: Logprobs | None  # of the chosen tokens, [S]
    scores: Logprobs | None  # of `StepInput.targets`, [T]


class Forwarded(NamedTuple):
    """Result of a forward pass."""

    rows: Any  # [S padded, D] what the choice starts from
    scores: Logprobs | None


class Chosen(NamedTuple):
    """Result of a choice, as in `StepOutput`."""

    token_ids: Any
    is_finite: Any
    logprobs: Logprobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DeviceState:
    """What lives on the device from step to step."""

    cache: KVCache
    slots: SlotState


def run_greedy(
    params: Params, state: DeviceState, packed: NDArray[np.int32], *, layout: StepLayout, config: EngineConfig
) -> tuple[DeviceState, StepOutput]:
    """One whole step on the device: forward pass, then the likeliest token for every row that wants one."""
    cache, (rows, _) = run_forward(params, state.cache, state.slots, packed, layout=layout, kind=StepKind.GREEDY, config=config)
    step = _unpack(packed, layout)

    def choose(x: Any) -> tuple[Any, Any]:
        logits = logits_of(params, x, config.model)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.all(jnp.isfinite(logits), axis=-1)

    with jax.named_scope("sample"):
        token_ids, is_finite = (field[: layout.num_seqs] for field in map_rows(choose, step.counts[1], rows))
    slots = remember_tokens(state.slots, step, token_ids, is_dropped=jnp.zeros(layout.num_seqs, bool))
    return DeviceState(cache, slots), StepOutput(token_ids, is_finite, None, None)


def run_forward(
    params: Params,
    cache: KVCache,
    slots: SlotState,
    packed: NDArray[np.int32],
    *,
    layout: StepLayout,
    kind: StepKind,
    config: EngineConfig,
) -> tuple[KVCache, Forwarded]:
    """The forward pass, and the scores of prompt tokens where they are asked for."""
    step = resolve_tokens(slots, _unpack(packed, layout))
    hidden, cache = forward(params, cache, step, config.model)
    scores = None
    if kind is StepKind.SCORE:
        with jax.named_scope("score"):
            scores = map_slices(
                lambda x, targets: logprobs_of(logits_of(params, x, config.model), targets, num_top(config)),
                step.counts[0],
                hidden,
                step.targets,
                slice_len=SCORE_ROWS,
            )
    return cache, Forwarded(_pad_rows(hidden[step.sample_at]), scores)


def run_choice(
    params: Params,
    slots: SlotState,
    rows: Any,
    packed: NDArray[np.int32],
    is_dropped: Any,
    *,
    layout: StepLayout,
    config: EngineConfig,
) -> tuple[SlotState, Chosen]:
    """A token for every row that wants one and is not dropped; what a dropped row computed counts as if it had not been."""
    step = resolve_tokens(slots, _unpack(packed, layout))
    slots = count_tokens(slots, step, is_dropped=is_dropped)
    with jax.named_scope("sample"):
        knobs = jax.tree.map(_pad_rows, Knobs.of(step))
        chosen = map_rows(lambda x, knobs: _choose(params, slots, x, knobs, config=config), step.counts[1], rows, knobs)
        token_ids, is_finite, logprobs = jax.tree.map(lambda field: field[: layout.num_seqs], chosen)
    return remember_tokens(slots, step, token_ids, is_dropped=is_dropped), Chosen(token_ids, is_finite, logprobs)


def _unpack(packed: NDArray[np.int32], layout: StepLayout) -> StepInput:
    return layout.unpack(packed, lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32))


def num_top(config: EngineConfig) -> int:
    """How many of the likeliest tokens are reported."""
    return min(max(config.max_logprobs, 1), config.model.vocab_size)


def _choose(params: Params, slots: SlotState, x: Any, knobs: Knobs, *, config: EngineConfig) -> tuple[Any, Any, Logprobs]:
    logits = logits_of(params, x, config.model)

    def choose(logits: Any, knobs: Knobs) -> tuple[Any, Any, Any]:
        token_ids, is_sound = choose_tokens(logits, slots, knobs)
        return token_ids, is_sound, logprobs_of(logits, token_ids, num_top(config))

    token_ids, is_sound, logprobs = tiles.in_slices(choose, logits, knobs, slice_len=_choose_rows(config.model.vocab_size))
    return token_ids, jnp.all(jnp.isfinite(logits), axis=-1) & is_sound, logprobs


def _choose_rows(vocab_size: int) -> int:
    """Rows of a tile whose tokens are chosen together: a power of two, so that half a dozen arrays over the vocabulary stay small."""
    num_rows = max(1, min(TILE, CHOOSE_BYTES // (4 * vocab_size)))
    return 1 << (num_rows.bit_length() - 1)


def num_padded_rows(num_rows: int) -> int:
    """Up to whole tiles, at least two: XLA drops the loop over a single one, and then rounds differently and sorts for the top entries."""
    return max(2 * TILE, num_rows + -num_rows % TILE)


def _pad_rows(field: Any) -> Any:
    return jnp.pad(field, [(0, num_padded_rows(field.shape[0]) - field.shape[0])] + [(0, 0)] * (field.ndim - 1))
