"""From a wire type to what the engine takes: field checks that need the model or the limits, tokenising, one request per choice.

`read_completion` makes a wire type of the bytes. Then two steps, so that admission stands between them: `check_completion` looks at the
fields alone and says how many sequences the request fans out to; `build_requests` tokenises and checks lengths. After these nobody checks
a request again.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.tokenizer import Tokenizer
from engine.types import EngineInfo, GenerationRequest, SamplingParams
from server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, shown
from server.limits import Limits
from server.schemas.common import SamplingFields
from server.schemas.completions import CompletionRequest, IdPrompts, TextPrompts

DEFAULT_MAX_TOKENS = 16
INLINE_CHARS = 2048  # up to this much text is tokenised on the event loop: a thread would cost more
INLINE_BYTES = 64 * 1024  # the same for reading a body


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPlan:
    """A completions request whose fields are all in range; its prompts may still be too long."""

    prompts: TextPrompts | IdPrompts
    sampling: SamplingParams  # without the seed, which is per prompt
    seed: int | None
    max_tokens: int | None  # None: the default, or what room the context leaves
    num_choices: int  # answered per prompt
    num_candidates: int  # run per prompt; more than num_choices with best_of
    logprobs: int | None  # as the client asked, for the answer
    echo: bool
    stop: tuple[str, ...]
    include_stop: bool
    tokens_as_ids: bool
    parse_special_tokens: bool
    add_bos: bool
    stream: bool
    include_usage: bool
    timeout_s: float | None
    tenant: str
    priority: int
    cache_salt: str

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine will run for it."""
        return len(self.prompts) * self.num_candidates

    def min_worst_case_tokens(self, *, max_model_len: int) -> int:
        """What `worst_case_tokens` will be at least: known before tokenising, when of a text only its one first token is certain.

        A prompt that is too long counts as a whole context: it is refused in its own words later.
        """
        lengths = (1 if isinstance(prompt, str) else len(prompt) for prompt in self.prompts)
        return self.num_candidates * sum(min(length + (self.max_tokens or 0), max_model_len) for length in lengths)


async def read_completion(content: bytes, *, limits: Limits) -> CompletionRequest:
    """The body as its wire type. Raises `InvalidRequest` for too many fields, else pydantic's `ValidationError`."""

    def read() -> CompletionRequest:
        _check_num_fields(content, limit=limits.max_fields)
        return CompletionRequest.from_body(content, max_prompts=limits.max_prompts)

    return read() if len(content) <= INLINE_BYTES else await asyncio.to_thread(read)


def check_completion(body: CompletionRequest, *, limits: Limits, info: EngineInfo, model_name: str, eos_token: int) -> CompletionPlan:
    """Check every field that the schema alone cannot. Raises `InvalidRequest` with the field, or `ModelNotFound`."""
    if body.model is not None and body.model != model_name:
        raise ModelNotFound(f"the model {shown(body.model)} does not exist; this server serves {model_name!r}", param="model")
    if body.suffix:
        raise InvalidRequest("suffix is not supported: this model has no infill; leave it out", param="suffix")
    _check_options(body, limits=limits)
    max_logprobs = min(limits.max_logprobs, info.max_logprobs)
    if body.logprobs is not None and body.logprobs > max_logprobs:
        raise InvalidRequest(f"logprobs is {shown(body.logprobs)}, at most {max_logprobs} are given", param="logprobs")
    if body.max_tokens is not None and body.min_tokens > body.max_tokens:
        raise InvalidRequest(f"min_tokens {shown(body.min_tokens)} is above max_tokens {shown(body.max_tokens)}", param="min_tokens")
    _check_some_token_goes_on(body, vocab_size=info.vocab_size, eos_token=eos_token)
    num_candidates = _num_candidates(body)
    if len(body.prompt) * num_candidates > limits.max_sequences:
        raise InvalidRequest(
            f"{len(body.prompt):,} prompts with {num_candidates} choices each exceed the limit of {limits.max_sequences:,} sequences",
            param="best_of" if num_candidates > body.n else "n",
        )
    ranks_candidates = num_candidates > body.n
    return CompletionPlan(
        prompts=body.prompt,
        sampling=replace(
            _sampling(body, info=info, limits=limits),
            logprobs=0 if body.logprobs is None and ranks_candidates else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        ),
        seed=body.seed,
        max_tokens=body.max_tokens,
        num_choices=body.n,
        num_candidates=num_candidates,
        logprobs=body.logprobs,
        echo=body.echo,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        tokens_as_ids=body.return_tokens_as_token_ids,
        parse_special_tokens=body.parse_special_tokens,
        add_bos=body.add_special_tokens,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        timeout_s=body.timeout,
        tenant=tenant_of(body.user),
        priority=body.priority,
        cache_salt=composed_salt(body.cache_salt or ""),
    )


async def build_requests(
    plan: CompletionPlan,
    *,
    tokenizer: Tokenizer | None,
    bos_token: int,
    info: EngineInfo,
    limits: Limits,
    request_id: str,
    arrival_s: float | None = None,
) -> tuple[GenerationRequest, ...]:
    """One request per prompt and candidate, prompt-major.

    Raises `InvalidRequest` for ids outside the vocabulary, and for text or stop strings without a tokenizer; `ContextLengthExceeded` where
    prompt and output do not fit the context or the whole cache. An explicit `max_tokens` must fit; the default shrinks to the room there
    is, down to one token. `InvalidRequest` also for more log-probabilities than one answer may hold.
    """
    if tokenizer is None and plan.stop:
        raise InvalidRequest("this server runs without a tokenizer and sees no text to stop at: use stop_token_ids", param="stop")
    arrival_s = time.monotonic() if arrival_s is None else arrival_s
    id_prompts = await _tokenized(plan, tokenizer=tokenizer, bos_token=bos_token)
    requests: list[GenerationRequest] = []
    for prompt_index, ids in enumerate(id_prompts):
        max_tokens = _max_tokens(plan, prompt_len=len(ids), info=info)  # first: it bounds the ids to look at
        _check_ids(ids, vocab_size=info.vocab_size, param="prompt")
        sampling = replace(
            plan.sampling,
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if plan.seed is None else plan.seed,
        )
        requests += [
            GenerationRequest(
                request_id=f"{request_id}-{prompt_index}-{choice}",
                prompt_token_ids=ids,
                sampling=sampling,
                choice=choice,
                arrival_s=arrival_s,
                deadline_s=None if plan.timeout_s is None else arrival_s + plan.timeout_s,
                tenant=plan.tenant,
                priority=plan.priority,
                cache_salt=plan.cache_salt,
            )
            for choice in range(plan.num_candidates)
        ]
    _check_answer_size(plan, requests, limit=limits.max_answer_logprobs)
    return tuple(requests)


def worst_case_tokens(requests: Sequence[GenerationRequest]) -> int:
    """The places in the cache that these requests need when every one of them is generated to its end and none shares a block."""
    return sum(len(request.prompt_token_ids) + request.sampling.max_tokens for request in requests)


def tenant_of(user: str | None) -> str:
    """Who shares the engine fairly with others, as long as there are no API keys: whoever sends the same `user`.

    A digest, so that it is short whatever the client sends and so that no name of a person reaches the engine.
    """
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:32]}" if user else ""


def composed_salt(cache_salt: str, *, key_tenant: str = "") -> str:
    """What the prefix cache keeps apart: tenants of different API keys always, and within one those that ask for it by a `cache_salt`.

    `user` has no part in it: anybody can write any name there, and users of one key may share what they have in common. The length in
    front keeps two parts from being taken for two others.
    """
    return f"{len(key_tenant)}:{key_tenant}:{cache_salt}"


class _FieldName(str):
    """A type of its own, so that the decoder asks about each name."""

    __slots__ = ()


def _check_num_fields(content: bytes, *, limit: int) -> None:
    """Stop at the first field too many, having built nothing. What is no JSON object is left to the real parser to explain."""
    num_fields = 0

    def count(_: type, name: str) -> _FieldName:
        nonlocal num_fields
        num_fields += 1
        if num_fields > limit:
            raise InvalidRequest(f"the body has more than {limit:,} fields")
        return _FieldName(name)

    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        msgspec.json.decode(content, type=dict[_FieldName, msgspec.Raw], dec_hook=count)


def _check_answer_size(plan: CompletionPlan, requests: Sequence[GenerationRequest], *, limit: int) -> None:
    """Bound what the answer's log-probabilities hold in memory: of each token, the chosen one's and the top ones'."""
    if plan.logprobs is None:
        return
    num_tokens = sum(request.sampling.max_tokens + plan.echo * len(request.prompt_token_ids) for request in requests)
    if num_tokens * (plan.logprobs + 1) > limit:
        raise InvalidRequest(
            f"logprobs {plan.logprobs} of up to {num_tokens:,} tokens are {num_tokens * (plan.logprobs + 1):,} numbers, the limit is "
            f"{limit:,} in one answer; lower logprobs, or send fewer prompts or choices per request",
            param="logprobs",
        )


def _check_options(body: SamplingFields, *, limits: Limits) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
    if not body.skip_special_tokens:
        raise InvalidRequest("skip_special_tokens: false is not supported; control tokens have no text here", param="skip_special_tokens")
    if body.timeout is not None and body.timeout > limits.max_timeout_s:
        raise InvalidRequest(f"timeout is {body.timeout:g} seconds, the limit is {limits.max_timeout_s:g}", param="timeout")
    if len(body.stop) > limits.max_stop_strings:
        raise InvalidRequest(f"{len(body.stop):,} stop strings, the limit is {limits.max_stop_strings}", param="stop")
    if any(len(string) > limits.max_stop_chars for string in body.stop):
        raise InvalidRequest(f"a stop string has more than {limits.max_stop_chars} characters", param="stop")
    if body.cache_salt is not None and len(body.cache_salt) > limits.max_cache_salt_chars:
        raise InvalidRequest(f"cache_salt has more than {limits.max_cache_salt_chars} characters", param="cache_salt")
    if len(body.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            f"{len(body.stop_token_ids):,} stop token ids, the limit is {limits.max_stop_token_ids}", param="stop_token_ids"
        )


def _check_some_token_goes_on(body: SamplingFields, *, vocab_size: int, eos_token: int) -> None:
    """`min_tokens` forbids every end token for a while; something must be left to choose."""
    end_tokens = {*body.stop_token_ids} if body.ignore_eos else {*body.stop_token_ids, eos_token}
    if body.min_tokens and len(end_tokens) >= vocab_size:
        raise InvalidRequest(
            f"min_tokens is {shown(body.min_tokens)}, but each of the {vocab_size:,} tokens is an end token: lower it to 0 or "
            "name fewer stop_token_ids",
            param="min_tokens",
        )


def _num_candidates(body: CompletionRequest) -> int:
    """How many to run per prompt. Raises where `best_of` contradicts the rest; 0 is OpenAI's way to leave it out."""
    if not body.best_of:
        return body.n
    if body.best_of < body.n:
        raise InvalidRequest(f"best_of {body.best_of} is below n {body.n}", param="best_of")
    if body.best_of > 1 and body.stream:
        raise InvalidRequest("best_of cannot be streamed: which choice is best is known at the end", param="best_of")
    return body.best_of


def _sampling(body: SamplingFields, *, info: EngineInfo, limits: Limits) -> SamplingParams:
    """What the fields mean to the engine. `top_p: 0` keeps the likeliest token alone, which is `top_k: 1`."""
    _check_ids(body.stop_token_ids, vocab_size=info.vocab_size, param="stop_token_ids")
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p or 1.0,
        top_k=1 if body.top_p == 0 else min(max(body.top_k, 0), info.vocab_size),
        min_p=body.min_p,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=body.stop_token_ids,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, vocab_size=info.vocab_size, limits=limits),
    )


def _logit_bias(raw: Mapping[str, Any], *, vocab_size: int, limits: Limits) -> dict[int, float]:
    if len(raw) > limits.max_logit_bias:
        raise InvalidRequest(f"logit_bias has {len(raw):,} entries, the limit is {limits.max_logit_bias:,}", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in raw.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidRequest(f"logit_bias: {shown(key)} is no token id below {vocab_size:,}", param="logit_bias")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and -100 <= value <= 100):
            raise InvalidRequest(
                f"logit_bias: the bias of token {key} must be a number from -100 to 100, found {shown(value)}", param="logit_bias"
            )
        bias[int(key)] = float(value)
    return bias


def _check_ids(ids: tuple[int, ...], *, vocab_size: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        found = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param}: token id {shown(found)} is outside the vocabulary of {vocab_size:,}", param=param)


async def _tokenized(plan: CompletionPlan, *, tokenizer: Tokenizer | None, bos_token: int) -> IdPrompts:
    """The prompts as ids. An empty text is the document start; other texts get no start token unless asked for."""
    prompts = plan.prompts
    if not isinstance(prompts[0], str):
        return prompts  # pyright: ignore[reportReturnType]
    texts: TextPrompts = prompts  # pyright: ignore[reportAssignmentType]
    if tokenizer is None and any(texts):
        raise InvalidRequest("this server runs without a tokenizer: send the prompt as a list of token ids", param="prompt")

    def encode_all() -> IdPrompts:
        return tuple(encode(text) for text in texts)

    def encode(text: str) -> tuple[int, ...]:
        if not text or tokenizer is None:
            return (bos_token,)
        ids = tokenizer.encode(text, parse_special_tokens=plan.parse_special_tokens)
        return (bos_token, *ids) if plan.add_bos or not ids else tuple(ids)

    num_chars = sum(map(len, texts))
    return encode_all() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode_all)


def _max_tokens(plan: CompletionPlan, *, prompt_len: int, info: EngineInfo) -> int:
    limit = min(info.max_model_len, info.num_blocks * info.block_size)
    room = limit - prompt_len
    wanted = max(min(DEFAULT_MAX_TOKENS, room), plan.sampling.min_tokens, 1) if plan.max_tokens is None else plan.max_tokens
    if wanted > room:
        raise ContextLengthExceeded(
            f"the prompt is {prompt_len:,} tokens and {shown(wanted)} more are asked for, {_what_takes(limit, info=info)} together; "
            "shorten the prompt or lower max_tokens",
            param="prompt" if room < 0 else "max_tokens",
        )
    return wanted


def _what_takes(limit: int, *, info: EngineInfo) -> str:
    return f"the model takes {limit:,}" if limit == info.max_model_len else f"the whole cache holds {limit:,}"
