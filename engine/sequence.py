"""Sequence: one running generation and all that the engine remembers of it on the host.

There is no prefill phase and no decode phase: `num_computed_tokens` catches up with `num_tokens`, and whenever it has, the step's result
is the next token. The engine runs one step ahead, so the newest token may still be on the device: it is counted as pending, and its id is
unknown here until its step is collected. Owned by `EngineCore` and its one thread.
"""

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from engine.prompt_scores import BlockScores, ScoreCollector
from engine.types import GenerationRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one generation."""

    request: GenerationRequest
    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)  # tokens it has when it ends by length
    arrival: int  # order of arrival
    token_ids: list[int]  # prompt, then output; without the pending token
    num_pending_tokens: int = 0  # chosen by launched steps that are not collected yet: 0 or 1, and 2 while a step is launched ahead
    num_computed_tokens: int = 0  # leading tokens whose keys and values are in the cache once all launched steps are done
    block_ids: MutableSequence[int] = field(default_factory=lambda: array("i"))  # grows at the end only, until all are given back
    block_keys: list[bytes] = field(default_factory=list[bytes])  # prefix-cache keys of the leading full blocks, as far as computed
    num_shared_tokens: int = 0  # leading tokens in blocks found in the prefix cache: they are read, never written
    slot: int | None = None  # row of the device's per-sequence state, while running
    rank: int | None = None  # order of admission: the smaller, the older; None before, and after it yielded
    num_preemptions: int = 0  # for want of blocks
    num_yields: int = 0  # gave its slot to another tenant
    num_foreseen_tokens: int = 0  # it is expected to have in the end, as its tenant pays for it
    num_paid_tokens: int = 0  # of these, when it last yielded
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_scored_tokens: int = 0  # prompt log-probabilities already sent
    cached_scores: tuple[BlockScores, ...] = ()  # of the blocks found at the last admission, from that of position `num_scored_tokens` on
    score_collector: ScoreCollector | None = None  # for the prefix cache, where the prompt is scored
    needs_host: bool = False  # between two tokens: it is not scheduled while one is pending
    is_over: bool = False  # finished or aborted; what a launched step still computes for it is thrown away

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.max_len = self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def num_tokens(self) -> int:
        """Including the pending one."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Including the pending one."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return self.num_tokens - self.num_computed_tokens
