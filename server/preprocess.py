"""From bytes to what the engine takes: reading a body, tokenising, lengths, the grammar's verdict, one request per choice.

`read_body` makes a wire type of the bytes; `server/plan.py` checks its fields and says how many sequences it fans out to, so that admission
stands before anything costly; `build_requests` does the rest. After these nobody checks a request again.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from engine.tokenizer import Tokenizer
from engine.types import EngineInfo, GenerationRequest
from server.errors import ContextLengthExceeded, InvalidRequest, shown
from server.limits import Limits
from server.plan import GenerationPlan, RenderedPrompt, check_ids
from server.schemas.common import WireModel
from server.schemas.completions import IdPrompts
from server.services import Services

INLINE_CHARS = 2048  # up to this much text is tokenised on the event loop: a thread would cost more
INLINE_BYTES = 64 * 1024  # the same for reading a body

Wire = TypeVar("Wire", bound=WireModel)


async def read_body(content: bytes, wire: type[Wire], *, limits: Limits) -> Wire:
    """The body as its wire type. Raises `InvalidRequest` for too many fields, else pydantic's `ValidationError`."""

    def read() -> Wire:
        _check_num_fields(content, limit=limits.max_fields)
        return wire.from_body(content, limits=limits)

    return read() if len(content) <= INLINE_BYTES else await asyncio.to_thread(read)


async def build_requests(
    plan: GenerationPlan, *, services: Services, info: EngineInfo, request_id: str, arrival_s: float | None = None
) -> tuple[GenerationRequest, ...]:
    """One request per prompt and candidate, prompt-major.

    Raises `InvalidRequest` for ids outside the vocabulary, for text, stop strings, bad words or a grammar without a tokenizer, for more
    log-probabilities than one answer may hold, and for a grammar that does not compile; `ContextLengthExceeded` where prompt and output do
    not fit the context or the whole cache. An explicit `max_tokens` must fit; a default shrinks to the room there is, down to one token.
    """
    _check_has_tokenizer(plan, services.tokenizer)
    arrival_s = time.monotonic() if arrival_s is None else arrival_s
    id_prompts = await _tokenized(plan, tokenizer=services.tokenizer, bos_token=services.model.bos_token)
    bad_words = tuple(run for word in plan.bad_words for run in _spellings(word, services.tokenizer))
    requests: list[GenerationRequest] = []
    for prompt_index, all_ids in enumerate(id_prompts):
        ids = _truncated(all_ids, plan=plan, info=info)
        max_tokens = _max_tokens(plan, prompt_len=len(ids), info=info)  # first: it bounds the ids to look at
        check_ids(ids, vocab_size=info.vocab_size, param=plan.prompt_param)
        sampling = replace(
            plan.sampling,
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if plan.seed is None else plan.seed,
            bad_words=bad_words,
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
    _check_answer_size(plan, requests, limit=services.limits.max_answer_logprobs)
    return await _with_grammar(plan, requests, services=services)


def prompt_ids(
    runs: RenderedPrompt, *, tokenizer: Tokenizer | None, bos_token: int, add_bos: bool, parse_special_tokens: bool
) -> tuple[int, ...]:
    """The ids of one prompt. Without a tokenizer there is no text in it."""
    ids: list[int] = []
    has_begun = False
    for run in runs:
        if isinstance(run, int):
            ids.append(run)
        elif run and tokenizer is not None:
            # Only where text begins does a space stand before it; what is behind a special token continues.
            ids += tokenizer.encode_continuation(run) if has_begun else tokenizer.encode(run, parse_special_tokens=parse_special_tokens)
            has_begun = True
    return (bos_token, *ids) if add_bos or not ids else tuple(ids)


def worst_case_tokens(requests: Sequence[GenerationRequest]) -> int:
    """The places in the cache that these requests need when every one of them is generated to its end and none shares a block."""
    return sum(len(request.prompt_token_ids) + request.sampling.max_tokens for request in requests)


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


def _check_has_tokenizer(plan: GenerationPlan, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        return
    if plan.stop:
        raise InvalidRequest("this server runs without a tokenizer and sees no text to stop at: use stop_token_ids", param="stop")
    if plan.bad_words:
        raise InvalidRequest("this server runs without a tokenizer and knows no words: use logit_bias", param="bad_words")


def _check_answer_size(plan: GenerationPlan, requests: Sequence[GenerationRequest], *, limit: int) -> None:
    """Bound what the answer's log-probabilities hold in memory: of each token, the chosen one's and the top ones'."""
    num_output = sum(request.sampling.max_tokens for request in requests)
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    for param, count, num_tokens in (
        ("logprobs", plan.logprobs, num_output + plan.echo * num_prompt),
        ("prompt_logprobs", plan.prompt_logprobs, num_prompt),
    ):
        if count is not None and num_tokens * (count + 1) > limit:
            raise InvalidRequest(
                f"{param} {count} of up to {num_tokens:,} tokens are {num_tokens * (count + 1):,} numbers, the limit is "
                f"{limit:,} in one answer; lower {param}, or send fewer prompts or choices per request",
                param=param,
            )


async def _with_grammar(
    plan: GenerationPlan, requests: Sequence[GenerationRequest], *, services: Services
) -> tuple[GenerationRequest, ...]:
    """The requests with the grammar as the engine takes it; last, because the verdict on it costs most."""
    if plan.grammar is None:
        return tuple(requests)
    if services.grammar_check is None:
        raise InvalidRequest("this server runs without a tokenizer: it cannot follow a grammar", param=plan.grammar.param)
    grammar = await services.grammar_check.check(plan.grammar.text, param=plan.grammar.param, tenant=plan.tenant)
    return tuple(replace(request, grammar=grammar) for request in requests)


async def _tokenized(plan: GenerationPlan, *, tokenizer: Tokenizer | None, bos_token: int) -> IdPrompts:
    """The prompts as ids. An empty text is the document start; other texts get no start token unless asked for."""
    rendered = tuple((prompt,) if isinstance(prompt, str) else prompt for prompt in plan.prompts)
    if tokenizer is None and any(isinstance(run, str) and run for run in rendered[0]):
        raise InvalidRequest("this server runs without a tokenizer: send the prompt as a list of token ids", param=plan.prompt_param)
    is_text = isinstance(plan.prompts[0], str)  # and no rendered conversation, whose special tokens are ids already
    if isinstance(rendered[0][0], int) and not any(isinstance(run, str) for prompt in rendered for run in prompt):
        return rendered  # pyright: ignore[reportReturnType]

    def encode_all() -> IdPrompts:
        return tuple(
            prompt_ids(
                runs,
                tokenizer=tokenizer,
                bos_token=bos_token,
                add_bos=plan.add_bos,
                parse_special_tokens=is_text and plan.parse_special_tokens,
            )
            for runs in rendered
        )

    num_chars = sum(len(run) for prompt in rendered for run in prompt if isinstance(run, str))
    return encode_all() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode_all)


def _spellings(word: str, tokenizer: Tokenizer | None) -> set[tuple[int, ...]]:
    """The runs of tokens that write a word: in the middle of a word, and as a word of its own."""
    assert tokenizer is not None, "bad words without a tokenizer are refused"
    spellings = {tuple(tokenizer.encode_continuation(word)), tuple(tokenizer.encode(word))}
    return {run for run in spellings if run}


def _truncated(ids: tuple[int, ...], *, plan: GenerationPlan, info: EngineInfo) -> tuple[int, ...]:
    """The end of the prompt, as much as the client wants kept."""
    match plan.truncate_prompt_tokens:
        case None:
            return ids
        case -1:
            room = _longest(info) - max(1, plan.max_tokens or 0, plan.sampling.min_tokens)
            return ids[-room:] if room > 0 else ids
        case count:
            return ids[-count:]


def _longest(info: EngineInfo) -> int:
    return min(info.max_model_len, info.num_blocks * info.block_size)


def _max_tokens(plan: GenerationPlan, *, prompt_len: int, info: EngineInfo) -> int:
    limit = _longest(info)
    room = limit - prompt_len
    wanted = plan.max_tokens
    if wanted is None:
        default = room if plan.default_max_tokens is None else min(plan.default_max_tokens, room)
        wanted = max(default, plan.sampling.min_tokens, 1)
    if wanted > room:
        raise ContextLengthExceeded(
            f"the prompt is too long: {_what_fits(limit, info=info)}, the prompt has {prompt_len:,} and "
            f"{shown(wanted)} more are asked for; shorten the prompt or lower {plan.max_tokens_param}",
            param=plan.prompt_param if room < 0 else plan.max_tokens_param,
        )
    return wanted


def _what_fits(limit: int, *, info: EngineInfo) -> str:
    """In the words by which LiteLLM (and LangChain, by those before them) knows an overflow: neither looks at the code."""
    fits = f"this model's maximum context length is {limit:,} tokens"
    return fits if limit == info.max_model_len else f"{fits} (the whole cache holds {limit:,})"
