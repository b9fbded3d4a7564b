"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`, over the same engine. Errors there have Anthropic's shape."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers.messages import MessageAnswer
from server.conversation import check_conversation
from server.errors import InvalidRequest
from server.intake import Admitted, ignored_fields_header, respond, taking_in
from server.messages_input import MessagePlan, check_message, conversation_off_loop
from server.plan import Terms, check_model
from server.preprocess import INLINE_CHARS, prompt_ids, read_body
from server.schemas.common import json_answer, json_request
from server.schemas.messages import CountTokensRequest, Message, MessagesRequest, TokensCount
from server.services import FromApp

router = APIRouter()

_thread = ThreadPoolExecutor(1, thread_name_prefix="count-tokens")  # never before the prompts of those who generate


async def admitted(request: Request, services: FromApp) -> AsyncIterator[Admitted]:
    """FastAPI leaves this after the last byte of the answer, which gives the place back."""

    async def check(body: MessagesRequest, terms: Terms) -> MessagePlan:
        return await check_message(body, terms, services)

    async with taking_in(request, services, MessagesRequest, check) as admitted:
        yield replace(admitted, headers=admitted.headers | _request_id_header(request))


@router.post("/v1/messages", openapi_extra=json_request(MessagesRequest), responses=json_answer(Message))
async def create_message(request: Request, services: FromApp, admitted: Annotated[Admitted, Depends(admitted)]) -> Response:
    """Say the assistant's next message."""
    plan = admitted.plan
    assert isinstance(plan, MessagePlan), "the check above gives one"
    requests = await admitted.requests()
    answer = MessageAnswer(plan, requests, services=services, request_id=admitted.request_id)
    return await respond(request, answer, admitted)


@router.post("/v1/messages/count_tokens", openapi_extra=json_request(CountTokensRequest), responses=json_answer(TokensCount))
async def count_tokens(request: Request, services: FromApp) -> Response:
    """How many tokens the prompt of a message has. Needs no engine and holds no place in the queue."""
    if services.chat_template is None:
        raise InvalidRequest("this server runs without a tokenizer and cannot count what a text would be")
    body = await read_body(await request.body(), CountTokensRequest, limits=services.limits)
    check_model(body.model, model_name=services.model_name)
    conversation = await conversation_off_loop(body, limits=services.limits)
    check_conversation(conversation)
    runs = await services.chat_template.render_off_loop(conversation)

    def count() -> int:
        tokenizer, bos_token = services.tokenizer, services.model.bos_token
        return len(prompt_ids(runs, tokenizer=tokenizer, bos_token=bos_token, add_bos=False, parse_special_tokens=False))

    is_short = sum(len(run) for run in runs if isinstance(run, str)) <= INLINE_CHARS
    num_tokens = count() if is_short else await asyncio.get_running_loop().run_in_executor(_thread, count)
    headers = ignored_fields_header(body.unknown_fields, limit=services.limits.max_ignored_fields) | _request_id_header(request)
    return Response(msgspec.json.encode(TokensCount(input_tokens=num_tokens)), media_type="application/json", headers=headers)


def _request_id_header(request: Request) -> dict[str, str]:
    """Under the name that Anthropic's clients read."""
    return {"request-id": request.state.request_id}
