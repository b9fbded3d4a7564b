"""Known bugs, each a small change to the source of the real code, to show that the simulation would catch it.

A bug replaces one piece of a function's source by another, for as long as a context lasts. Where the piece is not there any more, planting
fails and says so: the bug has to be written anew for the code as it is.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType

from engine import core, prefix_cache
from engine.batch import Batcher
from engine.block_pool import BlockPool
from engine.client import RemoteEngineClient
from engine.core import EngineCore
from engine.engine_loop import EngineLoop
from engine.fair_queue import FairQueue
from engine.journal import Journal
from engine.prefix_cache import PrefixCache
from engine.quarantine import Quarantine
from engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Change:
    """In the source of `owner.function`, `right` becomes `wrong`."""

    owner: type | ModuleType
    function: str
    right: str
    wrong: str


FORGET_TO_COMPARE = Change(PrefixCache, "lookup", "entry.tokens != tokens or entry.parent != parent or ", "")

BUGS: dict[str, tuple[Change, ...]] = {
    "blocks are given back twice": (
        Change(
            Scheduler,
            "_release",
            "self.pool.give_back(sequence.block_ids)",
            "self.pool.give_back([*sequence.block_ids, *sequence.block_ids[:1]])",
        ),
    ),
    "a shared block is freed by the first who leaves": (Change(BlockPool, "give_back", "if num_holders > 1:", "if num_holders > 2:"),),
    "an abort leaks the blocks": (
        Change(
            EngineCore,
            "abort",
            "self._end(sequence)",
            "sequence.slot is None and self._end(sequence)\n        self._sequences.pop(request_id, None)",
        ),
    ),
    "a held block is evicted": (Change(BlockPool, "share", "del self._cached[block]", "pass"),),
    "an evicted block is still found": (Change(BlockPool, "_evict", "if self.on_evict:", "if False:"),),
    "a block is found before it is computed": (
        Change(PrefixCache, "insert", "min(sequence.num_computed_tokens, len(sequence.token_ids))", "len(sequence.token_ids)"),
    ),
    "the hash forgets the parent": (
        Change(prefix_cache, "_child", "sha256(parent + array", "sha256(array"),
        FORGET_TO_COMPARE,
    ),
    "the hash forgets the salt": (Change(prefix_cache, "_root", "data = salt.encode()", "data = b''"),),
    "the hash is weak and tokens are not compared": (
        Change(prefix_cache, "_child", ".digest()", ".digest()[:1]"),
        FORGET_TO_COMPARE,
    ),
    "a found block gives the scores of other tokens": (
        Change(
            PrefixCache,
            "_can_score",
            "return targets.tolist() == sequence.token_ids[unsent.start + 1 : unsent.stop + 1]",
            "return len(targets) == len(unsent)",
        ),
    ),
    "admission counts found blocks as free that it takes": (
        Change(Scheduler, "_fits", "sum(self.pool.is_held(block) for block in hit)", "len(hit)"),
    ),
    "a hit of the whole prompt leaves nothing to compute": (
        Change(Scheduler, "_start", "min(sequence.num_shared_tokens, num_tokens - 1)", "sequence.num_shared_tokens"),
    ),
    "a hit of the whole prompt is not shared to its last token": (
        Change(Scheduler, "_start", "= len(hit) * self.block_size", "= min(len(hit) * self.block_size, num_tokens - 1)"),
    ),
    "the last token of a hit is written into the shared block": (
        Change(Batcher, "_fill_tokens", "positions < self._rows.num_shared_tokens", "positions + 1 < self._rows.num_shared_tokens"),
    ),
    "a slot is not reset when its sequence comes back": (
        Change(
            EngineCore,
            "_launch",
            "for sequence in schedule.admitted:",
            "for sequence in (each for each in schedule.admitted if not each.num_preemptions):",
        ),
    ),
    "penalties forget the tokens of a hit": (Change(EngineCore, "_reset_slot", "if sampling.has_penalties else 0", "if False else 0"),),
    "a slot keeps the mask of its last sequence": (Change(EngineCore, "_reset_slot", "self._masks.pop(sequence.slot, None)", "pass"),),
    "a row chooses before its last token is known": (
        Change(EngineCore, "_launch", "any(self._is_undecided(item) for item in batch.items)", "False"),
    ),
    "a pending token is lost on preemption": (
        Change(EngineCore, "_commit", "if sequence.is_over or", "if sequence.is_over or sequence.slot is None or"),
    ),
    "a sequence is not left to the host": (
        Change(Scheduler, "_go_on", "(sequence.needs_host or start + 1 >= sequence.max_len)", "start + 1 >= sequence.max_len"),
    ),
    "a token after the last one is computed": (
        Change(Scheduler, "_go_on", "(sequence.needs_host or start + 1 >= sequence.max_len)", "sequence.needs_host"),
    ),
    "cached tokens are counted at every admission": (
        Change(
            Scheduler,
            "_start",
            "self.running.append(sequence)",
            "sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)\n    self.running.append(sequence)",
        ),
    ),
    "a token that was thrown away is told": (
        Change(
            EngineCore,
            "_commit",
            "if sequence.is_over or",
            "if (sequence.is_over and sequence.request.request_id in self._sequences) or",
        ),
    ),
    "the end is told twice": (
        Change(
            EngineCore,
            "step",
            "self._commit(collected)",
            "[each for delta in self._commit(collected) for each in (delta,) * (1 + (delta.finish_reason is not None))]",
        ),
    ),
    "the oldest is preempted": (Change(Scheduler, "_extend", "self.running.pop()", "self.running.pop(0)"),),
    "preemptions have no bound": (Change(Scheduler, "_fits", "if sequence.num_preemptions < MAX_PREEMPTIONS:", "if True:"),),
    "who yields a slot keeps its rank": (Change(Scheduler, "_yield", "sequence.rank = None", "pass"),),
    "newcomers overtake the preempted": (
        Change(
            Scheduler,
            "_next",
            "self._preempted[-1] if self._preempted else self._newcomers.head()",
            "self._newcomers.head() or (self._preempted[-1] if self._preempted else None)",
        ),
    ),
    "the clock of fairness stands still": (
        Change(FairQueue, "advance_clock", "max(self._clock, (total - num_open) // count)", "self._clock"),
    ),
    "the clock of fairness runs for who is first alone": (
        Change(FairQueue, "advance_clock", "max(self._clock, (total - num_open) // count)", "max(self._clock, finish - num_open)"),
    ),
    "the clock of fairness goes back": (Change(FairQueue, "advance_clock", "max(self._clock, (total", "max(0, (total"),),
    "who yielded pays again": (Change(FairQueue, "_refund", "tenant.charge -=", "_ ="),),
    "what left the queue still counts as waiting": (Change(FairQueue, "_take_out", "tenant.backlog -= _size(sequence)", "pass"),),
    "no step is launched ahead": (
        Change(Scheduler, "_go_on", "num_pending and (sequence.needs_host or start + 1 >= sequence.max_len)", "num_pending"),
    ),
    "what failed can still be found": (Change(Scheduler, "remove", "if discard:", "if False:"),),
    "a tenant pays for ever": (Change(Scheduler, "remove", "self._newcomers.settle(sequence)", "pass"),),
    "a later deadline hides an earlier one": (
        Change(EngineCore, "submit", "min(self._next_deadline_s, request.deadline_s)", "request.deadline_s"),
    ),
    "deadlines are not kept while no engine runs": (
        Change(
            Journal,
            "_expiry_s",
            "return deadline_s if entry.request.request_id in self._held else",
            "return math.inf if entry.request.request_id in self._held else",
        ),
    ),
    "an abort is not passed on": (Change(RemoteEngineClient, "_abandon", "self._abort([entry.request.request_id])", "pass"),),
    "a death loses what the engine had": (Change(Journal, "engine_died", "self._held = dict(self._entries)", "pass"),),
    "a replay repeats a token": (Change(Journal, "_submit", "tuple(entry.output_token_ids)", "tuple(entry.output_token_ids[:-1])"),),
    "a replay loses a token that was not read yet": (
        Change(
            Journal,
            "engine_died",
            "self._held = dict(self._entries)",
            "self._held = dict(self._entries)\n    for entry in had:\n        entry.reader._deltas.clear()",
        ),
    ),
    "a replay repeats prompt scores": (Change(Journal, "_submit", "entry.num_scored_tokens)", "0)"),),
    "a replay of the last token is refused": (
        Change(
            core, "check_request", "if len(output_token_ids) >= max(1, num_output):", "if len(output_token_ids) >= max(1, num_output - 1):"
        ),
    ),
    "quarantine convicts the first of a group": (Change(Quarantine, "engine_died", "if suspects and self._is_alone:", "if suspects:"),),
    "quarantine never convicts": (Change(Quarantine, "engine_died", "if suspects and self._is_alone:", "if False:"),),
    "suspicion comes one death late": (
        Change(Quarantine, "engine_died", "self._num_deaths[request_id] >= MAX_DEATHS", "self._num_deaths[request_id] > MAX_DEATHS"),
    ),
    "a suspect who left is tried": (
        Change(Quarantine, "forget", "if (kept := [other for other in group if other != request_id])", "if (kept := group)"),
    ),
    "progress does not clear a request": (Change(Quarantine, "engine_died", "for request_id in cleared:", "for request_id in ():"),),
    "a request that begins behind others is not told of": (Change(EngineLoop, "_begin", "if begun:", "if False:"),),
    "a request that has begun once is trusted for ever": (Change(Journal, "_submit", "entry.is_queued = False", "pass"),),
    "a suspect that died beside others is convicted": (
        Change(Quarantine, "next_group", "self._is_alone = self._is_fresh_engine and len(self._on_trial) == 1", "self._is_alone = True"),
    ),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug of this name is in the code, in this process."""
    with ExitStack() as stack:
        for change in BUGS[name]:
            stack.enter_context(_changed(change))
        yield


@contextmanager
def _changed(change: Change) -> Iterator[None]:
    original = vars(change.owner)[change.function]
    source = textwrap.dedent(inspect.getsource(original))
    if source.count(change.right) != 1:
        raise LookupError(f"{change.function} has no single {change.right!r}; plant the bug anew for the code as it is:\n{source}")
    namespace: dict[str, object] = {}
    # The project's own source with one piece replaced: a bug inside a function cannot be planted by a subclass.
    exec(compile(source.replace(change.right, change.wrong), f"<{change.function} with a bug>", "exec"), original.__globals__, namespace)
    setattr(change.owner, change.function, namespace[change.function])
    try:
        yield
    finally:
        setattr(change.owner, change.function, original)
