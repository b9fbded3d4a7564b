"""Sequence: one running generation and all that the engine remembers of it on the host.

There is no prefill phase and no decode phase: `num_computed_tokens` catches up with `num_tokens`, and whenever it has, the step's result
is the next token. Owned by `EngineCore` and its one thread.
"""

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from engine.types import GenerationRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one generation."""

    request: GenerationRequest
    arrival: int  # order of arrival; the smaller, the older
    token_ids: list[int]  # prompt, then output
    num_computed_tokens: int = 0  # leading tokens whose keys and values are in the cache
    block_ids: MutableSequence[int] = field(default_factory=lambda: array("i"))  # grows at the end only, until all are given back
    slot: int | None = None  # row of the device's per-sequence sampling state, while running
    num_scored_tokens: int = 0  # prompt log-probabilities already sent
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_len(self) -> int:
        """Tokens this sequence has when it ends by length."""
        return self.num_prompt_tokens + self.request.sampling.max_tokens
