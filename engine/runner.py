"""ModelRunner: the weights and the device state, and the calls of the compiled steps. Launching a step, choosing its tokens and
collecting them are three calls.

The one place that talks to the device. Cache and slot state are donated to every step and replaced by what it returns; a step that
failed has lost them, and so the runner with it. What it calls was compiled before, see `engine/programs.py`.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from engine.batch import TILE, Batch, StepKind
from engine.config import EngineConfig
from engine.device_step import DeviceState, StepOutput
from engine.model.params import Params
from engine.programs import ENTRY_TYPES, SLOT_WRITE_LEN, Programs, shardings_of, state_shapes
from engine.sampling import SlotEntries
from engine.types import SamplingParams


def empty_state(config: EngineConfig, mesh: Mesh) -> DeviceState:
    """A cache of zeros and slots that nobody took yet, each made where it lives."""
    shapes = state_shapes(config, mesh)
    return jax.jit(lambda: jax.tree.map(lambda field: jnp.zeros(field.shape, field.dtype), shapes), out_shardings=shardings_of(shapes))()


class Launched(NamedTuple):
    """A step whose tokens are not chosen yet, or were as part of it."""

    batch: Batch
    rows: Any  # what the choice starts from; None where it is made already
    output: StepOutput


class ModelRunner:
    """Owns `params` and the device state."""

    def __init__(self, config: EngineConfig, params: Params, mesh: Mesh, programs: Programs):
        self.config = config
        self.params = params
        self.mesh = mesh
        self.layouts = programs.layouts
        self.num_late_compilations = 0
        self._programs = programs
        self._state = empty_state(config, mesh)
        jax.monitoring.register_event_duration_secs_listener(self._count_late_compilation)

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
        self.collect(self.choose(self.launch(batch)))
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

    def write_masks(self, masks: Sequence[tuple[int, NDArray[np.int32]]]) -> None:
        """Enter which tokens may be chosen in some slots, from the next step on that says so: (slot, a bit per token) each."""
        assert self._programs.write_masks is not None, "the programs are compiled first"
        num_slots, num_words = self._state.slots.masks.shape
        num_rows = self._programs.num_mask_rows
        for first in range(0, len(masks), num_rows):
            chunk = masks[first : first + num_rows]
            slots, words = np.full(num_rows, num_slots, np.int32), np.zeros((num_rows, num_words), np.int32)
            slots[: len(chunk)] = [slot for slot, _ in chunk]
            words[: len(chunk)] = [row for _, row in chunk]
            entered = self._programs.write_masks(self._state.slots.masks, slots, words)
            self._state = DeviceState(self._state.cache, replace(self._state.slots, masks=entered))

    def launch(self, batch: Batch) -> Launched:
        """Start a step up to its choice of tokens, which is `choose`; returns arrays still being computed."""
        if batch.kind is StepKind.GREEDY:
            self._state, output = self._programs.greedy_steps[batch.layout](self.params, self._state, batch.packed)
            return Launched(batch, None, _copied(output))
        forward = self._programs.forwards[batch.layout, batch.kind]
        cache, (rows, scores) = forward(self.params, self._state.cache, self._state.slots, batch.packed)
        self._state = DeviceState(cache, self._state.slots)
        return Launched(batch, rows, StepOutput(None, None, None, _copied(scores)))

    def choose(self, launched: Launched, *, dropped: Sequence[int] = ()) -> StepOutput:
        """Let the rows of a launched step choose, but for the dropped ones; copies to the host begin as soon as results are there.

        A dropped row's result means nothing, and nothing that it computed is remembered but its keys and values.
        """
        batch, rows, output = launched
        if rows is None:
            return output
        is_dropped = np.zeros(batch.layout.num_seqs, bool)
        is_dropped[list(dropped)] = True
        choice = self._programs.choices[batch.layout]
        slots, chosen = choice(self.params, self._state.slots, rows, batch.packed, is_dropped)
        self._state = DeviceState(self._state.cache, slots)
        token_ids, is_finite, logprobs = _copied(chosen)
        return StepOutput(token_ids, is_finite, logprobs, output.scores)

    def is_done(self, output: StepOutput) -> bool:
        """Whether `collect` would not wait."""
        return all(array.is_ready() for array in jax.tree.leaves(output))

    def collect(self, output: StepOutput) -> StepOutput:
        """Wait for a launched step and bring its result to the host as NumPy arrays."""
        return jax.tree.map(np.asarray, output)

    def _enter(self, slot: int, *, is_first: bool, columns: Sequence[Sequence[Any]]) -> None:
        arrays = [np.full(SLOT_WRITE_LEN, fill, dtype) for fill, dtype in zip((-1, 0, 0, 0, 0), ENTRY_TYPES, strict=True)]
        for array, column in zip(arrays, columns, strict=True):
            array[: len(column)] = column
        assert self._programs.write_slot is not None, "the programs are compiled first"
        slots = self._programs.write_slot(self._state.slots, np.int32(slot), np.bool_(is_first), SlotEntries(*arrays))
        self._state = DeviceState(self._state.cache, slots)

    def _count_late_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG002
        if event.endswith("backend_compile_duration"):
            self.num_late_compilations += 1


def _copied(output: Any) -> Any:
    """The same arrays, on their way to the host."""
    for array in jax.tree.leaves(output):
        array.copy_to_host_async()
    return output
