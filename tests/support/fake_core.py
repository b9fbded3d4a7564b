"""A core without a model for tests of processes and messages: every generation repeats its prompt, a token per step.

A token depends on its position alone, so a generation that is submitted with what it has given already goes on exactly. Prompts are scored
`SCORES_PER_STEP` positions a step, where that is asked for. Some prompts misbehave: `REFUSED`, `CRASHING` and `HANGING` as first token do
what they say, and `CRASHING_LATER` crashes at every step from its 20th token on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from engine.config import EngineOptions, ModelConfig, SchedulerConfig
from engine.errors import RequestError
from engine.types import EngineInfo, EngineStats, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

REFUSED, CRASHING, HANGING, CRASHING_LATER = 501, 502, 503, 504
SCORES_PER_STEP = 3

TINY_MODEL = ModelConfig(
    vocab_size=512,
    sequence_len=256,
    emb_size=64,
    key_size=16,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=2,
    num_experts=4,
    num_selected_experts=2,
    ffn_size=128,
    embedding_multiplier_scale=1.0,
    output_multiplier_scale=1.0,
    attn_output_multiplier=1.0,
)


def engine_options() -> EngineOptions:
    """Options of a small engine whose files nobody reads."""
    return EngineOptions(model=TINY_MODEL, model_dir="", scheduler=SchedulerConfig(max_model_len=256))


def options_info(options: EngineOptions) -> EngineInfo:
    """What an engine with these options tells about itself."""
    config = options.resolve(backend="cpu", free_bytes=1 << 24)
    return EngineInfo(
        vocab_size=options.model.vocab_size,
        max_model_len=options.scheduler.max_model_len,
        max_num_seqs=options.scheduler.max_num_seqs,
        max_num_batched_tokens=options.scheduler.max_num_batched_tokens,
        max_logprobs=options.max_logprobs,
        block_size=options.block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        backend="cpu",
        num_devices=1,
        num_params=1000,
        weight_bytes=4000,
        num_programs=1,
        load_s=0.0,
        compile_s=0.0,
    )


def request(request_id: str, *prompt: int, max_tokens: int = 4) -> GenerationRequest:
    """A greedy request for `max_tokens` tokens."""
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=prompt or (7, 8, 9), sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )


@dataclass(slots=True)
class Generation:
    """How far a request has come."""

    request: GenerationRequest
    num_output_tokens: int
    num_scored_tokens: int


class FakeCore:
    """Fulfils `engine.engine_loop.Core`. `step_s` is how long a step takes; the first `max_num_seqs` take part in it."""

    def __init__(self, info: EngineInfo, *, step_s: float = 0.0) -> None:
        self.info = info
        self.num_steps = 0
        self.on_begin: Callable[[list[str]], object] | None = None
        self._step_s = step_s
        self._running: dict[str, Generation] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def submit(self, request: GenerationRequest, *, output_token_ids: Sequence[int] = (), num_scored_tokens: int = 0) -> bool:
        prompt = request.prompt_token_ids
        if prompt[0] == REFUSED:
            raise RequestError("this prompt is refused")
        expected = [prompt[at % len(prompt)] for at in range(len(output_token_ids))]
        if list(output_token_ids) != expected:
            raise RuntimeError(f"{request.request_id} goes on after {output_token_ids}, which it cannot have given")
        self._running[request.request_id] = Generation(request, len(output_token_ids), num_scored_tokens)
        return True

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def step(self) -> list[TokenDelta]:
        self.num_steps += 1
        time.sleep(self._step_s)
        running = list(islice(self._running.values(), self.info.max_num_seqs))
        if self.on_begin is not None:
            self.on_begin([generation.request.request_id for generation in running])
        deltas = [self._advance(generation) for generation in running]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._running[delta.request_id]
        return deltas

    def stats(self) -> EngineStats:
        num_running = min(len(self._running), self.info.max_num_seqs)
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._running) - num_running,
            num_blocks_used=len(self._running),
            num_blocks=64,
            num_steps=self.num_steps,
        )

    def _advance(self, generation: Generation) -> TokenDelta:
        """The next scores of the prompt while there are some, then the next token."""
        request, prompt = generation.request, generation.request.prompt_token_ids
        if prompt[0] == CRASHING or (prompt[0] == CRASHING_LATER and generation.num_output_tokens >= 20):
            raise RuntimeError("this prompt crashes the engine")
        if prompt[0] == HANGING:
            time.sleep(3600)
        first, num_scores = generation.num_scored_tokens, 0 if request.sampling.prompt_logprobs is None else len(prompt) - 1
        if first < num_scores:
            generation.num_scored_tokens = min(first + SCORES_PER_STEP, num_scores)
            scores = tuple(TokenLogprob(token_id=token, logprob=-0.25) for token in prompt[1:][first : generation.num_scored_tokens])
            return TokenDelta(request_id=request.request_id, prompt_logprobs=scores)
        if request.sampling.max_tokens == 0:
            return TokenDelta(request_id=request.request_id, finish_reason=FinishReason.LENGTH)
        token = prompt[generation.num_output_tokens % len(prompt)]
        generation.num_output_tokens += 1
        return TokenDelta(
            request_id=request.request_id,
            token_ids=(token,),
            logprobs=() if request.sampling.logprobs is None else (TokenLogprob(token_id=token, logprob=-0.5),),
            finish_reason=FinishReason.LENGTH if generation.num_output_tokens >= request.sampling.max_tokens else None,
        )
