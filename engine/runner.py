"""ModelRunner: the weights, the cache and the compiled steps. Launching a step and collecting its result are two calls.

The one place that talks to the device. Cache and slot state are donated to every step and replaced by what it returns; a step that
failed has lost them, and so the runner with it. Programs are compiled ahead of use, one per bucket and kind; nothing else is ever called.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from engine.batch import TILE, Batch, StepKind, StepLayout
from engine.config import EngineConfig
from engine.model.params import Params
from engine.model.transformer import KVCache, LayerCache, forward, logits_of
from engine.ops import tiles
from engine.ops.tiles import map_rows, map_slices
from engine.sampling import (
    Knobs,
    Logprobs,
    SlotEntries,
    SlotState,
    choose_tokens,
    count_tokens,
    empty_slots,
    logprobs_of,
    remember_tokens,
    resolve_tokens,
    write_slot,
)
from engine.sharding import replicated, sharding_of
from engine.types import Progress, SamplingParams

SLOT_WRITE_LEN = 256  # tokens of a slot entered per call
_ENTRY_TYPES = (jnp.int32, jnp.float32, jnp.bool_, jnp.bool_, jnp.int32)  # of `SlotEntries`
SCORE_ROWS = 128  # positions whose logits exist at the same time, where a backend computes whole buckets


class StepOutput(NamedTuple):
    """Result of a step; S rows, T tokens. What its kind does not compute is None."""

    token_ids: Any  # int32 [S]
    is_finite: Any  # bool [S] False where the logits, raw or adjusted, are not finite numbers: that row has failed
    logprobs: Logprobs | None  # of the chosen tokens, [S]
    scores: Logprobs | None  # of `StepInput.targets`, [T]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DeviceState:
    """What lives on the device from step to step."""

    cache: KVCache
    slots: SlotState


def step_layouts(config: EngineConfig) -> tuple[StepLayout, ...]:
    """The buckets, smallest first. Where steps loop over tiles their real size decides the cost, and one small and one full bucket do.

    No bucket is a single tile: a loop over all there is would be simplified away, and its body compiled to other roundings.
    """
    smallest = 2 * TILE
    full_tokens = max(smallest, -(-config.scheduler.max_num_batched_tokens // TILE) * TILE)
    sizes = [smallest, full_tokens]
    if not tiles.loops_over_tiles():
        sizes = [smallest << n for n in range(full_tokens.bit_length()) if smallest << n < full_tokens] + [full_tokens]
    return tuple(
        StepLayout(num_tokens=size, num_seqs=min(size, config.scheduler.max_num_seqs), blocks_per_seq=config.max_blocks_per_seq)
        for size in sorted(set(sizes))
    )


def empty_cache(config: EngineConfig, mesh: Mesh) -> KVCache:
    """Zeroed keys and values for all layers; one block more than the pool has, the scratch block."""
    model = config.model
    shape = (config.cache.num_blocks + 1, config.cache.block_size, model.num_kv_heads, model.key_size)
    sharding = sharding_of(mesh, (None, None, "kv_heads", None))
    dtype = jnp.dtype(config.dtype)
    allocate = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return tuple(LayerCache(allocate(), allocate()) for _ in range(model.num_layers))


class ModelRunner:
    """Owns `params`, the device state and the compiled programs."""

    def __init__(self, config: EngineConfig, params: Params, mesh: Mesh):
        self.config = config
        self.params = params
        self.mesh = mesh
        self.layouts = step_layouts(config)
        self.num_cached_programs = 0
        self.num_late_compilations = 0
        slots = jax.device_put(empty_slots(config.scheduler.max_num_seqs, config.model.vocab_size), replicated(mesh))
        self._state = DeviceState(empty_cache(config, mesh), slots)
        self._steps: dict[tuple[StepLayout, StepKind], Callable[..., Any]] = {}
        self._write_slot: Callable[..., SlotState] | None = None

    def compile(self, report: Callable[[Progress], None]) -> int:
        """Compile every program, in parallel, or read it from the persistent compilation cache; returns how many there are."""
        jobs: dict[Future[bool], str] = {}
        with ThreadPoolExecutor() as threads:
            for layout in self.layouts:
                for kind in StepKind:
                    job = threads.submit(_is_cache_hit, partial(self._compile_step, layout, kind))
                    jobs[job] = f"step of {layout.num_tokens} tokens, {kind.name.lower()}"
            jobs[threads.submit(_is_cache_hit, self._compile_write_slot)] = "slot reset"
            for done, job in enumerate(as_completed(jobs), start=1):
                is_hit = job.result()
                self.num_cached_programs += is_hit
                detail = f"{jobs[job]}: {'from the cache' if is_hit else 'compiled'}"
                report(Progress(phase="compile", done=done, total=len(jobs), unit="programs", detail=detail))
        jax.monitoring.register_event_duration_secs_listener(self._count_late_compilation)
        return len(jobs)

    def warm_up(self) -> float:
        """Run the largest step once, reading and writing the scratch block alone; returns how many seconds it took."""
        layout = self.layouts[-1]
        packed = np.zeros(layout.packed_len, np.int32)
        step = layout.unpack(packed, lambda bits: bits.view(np.float32))
        num_tiles = layout.num_tokens // TILE
        step.counts[:] = layout.num_tokens, layout.num_seqs, num_tiles
        step.tile_places[:] = np.arange(layout.num_tokens)
        step.tile_starts[:num_tiles] = np.arange(num_tiles) * TILE
        step.tile_ends[:num_tiles] = TILE
        start = time.monotonic()
        batch = Batch(layout=layout, kind=StepKind.SCORE, packed=packed, items=(), num_sampled=0, token_starts=())
        self.collect(self.launch(batch))
        return time.monotonic() - start

    def reset_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        end_token_ids: tuple[int, ...],
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
    ) -> None:
        """Give a slot to a new sequence: its biases and end tokens entered, nothing counted but the tokens given here."""
        entries = [(token, bias, False, False, 0) for token, bias in sampling.logit_bias.items()]
        entries += [(token, 0.0, True, False, 0) for token in end_token_ids]
        entries += [(token, 0.0, False, True, 0) for token in set(prompt_token_ids)]
        entries += [(token, 0.0, False, False, count) for token, count in Counter(output_token_ids).items()]
        for start in range(0, max(1, len(entries)), SLOT_WRITE_LEN):
            columns = list(zip(*entries[start : start + SLOT_WRITE_LEN], strict=True)) or [()] * len(SlotEntries._fields)
            self._enter(slot, is_first=start == 0, columns=columns)

    def launch(self, batch: Batch) -> StepOutput:
        """Start a step, and the copying of its result to the host as soon as it is there; returns arrays still being computed."""
        self._state, output = self._steps[batch.layout, batch.kind](self.params, self._state, batch.packed)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return output

    def collect(self, output: StepOutput) -> StepOutput:
        """Wait for a launched step and bring its result to the host as NumPy arrays."""
        return jax.tree.map(np.asarray, output)

    def _enter(self, slot: int, *, is_first: bool, columns: Sequence[Sequence[Any]]) -> None:
        arrays = [np.full(SLOT_WRITE_LEN, fill, dtype) for fill, dtype in zip((-1, 0, 0, 0, 0), _ENTRY_TYPES, strict=True)]
        for array, column in zip(arrays, columns, strict=True):
            array[: len(column)] = column
        assert self._write_slot is not None, "compile() comes first"
        slots = self._write_slot(self._state.slots, np.int32(slot), np.bool_(is_first), SlotEntries(*arrays))
        self._state = DeviceState(self._state.cache, slots)

    def _compile_step(self, layout: StepLayout, kind: StepKind) -> None:
        def step(params: Params, state: DeviceState, packed: Any) -> tuple[DeviceState, StepOutput]:
            return run_step(params, state, packed, layout=layout, kind=kind, config=self.config)

        packed = jax.ShapeDtypeStruct((layout.packed_len,), jnp.int32, sharding=replicated(self.mesh))
        shardings = jax.tree.map(lambda array: array.sharding, self._state)
        jitted = jax.jit(step, donate_argnums=1, out_shardings=(shardings, replicated(self.mesh)))
        self._steps[layout, kind] = jitted.lower(self.params, self._state, packed).compile()

    def _compile_write_slot(self) -> None:
        def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

        entries = SlotEntries(*(shaped((SLOT_WRITE_LEN,), dtype) for dtype in _ENTRY_TYPES))
        arguments = (shaped((), jnp.int32), shaped((), bool), entries)
        jitted = jax.jit(write_slot, donate_argnums=0, out_shardings=replicated(self.mesh))
        self._write_slot = jitted.lower(self._state.slots, *arguments).compile()

    def _count_late_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG002
        if event.endswith("backend_compile_duration"):
            self.num_late_compilations += 1


class _CacheHits(threading.local):
    """How many programs the current thread read from the persistent compilation cache."""

    count = 0


_cache_hits = _CacheHits()


def _count_cache_hit(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.count += 1


jax.monitoring.register_event_listener(_count_cache_hit)


def _is_cache_hit(compile_one: Callable[[], None]) -> bool:
    """Compile a program in this thread; True if it came from the cache."""
    before = _cache_hits.count
    compile_one()
    return _cache_hits.count > before


def run_step(
    params: Params, state: DeviceState, packed: NDArray[np.int32], *, layout: StepLayout, kind: StepKind, config: EngineConfig
) -> tuple[DeviceState, StepOutput]:
    """One whole step on the device: forward pass, then a token for every row that wants one."""
    step = layout.unpack(packed, lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32))
    step = resolve_tokens(state.slots, step)
    hidden, cache = forward(params, state.cache, step, config.model)
    slots = state.slots if kind is StepKind.GREEDY else count_tokens(state.slots, step)
    with jax.named_scope("sample"):
        rows = jax.tree.map(lambda field: _pad_rows(field), (hidden[step.sample_at], Knobs.of(step)))
        chosen = map_rows(lambda x, knobs: _choose(params, slots, x, knobs, kind=kind, config=config), step.counts[1], *rows)
        token_ids, is_finite, logprobs = jax.tree.map(lambda field: field[: layout.num_seqs], chosen)
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
    return DeviceState(cache, remember_tokens(slots, step, token_ids)), StepOutput(token_ids, is_finite, logprobs, scores)


def num_top(config: EngineConfig) -> int:
    """How many of the likeliest tokens are reported."""
    return min(max(config.max_logprobs, 1), config.model.vocab_size)


def _choose(params: Params, slots: SlotState, x: Any, knobs: Knobs, *, kind: StepKind, config: EngineConfig) -> tuple[Any, Any, Any]:
    logits = logits_of(params, x, config.model)
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if kind is StepKind.GREEDY:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), is_finite, None
    token_ids, is_sound = choose_tokens(logits, slots, knobs)
    return token_ids, is_finite & is_sound, logprobs_of(logits, token_ids, num_top(config))


def _pad_rows(field: Any) -> Any:
    """Up to whole tiles."""
    return jnp.pad(field, [(0, -field.shape[0] % TILE)] + [(0, 0)] * (field.ndim - 1))
