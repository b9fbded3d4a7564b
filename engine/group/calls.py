"""The leader's calls of its runner, told to the followers before they are made, and made there in the same order.

Programs that span processes run where all of them launch the same ones in the same order. What a call does depends on its arguments and on
the calls before it alone, so that is all that travels: arguments as the core gives them, never a result. Knows no jax; a runner is whatever
fulfils `WarmRunner`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, StepKind
from engine.core import WarmRunner
from engine.errors import TransportError
from engine.group.messages import Call, Choose, Launch, ResetSlot, WarmUp, WriteMasks
from engine.types import SamplingParams

MASKS_AT_ONCE = 64  # told in one message
_INT32 = np.dtype("<i4")


class LeadingRunner:
    """A runner whose every call `send` is told first."""

    def __init__(self, runner: WarmRunner, *, replica: int, send: Callable[[Call], None]) -> None:
        self.layouts = runner.layouts
        self._runner = runner
        self._replica = replica
        self._send = send
        self._layout_ids = {layout: index for index, layout in enumerate(runner.layouts)}
        self._is_chosen = False  # what was launched last has chosen with it

    @property
    def num_late_compilations(self) -> int:
        return self._runner.num_late_compilations

    def warm_up(self) -> float:
        self._send(WarmUp(self._replica))
        return self._runner.warm_up()

    def reset_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        end_token_ids: tuple[int, ...],
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
    ) -> None:
        prompt, output = tuple(prompt_token_ids), tuple(output_token_ids)
        self._send(ResetSlot(self._replica, slot, sampling, end_token_ids, prompt, output))
        self._runner.reset_slot(slot, sampling, end_token_ids, prompt_token_ids=prompt, output_token_ids=output)

    def write_masks(self, masks: list[tuple[int, NDArray[np.int32]]]) -> None:
        for first in range(0, len(masks), MASKS_AT_ONCE):
            some = masks[first : first + MASKS_AT_ONCE]
            words = np.stack([words for _, words in some]).astype(_INT32).tobytes()
            self._send(WriteMasks(self._replica, tuple(slot for slot, _ in some), words))
            self._runner.write_masks(some)

    def launch(self, batch: Batch) -> Any:
        self._is_chosen = batch.kind is StepKind.GREEDY
        self._send(Launch(self._replica, self._layout_ids[batch.layout], batch.kind, batch.packed.astype(_INT32, copy=False).tobytes()))
        return self._runner.launch(batch)

    def choose(self, launched: Any, *, dropped: Sequence[int] = ()) -> Any:
        if not self._is_chosen:
            self._send(Choose(self._replica, tuple(dropped)))
        return self._runner.choose(launched, dropped=list(dropped))

    def is_done(self, output: Any) -> bool:
        return self._runner.is_done(output)

    def collect(self, output: Any) -> Any:
        """Nobody else needs to know the results."""
        return self._runner.collect(output)


class FollowingRunner:
    """A follower's runner of one replica; makes the calls of the leader's."""

    def __init__(self, runner: WarmRunner) -> None:
        self._runner = runner
        self._launched: Any = None

    def make(self, call: Call) -> None:
        """Raises `TransportError` for arguments that no leader of the same configuration gives."""
        runner = self._runner
        match call:
            case WarmUp():
                runner.warm_up()
            case ResetSlot():
                runner.reset_slot(
                    call.slot,
                    call.sampling,
                    call.end_token_ids,
                    prompt_token_ids=call.prompt_token_ids,
                    output_token_ids=call.output_token_ids,
                )
            case WriteMasks():
                words = np.frombuffer(call.words, _INT32).reshape(len(call.slots), -1)
                runner.write_masks(list(zip(call.slots, words, strict=True)))
            case Launch():
                self._launched = runner.launch(self._batch(call))
            case Choose():
                runner.choose(self._launched, dropped=list(call.dropped))
            case _:
                assert_never(call)

    def _batch(self, call: Launch) -> Batch:
        layouts = self._runner.layouts
        if not 0 <= call.layout < len(layouts) or len(call.packed) != _INT32.itemsize * layouts[call.layout].packed_len:
            raise TransportError("the leading process launched a step of a shape that this one has not")
        packed = np.frombuffer(call.packed, _INT32)
        return Batch(layout=layouts[call.layout], kind=StepKind(call.kind), packed=packed, items=(), num_sampled=0, token_starts=())
