"""Programs: everything that the engine runs on its devices, compiled before readiness and made from shapes alone.

The parts of a step (`engine/device_step.py`) exist once per bucket. Besides there are one program that resets a slot and one that enters
masks; nothing else is ever called. Because compiling needs no weights and no memory of the devices, it goes on beside the loading of the
weights, and a standby process can have it behind it (`engine/build.py`).
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engine.batch import TILE, StepKind, StepLayout
from engine.config import EngineConfig
from engine.device_step import Chosen, DeviceState, Forwarded, StepOutput, num_padded_rows, run_choice, run_forward, run_greedy
from engine.model.cache import KVCache, cache_shapes
from engine.model.params import Params
from engine.ops import tiles
from engine.sampling import Logprobs, SlotEntries, SlotState, empty_slots, write_masks, write_slot
from engine.sharding import num_cached_heads, on_mesh, replicated, sharding_of
from engine.types import Progress

SLOT_WRITE_LEN = 256  # tokens of a slot entered per call
MAX_MASK_ROWS = 64  # masks entered per call
ENTRY_TYPES = (jnp.int32, jnp.float32, jnp.bool_, jnp.bool_, jnp.int32)  # of `SlotEntries`

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


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


def state_shapes(config: EngineConfig, mesh: Mesh) -> DeviceState:
    """Shapes, types and places of the device state; the cache has one block more than the pool, the scratch block."""
    model = config.model
    slots = jax.eval_shape(lambda: empty_slots(config.scheduler.max_num_seqs, model.vocab_size))
    return DeviceState(
        cache=cache_shapes(config, num_heads=num_cached_heads(model, mesh.size), place=partial(sharding_of, mesh)),
        slots=jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=replicated(mesh)), slots),
    )


def shapes_of(arrays: Any) -> Any:
    """The same tree with the shape, type and place of every array."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), arrays)


def shardings_of(shapes: Any) -> Any:
    """The same tree with the place of every array."""
    return jax.tree.map(lambda field: field.sharding, shapes)


class Programs:
    """The compiled programs for weights of these shapes. `compile` comes first."""

    def __init__(self, config: EngineConfig, params: Params, mesh: Mesh) -> None:
        self.layouts = step_layouts(config)
        self.num_compiled = 0
        self.num_cached = 0  # of these, read from the persistent compilation cache
        self.greedy_steps: dict[StepLayout, Callable[..., tuple[DeviceState, StepOutput]]] = {}
        self.forwards: dict[tuple[StepLayout, StepKind], Callable[..., tuple[KVCache, Forwarded]]] = {}
        self.choices: dict[StepLayout, Callable[..., tuple[SlotState, Chosen]]] = {}
        self.write_slot: Callable[..., SlotState] | None = None
        self.write_masks: Callable[..., Any] | None = None
        self.num_mask_rows = min(MAX_MASK_ROWS, config.scheduler.max_num_seqs)  # that `write_masks` takes
        self._config = config
        self._params = params
        self._mesh = mesh
        self._state = state_shapes(config, mesh)
        self._lowering = threading.Lock()

    def fit(self, config: EngineConfig, params: Params, mesh: Mesh) -> bool:
        """Whether they can run with these."""
        return (self._config, self._mesh) == (config, mesh) and jax.tree.flatten(self._params) == jax.tree.flatten(params)

    def compile(self, report: Callable[[Progress], None]) -> None:
        """Compile every program, in parallel, or read it from the persistent compilation cache.

        Python traces one at a time anyway. Under the lock the first one is traced, and being read or compiled, while the others wait;
        without it all would be traced at the same time and read afterwards.
        """
        jobs: dict[Future[bool], str] = {}
        with ThreadPoolExecutor() as threads:
            for layout in self.layouts:
                jobs[threads.submit(_is_cache_hit, partial(self.compile_greedy, layout))] = f"step of {layout.num_tokens} tokens, greedy"
                for kind in (StepKind.SAMPLE, StepKind.SCORE):
                    job = threads.submit(_is_cache_hit, partial(self._compile_forward, layout, kind))
                    jobs[job] = f"step of {layout.num_tokens} tokens, {kind.name.lower()}"
                jobs[threads.submit(_is_cache_hit, partial(self._compile_choice, layout))] = f"choice for {layout.num_seqs} sequences"
            jobs[threads.submit(_is_cache_hit, self._compile_write_slot)] = "slot reset"
            jobs[threads.submit(_is_cache_hit, self._compile_write_masks)] = "masks"
            for done, job in enumerate(as_completed(jobs), start=1):
                is_hit = job.result()
                self.num_cached += is_hit
                detail = f"{jobs[job]}: {'from the cache' if is_hit else 'compiled'}"
                report(Progress(phase="compile", done=done, total=len(jobs), unit="programs", detail=detail))
        self.num_compiled = len(jobs)

    def compile_greedy(self, layout: StepLayout) -> None:
        """Enter one of `greedy_steps`."""

        def step(params: Params, state: DeviceState, packed: Any) -> tuple[DeviceState, StepOutput]:
            return run_greedy(params, state, packed, layout=layout, config=self._config)

        state, each = shardings_of(self._state), replicated(self._mesh)
        results = (state, StepOutput(each, each, None, None))
        self.greedy_steps[layout] = self._compiled(step, self._params, self._state, self._packed(layout), results=results)

    def _compile_forward(self, layout: StepLayout, kind: StepKind) -> None:
        def forward(params: Params, cache: KVCache, slots: SlotState, packed: Any) -> tuple[KVCache, Forwarded]:
            return run_forward(params, cache, slots, packed, layout=layout, kind=kind, config=self._config)

        cache, each = shardings_of(self._state.cache), replicated(self._mesh)
        results = (cache, Forwarded(each, Logprobs(each, each, each) if kind is StepKind.SCORE else None))
        arguments = (self._params, self._state.cache, self._state.slots, self._packed(layout))
        self.forwards[layout, kind] = self._compiled(forward, *arguments, results=results)

    def _compile_choice(self, layout: StepLayout) -> None:
        def choose(params: Params, slots: SlotState, rows: Any, packed: Any, is_dropped: Any) -> tuple[SlotState, Chosen]:
            return run_choice(params, slots, rows, packed, is_dropped, layout=layout, config=self._config)

        rows = self._shaped((num_padded_rows(layout.num_seqs), self._config.model.emb_size), self._params.embedding.dtype)
        is_dropped = self._shaped((layout.num_seqs,), bool)
        slots, each = shardings_of(self._state.slots), replicated(self._mesh)
        arguments = (self._params, self._state.slots, rows, self._packed(layout), is_dropped)
        self.choices[layout] = self._compiled(choose, *arguments, results=(slots, Chosen(each, each, Logprobs(each, each, each))))

    def _compiled(self, function: Callable[..., Any], *arguments: Any, results: Any) -> Callable[..., Any]:
        """`function` on all devices; its second argument is donated, and becomes the first result."""
        jitted = jax.jit(on_mesh(function, self._mesh, arguments=arguments, results=results), donate_argnums=1, out_shardings=results)
        with self._lowering:
            lowered = jitted.lower(*arguments)
        return lowered.compile()

    def _packed(self, layout: StepLayout) -> jax.ShapeDtypeStruct:
        return self._shaped((layout.packed_len,), jnp.int32)

    def _compile_write_slot(self) -> None:
        entries = SlotEntries(*(self._shaped((SLOT_WRITE_LEN,), dtype) for dtype in ENTRY_TYPES))
        jitted = jax.jit(write_slot, donate_argnums=0, out_shardings=replicated(self._mesh))
        with self._lowering:
            lowered = jitted.lower(self._state.slots, self._shaped((), jnp.int32), self._shaped((), bool), entries)
        self.write_slot = lowered.compile()

    def _compile_write_masks(self) -> None:
        masks = self._state.slots.masks
        slots = self._shaped((self.num_mask_rows,), jnp.int32)
        words = self._shaped((self.num_mask_rows, masks.shape[1]), jnp.int32)
        jitted = jax.jit(write_masks, donate_argnums=0, out_shardings=replicated(self._mesh))
        with self._lowering:
            lowered = jitted.lower(masks, slots, words)
        self.write_masks = lowered.compile()

    def _shaped(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self._mesh))


class _CacheHits(threading.local):
    """How many programs the current thread read from the persistent compilation cache."""

    count = 0


_cache_hits = _CacheHits()


def _count_cache_hit(event: str, **_: str | int) -> None:
    if event == _CACHE_HIT:
        _cache_hits.count += 1


jax.monitoring.register_event_listener(_count_cache_hit)


def _is_cache_hit(compile_one: Callable[[], None]) -> bool:
    """Compile a program in this thread; True if it came from the cache."""
    before = _cache_hits.count
    compile_one()
    return _cache_hits.count > before
