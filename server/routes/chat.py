"""`POST /v1/chat/completions`: read, check, render, admit, tokenise, run, answer."""

from collections.abc import AsyncIterator
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from server.answers.chat import ChatAnswer
from server.chat_plan import ConversationPlan, check_chat
from server.intake import Admitted, respond, taking_in
from server.plan import Terms
from server.schemas.chat import ChatCompletion, ChatRequest
from server.schemas.common import json_answer, json_request
from server.services import FromApp

router = APIRouter()
log = structlog.get_logger(__name__)


async def admitted(request: Request, services: FromApp) -> AsyncIterator[Admitted]:
    """FastAPI leaves this after the last byte of the answer, which gives the place back."""

    async def check(body: ChatRequest, terms: Terms) -> ConversationPlan:
        return await check_chat(body, terms, services)

    async with taking_in(request, services, ChatRequest, check) as admitted:
        yield admitted


@router.post("/v1/chat/completions", openapi_extra=json_request(ChatRequest), responses=json_answer(ChatCompletion))
async def create_chat_completion(request: Request, services: FromApp, admitted: Annotated[Admitted, Depends(admitted)]) -> Response:
    """Say the assistant's next turn."""
    assert isinstance(admitted.plan, ConversationPlan), "the check above gives one"
    _say_once_that_it_is_a_base_model(request.app)
    requests = await admitted.requests()
    answer = ChatAnswer(admitted.plan, requests, services=services, request_id=admitted.request_id)
    return await respond(request, answer, admitted)


def _say_once_that_it_is_a_base_model(app: FastAPI) -> None:
    if not getattr(app.state, "has_chatted", False):
        app.state.has_chatted = True
        log.warning("chat with a base model: it was not trained to follow instructions, and goes on with the dialogue as a text")
