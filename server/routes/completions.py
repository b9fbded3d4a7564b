"""`POST /v1/completions`: read, check, admit, tokenise, run, answer."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.admission import Permit
from server.answer import INLINE_LOGPROBS, CompletionAnswer
from server.errors import translated
from server.preprocess import CompletionPlan, build_requests, check_completion, read_completion, worst_case_tokens
from server.schemas.common import json_answer, json_request
from server.schemas.completions import Completion, CompletionRequest
from server.services import FromApp
from server.streaming import CompletionStream, unless_disconnected

router = APIRouter()

IGNORED_FIELDS_HEADER = "x-ignored-fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A checked request that holds its place until the answer is out."""

    plan: CompletionPlan
    permit: Permit
    arrival_s: float
    headers: dict[str, str]


async def admitted(request: Request, services: FromApp) -> AsyncIterator[Admitted]:
    """Read, check and admit; FastAPI leaves this after the last byte of the answer, which gives the place back."""
    arrival_s = time.monotonic()
    info = services.admission.check_open()
    body = await read_completion(await request.body(), limits=services.limits)
    plan = check_completion(body, limits=services.limits, info=info, model_name=services.model_name, eos_token=services.model.eos_token)
    num_tokens = plan.min_worst_case_tokens(max_model_len=info.max_model_len)
    with services.admission.permit(plan.num_sequences, num_tokens=num_tokens, tenant=plan.tenant) as permit:
        headers = ignored_fields_header(body.unknown_fields, limit=services.limits.max_ignored_fields)
        yield Admitted(plan=plan, permit=permit, arrival_s=arrival_s, headers=headers)


@router.post("/v1/completions", openapi_extra=json_request(CompletionRequest), responses=json_answer(Completion))
async def create_completion(request: Request, services: FromApp, admission: Annotated[Admitted, Depends(admitted)]) -> Response:
    """Continue one or more prompts."""
    request_id: str = request.state.request_id
    requests = await build_requests(
        admission.plan,
        tokenizer=services.tokenizer,
        bos_token=services.model.bos_token,
        info=admission.permit.info,
        limits=services.limits,
        request_id=request_id,
        arrival_s=admission.arrival_s,
    )
    admission.permit.raise_to(worst_case_tokens(requests))
    answer = CompletionAnswer(admission.plan, requests, services=services, request_id=request_id)
    if admission.plan.stream:
        return CompletionStream(
            answer, keep_alive_s=services.limits.keep_alive_s, translate=partial(translated, request), headers=admission.headers
        )
    whole = await unless_disconnected(request.receive, answer.collect())
    return Response(await encoded(whole), media_type="application/json", headers=admission.headers)


async def encoded(whole: Completion) -> bytes:
    """The answer as JSON, made in a thread where it is large.

    The encoder keeps the interpreter to itself while it runs, so a large answer is encoded choice by choice.
    """
    num_logprobs = sum(len(choice.logprobs.tokens) for choice in whole.choices if choice.logprobs is not None)
    if num_logprobs <= INLINE_LOGPROBS:
        return msgspec.json.encode(whole)

    def encode() -> bytes:
        choices = [msgspec.Raw(msgspec.json.encode(choice)) for choice in whole.choices]
        return msgspec.json.encode(msgspec.structs.replace(whole, choices=choices))

    return await asyncio.to_thread(encode)


def ignored_fields_header(names: Iterable[str], *, limit: int) -> dict[str, str]:
    """`x-ignored-fields: a, b` for fields that mean nothing here; nothing where there are none.

    At most `limit` names of at most 64 characters each, then `...`; characters a header cannot carry become `?`.
    """
    safe = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) for name in islice(names, limit + 1)]
    if not safe:
        return {}
    return {IGNORED_FIELDS_HEADER: ", ".join(safe[:limit] + ["..."] * (len(safe) > limit))}
