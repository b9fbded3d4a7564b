"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the tokenizer by itself, at vLLM's paths.

They need no engine, so they answer while the model loads and hold no place in the queue. What is long is done in threads of its own, so
that it never stands before the prompts of completions.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.tokenizer import Tokenizer
from server.chat_plan import conversation_of
from server.conversation import check_conversation
from server.errors import InvalidRequest
from server.intake import ignored_fields_header
from server.plan import RenderedPrompt, check_ids, check_model, check_refused
from server.preprocess import INLINE_CHARS, prompt_ids, read_body
from server.schemas.common import json_answer, json_request
from server.schemas.tokens import Detokenized, DetokenizeRequest, TokenFields, Tokenized, TokenizeRequest, TokenizerInfo
from server.services import FromApp, Services
from server.streaming import unless_disconnected

router = APIRouter()

NUM_THREADS = 2

_Wire = TypeVar("_Wire", bound=TokenFields)

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokens")


@router.post("/tokenize", openapi_extra=json_request(TokenizeRequest), responses=json_answer(Tokenized))
async def tokenize(request: Request, services: FromApp) -> Response:
    """The token ids that a request which generates computes for the same prompt or the same messages."""
    tokenizer = _tokenizer_of(services)
    body = await _read(request, TokenizeRequest, services)
    is_conversation = "messages" in body.model_fields_set
    if is_conversation == (body.prompt is not None):
        raise InvalidRequest("send either a text as prompt, or a conversation as messages", param="prompt")
    runs = await _rendered(body, services) if is_conversation else (body.prompt or "",)

    def encode() -> Tokenized:
        ids = prompt_ids(
            runs,
            tokenizer=tokenizer,
            bos_token=services.model.bos_token,
            parse_special_tokens=body.parse_special_tokens,
            add_bos=body.add_special_tokens,
        )
        info = services.client.info
        return Tokenized(
            count=len(ids),
            max_model_len=None if info is None else info.max_model_len,
            tokens=list(ids),
            token_strs=[tokenizer.token_name(token) for token in ids] if body.return_token_strs else None,
        )

    size = sum(len(run) for run in runs if isinstance(run, str))
    return await _answer(request, encode, size=size, unknown_fields=body.unknown_fields, services=services)


@router.post("/detokenize", openapi_extra=json_request(DetokenizeRequest), responses=json_answer(Detokenized))
async def detokenize(request: Request, services: FromApp) -> Response:
    """The text of a whole sequence, which `/tokenize` made the ids of."""
    tokenizer = _tokenizer_of(services)
    body = await _read(request, DetokenizeRequest, services)
    check_ids(body.tokens, vocab_size=services.model.vocab_size, param="tokens")

    def decode() -> Detokenized:
        return Detokenized(prompt=tokenizer.decode(body.tokens))

    return await _answer(request, decode, size=len(body.tokens), unknown_fields=body.unknown_fields, services=services)


@router.get("/tokenizer_info", responses=json_answer(TokenizerInfo))
@router.api_route("/tokenizer_info", methods=["GET", "HEAD"], include_in_schema=False)
async def tokenizer_info(services: FromApp) -> Response:
    """Special tokens and sizes."""
    tokenizer, model = _tokenizer_of(services), services.model
    info = TokenizerInfo(
        eos_token=tokenizer.token_name(model.eos_token),
        pad_token=tokenizer.token_name(model.pad_token),
        bos_token_id=model.bos_token,
        eos_token_id=model.eos_token,
        pad_token_id=model.pad_token,
        additional_special_tokens=[name for name in tokenizer.special_tokens if name.startswith("<|")],
        vocab_size=tokenizer.vocab_size,
        model_max_length=model.sequence_len,
        chat_template="" if services.chat_template is None else services.chat_template.source,
    )
    return Response(msgspec.json.encode(info), media_type="application/json")


def _tokenizer_of(services: Services) -> Tokenizer:
    if services.tokenizer is None:
        raise InvalidRequest("this server runs without a tokenizer (--skip-tokenizer-init): it takes and gives token ids only")
    return services.tokenizer


async def _rendered(body: TokenizeRequest, services: Services) -> RenderedPrompt:
    """The prompt of the conversation's next turn."""
    if body.parse_special_tokens:
        raise InvalidRequest("parse_special_tokens is for a prompt: what a message says is always text", param="parse_special_tokens")
    assert services.chat_template is not None, "there is one where there is a tokenizer"
    conversation = conversation_of(body, limits=services.limits)
    check_conversation(conversation)
    return await services.chat_template.render_off_loop(conversation, variables=body.chat_template_kwargs)


async def _read(request: Request, wire: type[_Wire], services: Services) -> _Wire:
    body = await read_body(await request.body(), wire, limits=services.limits)
    check_model(body.model, model_name=services.model_name)
    check_refused(body)
    return body


async def _answer(
    request: Request, make: Callable[[], msgspec.Struct], *, size: int, unknown_fields: tuple[str, ...], services: Services
) -> Response:
    """Make and encode; where it is more than `INLINE_CHARS` characters or ids, in a thread, unless the client leaves before its turn."""

    def content() -> bytes:
        return msgspec.json.encode(make())

    async def content_from_thread() -> bytes:
        return await asyncio.get_running_loop().run_in_executor(_threads, content)

    made = content() if size <= INLINE_CHARS else await unless_disconnected(request.receive, content_from_thread())
    headers = ignored_fields_header(unknown_fields, limit=services.limits.max_ignored_fields)
    return Response(made, media_type="application/json", headers=headers)
