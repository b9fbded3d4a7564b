"""What a seed decides: how large the engine is, who asks for what and when, who leaves, and what goes wrong.

Prompts begin with pieces of a few long texts, so that they find each other's blocks, and everything is so small that pools overflow.
"""

from dataclasses import dataclass, field
from random import Random

from scripted_runner import NUM_TOP, POISON, VOCAB_SIZE, engine_config

from engine.config import EngineConfig
from engine.types import GenerationRequest, SamplingParams

SALTS = ("", "", "", "red", "blue")
TENANTS = ("", "ann", "bob")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The rules of one world. Times are seconds, shares are probabilities."""

    config: EngineConfig
    texts: tuple[tuple[int, ...], ...]  # that prompts begin with
    step_s: float  # how long a step takes, on average
    latency_s: float  # of a frame, at most
    arrival_gap_s: float  # between two clients, on average
    max_open: int  # requests at once; more clients wait outside
    kill_gap_s: float | None  # between two attempts to end the engine, on average
    restart_s: float  # at most
    abort_share: float  # of clients that leave early
    deadline_share: float
    poison_share: float  # of requests that end every engine
    scored_share: float
    is_stopped_early: bool  # the server stops while requests are open

    @property
    def limit(self) -> int:
        """Tokens of the longest sequence that fits."""
        return min(self.config.scheduler.max_model_len, self.config.cache.num_blocks * self.config.cache.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request and what its client does with it."""

    request: GenerationRequest
    abort_after_s: float | None = None  # the client leaves
    abort_after_deltas: int | None = None  # it has read enough: a stop string, say
    reading_s: float = 0.0  # what it needs for each delta
    kills_at: int | None = None  # computing this many tokens of it ends the engine
    needs_host: bool = False  # between two tokens, as with a grammar
    is_refused: bool = False  # it can never fit


@dataclass(slots=True)
class Fates:
    """What the world knows of its requests, by id, and the engines do not."""

    kills_at: dict[str, int] = field(default_factory=dict[str, int])  # computing this many tokens ends the engine
    needs_host: set[str] = field(default_factory=set[str])
    gone_s: dict[str, float] = field(default_factory=dict[str, float])  # when the client got the end of it


def scenario_of(rng: Random) -> Scenario:
    block_size = rng.choice((2, 3, 4))
    max_model_len = rng.randrange(24, 41)
    needed = -(-max_model_len // block_size)
    num_blocks = rng.choice((needed, needed + 1, needed * 3 // 2, needed * 2, needed * 4))
    max_num_seqs = rng.choice((1, 2, 3, 4, 6))
    texts = tuple(tuple(rng.randrange(3, 12) for _ in range(rng.randrange(8, 22))) for _ in range(3))
    step_s = rng.choice((0.002, 0.01))
    return Scenario(
        config=engine_config(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.choice((3, 6, 8, 16)),
            max_model_len=max_model_len,
        ),
        texts=texts,
        step_s=step_s,
        latency_s=rng.choice((0.0, step_s, 5 * step_s)),
        arrival_gap_s=step_s * rng.choice((3, 8, 20)),
        max_open=rng.choice((3, 6, 6, 12)),
        kill_gap_s=rng.choice((None, None, step_s * 25, step_s * 60, step_s * 150)),
        restart_s=step_s * rng.choice((5, 60, 300)),
        abort_share=rng.choice((0.0, 0.1, 0.3)),
        deadline_share=rng.choice((0.0, 0.1, 0.3)),
        poison_share=rng.choice((0.0, 0.0, 0.05)),
        scored_share=rng.choice((0.0, 0.2, 0.5)),
        is_stopped_early=rng.random() < 0.15,
    )


class Workload:
    """Makes requests; the same ones for the same generator of random numbers."""

    def __init__(self, scenario: Scenario, rng: Random) -> None:
        self._scenario = scenario
        self._rng = rng
        self._num_requests = 0

    def next_plans(self, now_s: float) -> list[Plan]:
        """What one client asks for at once: a request, or several choices of one prompt."""
        rng, scenario = self._rng, self._scenario
        prompt, sampling = self._prompt(), self._sampling()
        tenant, salt, priority = rng.choice(TENANTS), rng.choice(SALTS), rng.choice((0, 0, 0, 1, -1))
        deadline_s = now_s + scenario.step_s * rng.randrange(1, 120) if rng.random() < scenario.deadline_share else None
        max_tokens = rng.choice((0, 1, 6, 12, 20, 30))
        is_refused = rng.random() < 0.02
        most = scenario.limit - len(prompt)
        max_tokens = most + rng.randrange(1, 5) if is_refused else min(max_tokens, most)
        sampling = SamplingParams(max_tokens=max_tokens, **sampling)
        plans: list[Plan] = []
        for choice in range(rng.choice((1, 1, 1, 1, 2, 3))):
            self._num_requests += 1
            request = GenerationRequest(
                request_id=str(self._num_requests),
                prompt_token_ids=prompt,
                sampling=sampling,
                choice=choice,
                arrival_s=now_s,
                deadline_s=deadline_s,
                tenant=tenant,
                priority=priority,
                cache_salt=salt,
            )
            plans.append(Plan(request=request, is_refused=is_refused, **self._behaviour(request)))
        return plans

    def canary(self) -> GenerationRequest:
        """Always the same question to the same world."""
        prompt = self._scenario.texts[0][: self._scenario.limit - 4]
        return GenerationRequest(
            request_id="canary", prompt_token_ids=prompt, sampling=SamplingParams(temperature=0.5, seed=7, max_tokens=4, ignore_eos=True)
        )

    def _prompt(self) -> tuple[int, ...]:
        rng, limit = self._rng, self._scenario.limit
        text = rng.choice(self._scenario.texts)
        shared = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.5 else text
        prompt = [*shared, *(rng.randrange(3, 40) for _ in range(rng.choice((0, 0, 1, 2, 5))))]
        if rng.random() < 0.03:
            prompt.insert(rng.randrange(len(prompt) + 1), POISON)
        return tuple(prompt[: limit - 1]) or (5,)

    def _sampling(self) -> dict[str, object]:
        rng = self._rng
        knobs: dict[str, object] = {"temperature": 0.0, "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.5:
            knobs |= {
                "temperature": 0.75,
                "seed": rng.randrange(-(2**63), 2**63),
                "top_k": rng.choice((0, 5)),
                "top_p": rng.choice((1.0, 0.5)),
            }
        if rng.random() < 0.2:
            knobs |= rng.choice(({"presence_penalty": 0.5}, {"frequency_penalty": -1.5}, {"repetition_penalty": 1.25}))
        if rng.random() < 0.15:
            knobs |= {"logit_bias": {rng.randrange(VOCAB_SIZE - 1): 2.0}, "min_tokens": rng.randrange(4)}
        if rng.random() < 0.15:
            knobs |= {"stop_token_ids": tuple(rng.randrange(3, VOCAB_SIZE - 1) for _ in range(8))}
        if rng.random() < 0.15:
            few = tuple(range(rng.randrange(3, 8), 12))
            runs = tuple(tuple(rng.choice(few) for _ in range(rng.choice((1, 2, 2, 3)))) for _ in range(3))
            knobs |= rng.choice(({"allowed_token_ids": few}, {"bad_words": runs}, {"allowed_token_ids": (*few, 20), "bad_words": runs}))
        if rng.random() < 0.2:
            knobs |= {"logprobs": rng.randrange(NUM_TOP + 1)}
        if rng.random() < self._scenario.scored_share:
            knobs |= {"prompt_logprobs": rng.randrange(NUM_TOP + 1)}
        return knobs

    def _behaviour(self, request: GenerationRequest) -> dict[str, object]:
        """What the client does, and whether the request ends engines."""
        rng, scenario = self._rng, self._scenario
        behaviour: dict[str, object] = {}
        if rng.random() < scenario.abort_share:
            if rng.random() < 0.5:
                behaviour["abort_after_s"] = rng.random() * scenario.step_s * 60
            else:
                behaviour["abort_after_deltas"] = rng.randrange(1, 6)
        if rng.random() < 0.1:
            behaviour["reading_s"] = rng.random() * scenario.step_s * 3
        if rng.random() < 0.1:
            behaviour["needs_host"] = True
        if rng.random() < scenario.poison_share and request.sampling.max_tokens:
            num_prompt = len(request.prompt_token_ids)
            behaviour["kills_at"] = num_prompt + rng.choice((0, 0, rng.randrange(request.sampling.max_tokens)))
        return behaviour
