"""`/v1/responses`: make a response, and what is kept of it: read it, list what it came from, delete it."""

from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response as HttpResponse

from server.answers.responses import ResponseAnswer
from server.errors import InvalidRequest, ResponseNotFound, shown
from server.intake import Admitted, respond, taking_in
from server.plan import Terms
from server.response_store import StoredResponse
from server.responses_input import ResponsePlan, check_response
from server.schemas.common import json_answer, json_request
from server.schemas.responses import DeletedResponse, ItemList, Response, ResponsesRequest
from server.services import FromApp, Services
from server.truncation import fitting_requests

router = APIRouter()

MAX_PAGE = 100  # items


async def admitted(request: Request, services: FromApp) -> AsyncIterator[Admitted]:
    """FastAPI leaves this after the last byte of the answer, which gives the place back."""

    async def check(body: ResponsesRequest, terms: Terms) -> ResponsePlan:
        return await check_response(body, terms, services, request_id=request.state.request_id)

    async with taking_in(request, services, ResponsesRequest, check) as admitted:
        yield admitted


@router.post("/v1/responses", openapi_extra=json_request(ResponsesRequest), responses=json_answer(Response))
async def create_response(request: Request, services: FromApp, admitted: Annotated[Admitted, Depends(admitted)]) -> HttpResponse:
    """Go on with a conversation, and keep it for the next request."""
    plan = admitted.plan
    assert isinstance(plan, ResponsePlan), "the check above gives one"
    requests = await fitting_requests(admitted, plan)
    answer = ResponseAnswer(plan, requests, services=services, request_id=admitted.request_id)
    return await respond(request, answer, admitted)


@router.get("/v1/responses/{response_id}", responses=json_answer(Response))
async def get_response(request: Request, services: FromApp, response_id: str, stream: bool = False) -> HttpResponse:
    """A response as it was answered."""
    if stream:
        raise InvalidRequest("a kept response is whole and cannot be streamed again: leave stream out", param="stream")
    return _json(_stored(request, services, response_id).body)


@router.delete("/v1/responses/{response_id}", responses=json_answer(DeletedResponse))
async def delete_response(request: Request, services: FromApp, response_id: str) -> HttpResponse:
    """Forget a response. Later ones of its conversation keep what they came from."""
    if not services.responses.delete(response_id, tenant=_owner(request)):
        raise _not_found(response_id)
    return _json(msgspec.json.encode(DeletedResponse(id=response_id)))


@router.get("/v1/responses/{response_id}/input_items", responses=json_answer(ItemList))
async def list_input_items(
    request: Request,
    services: FromApp,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> HttpResponse:
    """What a response was generated from, in pages: the newest first unless asked otherwise."""
    items = list(_stored(request, services, response_id).input)
    if order == "desc":
        items.reverse()
    ids = [msgspec.json.decode(item, type=_WithId).id for item in items]
    if after is not None and after not in ids:
        raise InvalidRequest(f"after: there is no item {shown(after)} in this response", param="after")
    first = 0 if after is None else ids.index(after) + 1
    page, page_ids = items[first : first + limit], ids[first : first + limit]
    answer = ItemList(
        data=list(map(msgspec.Raw, page)),
        first_id=page_ids[0] if page_ids else "",
        last_id=page_ids[-1] if page_ids else "",
        has_more=len(items) > first + limit,
    )
    return _json(msgspec.json.encode(answer))


@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
async def cancel_response(request: Request, services: FromApp, response_id: str) -> HttpResponse:
    """Only a response in the background can be cancelled, and there is none: closing the connection ends any other."""
    _stored(request, services, response_id)
    raise InvalidRequest("Cannot cancel a synchronous response: it is over, and closing the connection would have ended it")


class _WithId(msgspec.Struct):
    id: str


def _owner(request: Request) -> str:
    """Whose responses a request may see: those of its API key; without keys there is one owner."""
    return request.state.key_tenant


def _stored(request: Request, services: Services, response_id: str) -> StoredResponse:
    response = services.responses.get(response_id, tenant=_owner(request))
    if response is None:
        raise _not_found(response_id)
    return response


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id {shown(response_id)} not found.")


def _json(content: bytes) -> HttpResponse:
    return HttpResponse(content, media_type="application/json")
