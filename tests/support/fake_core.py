"""A core without a model for tests of processes and messages: every generation repeats its prompt, a token per step.

Some prompts misbehave: `REFUSED`, `CRASHING` and `HANGING` as first token do what they say.
"""

import time
from collections import deque

from engine.config import EngineOptions, ModelConfig, SchedulerConfig
from engine.errors import RequestError
from engine.types import EngineInfo, EngineStats, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

REFUSED, CRASHING, HANGING = 501, 502, 503

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


class FakeCore:
    """Fulfils `engine.__main__.Core`. `step_s` is how long a step takes."""

    def __init__(self, info: EngineInfo, *, step_s: float = 0.0) -> None:
        self.info = info
        self.num_steps = 0
        self._step_s = step_s
        self._running: dict[str, tuple[GenerationRequest, deque[int]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def submit(self, request: GenerationRequest) -> None:
        first = request.prompt_token_ids[0]
        if first == REFUSED:
            raise RequestError("this prompt is refused")
        prompt, count = request.prompt_token_ids, request.sampling.max_tokens
        self._running[request.request_id] = (request, deque(prompt[at % len(prompt)] for at in range(count)))

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def step(self) -> list[TokenDelta]:
        self.num_steps += 1
        time.sleep(self._step_s)
        deltas: list[TokenDelta] = []
        for request_id, (submitted, tokens) in list(self._running.items()):
            if submitted.prompt_token_ids[0] == CRASHING:
                raise RuntimeError("this prompt crashes the engine")
            if submitted.prompt_token_ids[0] == HANGING:
                time.sleep(3600)
            token = tokens.popleft()
            finish = None if tokens else FinishReason.LENGTH
            if not tokens:
                del self._running[request_id]
            logprobs = () if submitted.sampling.logprobs is None else (TokenLogprob(token_id=token, logprob=-0.5),)
            deltas.append(TokenDelta(request_id=request_id, token_ids=(token,), logprobs=logprobs, finish_reason=finish))
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._running), num_blocks_used=len(self._running), num_blocks=64, num_steps=self.num_steps)
