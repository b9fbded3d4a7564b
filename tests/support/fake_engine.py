"""An `EngineClient` without an engine: it follows a script, and remembers what was asked of it.

A script is what one generation does, in order: a `TokenDelta` is handed out, a number is a pause in seconds, an exception is raised, and
`HANG` waits until the generation is aborted, its deadline passes or the engine dies. `counting_script` is the default: it answers every
request with as many tokens as it asks for, whose ids depend only on prompt, seed, choice and position, with log-probabilities where asked.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from engine.config import ModelConfig
from engine.errors import NoEngineError, RequestError
from engine.types import EngineInfo, EngineStats, FinishReason, GenerationRequest, Progress, TokenDelta, TokenLogprob

HANG = float("inf")
VOCAB_SIZE = 420  # that of tests/support/tiny_tokenizer.py

Script = Iterable[TokenDelta | float | Exception]
ScriptFor = Callable[[GenerationRequest], Script]


def engine_info(*, vocab_size: int = VOCAB_SIZE, max_model_len: int = 256, max_num_seqs: int = 64) -> EngineInfo:
    """What a small engine on a CPU would tell about itself."""
    return EngineInfo(
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=128,
        max_logprobs=20,
        block_size=16,
        num_blocks=1024,
        dtype="float32",
        kv_dtype="float32",
        backend="cpu",
        num_devices=1,
        num_params=1_000_000,
        weight_bytes=4_000_000,
        num_programs=3,
        load_s=0.1,
        compile_s=0.2,
    )


def tiny_config() -> ModelConfig:
    """A configuration that fits `engine_info()`; nothing computes with it."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        sequence_len=256,
        emb_size=8,
        key_size=2,
        num_q_heads=2,
        num_kv_heads=1,
        num_layers=1,
        num_experts=2,
        num_selected_experts=1,
        ffn_size=8,
        embedding_multiplier_scale=1.0,
        output_multiplier_scale=1.0,
        attn_output_multiplier=1.0,
    )


def fake_logprob(token_id: int, *, top: int, vocab_size: int) -> TokenLogprob:
    """A log-probability that depends on the token alone; the token itself is the likeliest, its successors follow."""
    best = -0.125 - (token_id % 7) / 8
    return TokenLogprob(
        token_id=token_id,
        logprob=best,
        top=tuple(((token_id + rank) % vocab_size, best - rank) for rank in range(top)),
    )


def counting_script(request: GenerationRequest, *, vocab_size: int = VOCAB_SIZE) -> list[TokenDelta]:
    """One token per delta up to `max_tokens`, with the log-probabilities the request asks for, then `LENGTH`."""
    sampling = request.sampling
    prompt_logprobs = (
        ()
        if sampling.prompt_logprobs is None
        else tuple(fake_logprob(token, top=sampling.prompt_logprobs, vocab_size=vocab_size) for token in request.prompt_token_ids[1:])
    )
    if sampling.max_tokens == 0:
        return [TokenDelta(request_id=request.request_id, prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.LENGTH)]
    start = sum(request.prompt_token_ids) + sampling.seed + 31 * request.choice
    deltas = []
    for position in range(sampling.max_tokens):
        token = 330 + (start + 7 * position) % (vocab_size - 330)
        logprobs = () if sampling.logprobs is None else (fake_logprob(token, top=sampling.logprobs, vocab_size=vocab_size),)
        deltas.append(TokenDelta(request_id=request.request_id, token_ids=(token,), logprobs=logprobs))
    deltas[0] = deltas[0]._replace(prompt_logprobs=prompt_logprobs)
    deltas[-1] = deltas[-1]._replace(finish_reason=FinishReason.LENGTH)
    return deltas


def tokens_script(*tokens: int, finish: FinishReason = FinishReason.STOP, pause_s: float = 0.0) -> ScriptFor:
    """Answer every request with these tokens, one per delta, `pause_s` before each."""

    def script(request: GenerationRequest) -> list[TokenDelta | float | Exception]:
        steps: list[TokenDelta | float | Exception] = []
        for position, token in enumerate(tokens):
            last = position == len(tokens) - 1
            logprobs = (
                () if request.sampling.logprobs is None else (fake_logprob(token, top=request.sampling.logprobs, vocab_size=VOCAB_SIZE),)
            )
            delta = TokenDelta(request_id=request.request_id, token_ids=(token,), logprobs=logprobs, finish_reason=finish if last else None)
            steps += [pause_s, delta] if pause_s else [delta]
        return steps

    return script


@dataclass(kw_only=True)
class FakeEngineClient:
    """Follows `script` for every request; `pause_s` passes before each delta.

    `refusal` makes the engine refuse every request with that message. `die()` ends it: open generations pause, new ones wait, and all go on
    with their scripts at `revive()`; deadlines pass meanwhile. `give_up()` ends open generations with `NoEngineError`, and every later
    one. All may be called from any thread.
    """

    script: ScriptFor = counting_script
    pause_s: float = 0.0
    info: EngineInfo | None = field(default_factory=engine_info)
    progress: Progress | None = None
    refusal: str | None = None
    is_ready: bool = True
    num_held: int = 0
    num_restarts: int = 0
    base_stats: EngineStats = field(default_factory=lambda: EngineStats(num_blocks=1024))
    submitted: list[GenerationRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    _open: dict[str, "_Wakeup"] = field(default_factory=dict)
    _is_over: bool = False

    @property
    def stats(self) -> EngineStats:
        """`base_stats` with the open generations as running."""
        return replace(self.base_stats, num_running=len(self._open), num_blocks_used=len(self._open))

    @property
    def num_open(self) -> int:
        """Generations that are neither finished nor aborted."""
        return len(self._open)

    def die(self) -> None:
        """End the engine process, as a crash would."""
        self.is_ready = False

    def revive(self) -> None:
        """Be ready again, with all that was open."""
        self.is_ready = True
        self.num_restarts += 1
        self._wake_all()

    def give_up(self) -> None:
        """Never be ready again."""
        self.is_ready = False
        self._is_over = True
        self._wake_all()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Submit at the first step of the iteration; leaving before the last delta is an abort."""
        self.submitted.append(request)
        if self._is_over or self.info is None:
            raise NoEngineError("there is no engine")
        if self.refusal is not None:
            raise RequestError(self.refusal)
        wakeup = self._open[request.request_id] = _Wakeup(asyncio.get_running_loop(), asyncio.Event())
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                pause_s = self.pause_s if isinstance(step, TokenDelta) else step
                if await self._pause(pause_s, request=request, wakeup=wakeup):
                    step = TokenDelta(request_id=request.request_id, finish_reason=FinishReason.DEADLINE)
                if not isinstance(step, TokenDelta):
                    continue
                if step.finish_reason is not None:
                    self._end(request.request_id, self.finished)
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            self._end(request.request_id, self.aborted)

    async def _pause(self, seconds: float, *, request: GenerationRequest, wakeup: "_Wakeup") -> bool:
        """Wait, and on for as long as no engine is ready; True when the request's deadline came first."""
        until_s = time.monotonic() + seconds
        deadline_s = HANG if request.deadline_s is None else request.deadline_s
        await asyncio.sleep(0)
        while not self._is_over:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                return True
            if self.is_ready and now_s >= until_s:
                return False
            next_s = min(until_s if self.is_ready else HANG, deadline_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if next_s == HANG else next_s - now_s):
                    await wakeup.event.wait()
            wakeup.event.clear()
        raise NoEngineError("there is no engine any more")

    def _wake_all(self) -> None:
        for wakeup in list(self._open.values()):
            wakeup.loop.call_soon_threadsafe(wakeup.event.set)

    def _end(self, request_id: str, where: list[str]) -> None:
        if self._open.pop(request_id, None) is not None:
            where.append(request_id)


class _Wakeup(NamedTuple):
    """How to reach a generation that waits, from any thread."""

    loop: asyncio.AbstractEventLoop
    event: asyncio.Event
