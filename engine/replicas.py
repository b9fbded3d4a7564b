"""Replicas: one core per data shard, driven as if they were one.

A request goes to one of the cores and stays there. Slots are worth most: nobody waits for one while another core has one free. Then the
core with the least to do gets the request, what it would add included. A prefix that is there already adds nothing; one that is not counts
`PREFIX_WEIGHT` times, because whoever comes later with the same prefix would have to choose between the two. So the choices of one prompt
and prompts that begin alike meet where their prefix is, until that core has so much more to do than another that the prefix is worth having
twice. Where a request is computed changes when its tokens come, never which (on a GPU up to rounding between batch sizes).

Each core has a queue, a cache and grammar threads of its own, and shares its slots fairly among the tenants in it. As every tenant's
requests go where there is least to do, a tenant with many has them everywhere.

All cores live on the engine's one thread, which waits for none of them while several have work: it looks in turn what is done, gives each
device its next step, and sleeps a moment where nothing was. So the devices compute side by side, each at its own pace, with a step ahead of
the host. What is left of the others' company: the host's own work, which a device notices where it takes longer than a step.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from engine.core import EngineCore
from engine.errors import RequestError
from engine.prefix_cache import block_keys
from engine.types import EngineInfo, EngineStats, GenerationRequest, TokenDelta

PREFIX_WEIGHT = 2
POLL_S = 0.0002
MOST_EXPECTED_TOKENS = 256  # of output: a request may ask for far more than it will get


class _Load(NamedTuple):
    """What a request means to a core that takes it."""

    num_new_tokens: int  # not in the cache there, and not about to be
    num_output_tokens: int  # as far as can be expected
    keys: list[bytes]  # of the blocks that will be there


@dataclass(slots=True, kw_only=True, eq=False)
class _Replica:
    core: EngineCore
    num_open: int = 0  # requests
    num_open_tokens: int = 0  # to compute for these, as it was expected when they came
    open_keys: Counter[bytes] = field(default_factory=Counter[bytes])  # of blocks that are there for them, or will be

    def load_of(self, request: GenerationRequest, *, num_given: int, keys: list[bytes]) -> _Load:
        """Of a request that has been given some output already; `keys` are those of prompt and output."""
        cache, open_keys = self.core.cache, self.open_keys
        num_known = next((index for index, key in enumerate(keys) if key not in open_keys and key not in cache), len(keys))
        num_tokens = len(request.prompt_token_ids) + num_given
        num_output_tokens = min(request.sampling.max_tokens - num_given, MOST_EXPECTED_TOKENS)
        return _Load(num_tokens - num_known * cache.block_size, num_output_tokens, keys)

    def rank_of(self, load: _Load) -> tuple[bool, int]:
        """The lower, the sooner it gets this request."""
        is_full = self.num_open >= self.core.info.max_num_seqs
        return is_full, self.num_open_tokens + PREFIX_WEIGHT * load.num_new_tokens

    def add(self, load: _Load) -> None:
        self.num_open += 1
        self.num_open_tokens += load.num_new_tokens + load.num_output_tokens
        self.open_keys.update(load.keys)

    def remove(self, load: _Load) -> None:
        self.num_open -= 1
        self.num_open_tokens -= load.num_new_tokens + load.num_output_tokens
        for key in load.keys:
            self.open_keys[key] -= 1
            if not self.open_keys[key]:
                del self.open_keys[key]


class Replicas:
    """What `engine/__main__.py` drives in place of one core; the cores are alike, and nobody else's."""

    def __init__(self, cores: Sequence[EngineCore]) -> None:
        self.cores = tuple(cores)
        self.info = _combined([core.info for core in cores])
        self.on_begin: Callable[[list[str]], object] | None = None  # told, before a step of one core, which requests come in with it
        self._replicas = [_Replica(core=core) for core in cores]
        self._open: dict[str, tuple[_Replica, _Load]] = {}  # by request id
        for core in cores:
            core.on_begin = self._begin

    @property
    def has_work(self) -> bool:
        return any(core.has_work for core in self.cores)

    def submit(self, request: GenerationRequest, *, output_token_ids: tuple[int, ...] = (), num_scored_tokens: int = 0) -> bool:
        """Queue a request with one of the cores, as `EngineCore.submit` does. Raises `RequestError` for one that could never run in any."""
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id} is already running")
        self.cores[0].check(request, output_token_ids)
        token_ids = [*request.prompt_token_ids, *output_token_ids]
        keys = block_keys(token_ids, cache_salt=request.cache_salt, block_size=self.info.block_size)
        loads = [(replica, replica.load_of(request, num_given=len(output_token_ids), keys=keys)) for replica in self._replicas]
        replica, load = min(loads, key=lambda each: each[0].rank_of(each[1]))
        waits = replica.core.submit(request, output_token_ids=output_token_ids, num_scored_tokens=num_scored_tokens)
        replica.add(load)
        self._open[request.request_id] = replica, load
        return waits

    def abort(self, request_id: str) -> None:
        """Forget a request. Unknown ids have just finished and are no error."""
        if request_id in self._open:
            self._forget(request_id).core.abort(request_id)

    def step(self) -> list[TokenDelta]:
        """What the cores with work are through with, if anything. Raises what a core raises: the failure of one is that of all."""
        busy = [core for core in self.cores if core.has_work]
        if len(busy) == 1:
            deltas = busy[0].step()
        else:
            deltas = [delta for core in busy for delta in core.step(may_wait=False)]
            if not deltas:
                time.sleep(POLL_S)
        for delta in deltas:
            if delta.finish_reason is not None:
                self._forget(delta.request_id)
        return deltas

    def stats(self) -> EngineStats:
        """Sums over all cores, but for late compilations: each counts the process's since it was made, and the last was made last."""
        stats = [core.stats() for core in self.cores]
        sums = {each.name: sum(getattr(one, each.name) for one in stats) for each in fields(EngineStats)}
        return EngineStats(**sums | {"num_late_compilations": stats[-1].num_late_compilations})

    def _begin(self, request_ids: list[str]) -> None:
        if self.on_begin is not None:
            self.on_begin(request_ids)

    def _forget(self, request_id: str) -> _Replica:
        replica, load = self._open.pop(request_id)
        replica.remove(load)
        return replica


def _combined(infos: list[EngineInfo]) -> EngineInfo:
    """What all have together. A request is computed by one of them, so the longest is what fits its cache alone."""
    first = infos[0]
    summed = ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "num_devices", "weight_bytes", "num_programs", "num_cached_programs")
    return replace(
        first,
        max_model_len=min(first.max_model_len, first.num_blocks * first.block_size),
        step_s=sum(info.step_s for info in infos),  # where they share a processor, a turn takes that long
        **{name: sum(getattr(info, name) for info in infos) for name in summed},
    )
