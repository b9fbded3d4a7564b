"""`POST /v1/completions`: read, check, admit, tokenise, run, answer."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers.completions import CompletionAnswer
from server.intake import Admitted, respond, taking_in
from server.plan import GenerationPlan, Terms, check_completion
from server.schemas.common import json_answer, json_request
from server.schemas.completions import Completion, CompletionRequest
from server.services import FromApp

router = APIRouter()


async def admitted(request: Request, services: FromApp) -> AsyncIterator[Admitted]:
    """FastAPI leaves this after the last byte of the answer, which gives the place back."""

    async def check(body: CompletionRequest, terms: Terms) -> GenerationPlan:
        return check_completion(body, terms)

    async with taking_in(request, services, CompletionRequest, check) as admitted:
        yield admitted


@router.post("/v1/completions", openapi_extra=json_request(CompletionRequest), responses=json_answer(Completion))
async def create_completion(request: Request, services: FromApp, admitted: Annotated[Admitted, Depends(admitted)]) -> Response:
    """Continue one or more prompts."""
    requests = await admitted.requests()
    answer = CompletionAnswer(admitted.plan, requests, services=services, request_id=admitted.request_id)
    return await respond(request, answer, admitted)
