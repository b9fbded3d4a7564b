"""The values that travel between server and engine: all frozen, all plain Python.

A client's request becomes one `GenerationRequest` per prompt and choice. The engine answers each with a run of `TokenDelta`, the last
of which, and only the last, has a finish reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a generation ended. An aborted generation has no reason: nobody is listening."""

    STOP = "stop"  # an end token, or (decided outside the engine) a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ERROR = "error"  # this generation failed alone, e.g. non-finite logits
    GRAMMAR = "grammar"  # its grammar went past its limits, does not compile, or leaves no token to choose
    DEADLINE = "deadline"  # its time is up


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; defaults are OpenAI's. Validated before construction, see `server/preprocess.py`."""

    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means all
    min_p: float = 0.0
    seed: int = 0  # any int64; a request without one is given one at entry
    max_tokens: int = 16  # 0: only compute the prompt
    min_tokens: int = 0  # end tokens are masked before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    allowed_token_ids: tuple[int, ...] = ()  # only these may be chosen; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that must not come about
    logprobs: int | None = None  # top entries per generated token; 0 gives the chosen token's alone
    prompt_logprobs: int | None = None  # the same for every prompt token but the first

    @property
    def has_penalties(self) -> bool:
        """True if tokens that came before change the choice."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and one choice. `prompt_token_ids` is never empty; its ids are below the model's vocabulary size."""

    request_id: str  # made by the server, unique in its life
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0  # index among the choices of this prompt; part of the randomness
    arrival_s: float = 0.0  # monotonic clock of the front end
    deadline_s: float | None = None  # the same clock
    tenant: str = ""  # opaque; tenants share the engine fairly
    priority: int = 0  # within the tenant; the higher goes first
    cache_salt: str = ""  # requests find each other's cached prefixes only under the same salt
    grammar: str | None = None  # what the text must match, in the form of `engine/grammar.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-softmax of the model's float32 logits (before temperature, penalties, bias and masks) at one position.

    `top` holds (token id, logprob) in falling order; the chosen token need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenDelta(NamedTuple):
    """What one step added to one generation. A tuple, not a dataclass: hundreds are made in every step, at a quarter of the cost.

    `prompt_logprobs` holds the entries for the prompt positions that became known since the last delta, in order; the first prompt token
    has none and is not in the list, so all deltas of a scored prompt of n tokens hold n - 1 entries together.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token id when the request asked for logprobs, else empty
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when the generation first ran; the same in all its deltas


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a start has come, for a progress bar, a log line or `/readyz`."""

    phase: str  # "load" or "compile"
    done: int
    total: int
    unit: str  # what done and total count: "bytes", "programs"
    detail: str = ""  # the item just finished: a tensor, a program
    tensors_done: int = 0  # where done and total are bytes
    tensors_total: int = 0
    elapsed_s: float = 0.0  # since the phase began; 0 where nobody measures

    @property
    def percent(self) -> float:
        return 100 * self.done / self.total if self.total else 0.0

    @property
    def per_second(self) -> float | None:
        """So many of its units, over all of its time so far."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate."""
        return (self.total - self.done) / self.per_second if self.per_second else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a ready engine tells about itself; the ranges that requests are validated against."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    block_size: int
    num_blocks: int
    dtype: str
    kv_dtype: str  # of the cache
    backend: str  # "cpu", "gpu"
    num_devices: int
    num_params: int
    weight_bytes: int
    num_programs: int  # compiled before readiness
    num_cached_programs: int = 0  # of these, read from the persistent compilation cache
    step_s: float = 0.0  # how long the largest step takes, measured before readiness
    load_s: float
    compile_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges and running totals after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0  # held by running sequences
    num_blocks_cached: int = 0  # held by nobody, kept for the prefix cache
    num_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_lookup_tokens: int = 0  # prompt tokens looked up in the prefix cache
    num_hit_tokens: int = 0  # of these, found
    num_late_compilations: int = 0  # after readiness; stays 0
