"""Intake: the way in and out that all routes which generate have in common.

    async with ...: read the body, check it, hold a place      `taking_in`, the dependency of a route
    build the requests                                         `Admitted.requests`
    answer whole, or as a stream                               `respond`

The place is given back when the last byte of the answer is out.
"""

import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

from fastapi import Request
from starlette.responses import Response

from engine.types import GenerationRequest
from server.admission import Permit
from server.answers.answer import Answer
from server.errors import translated
from server.plan import GenerationPlan, Terms
from server.preprocess import Wire, build_requests, read_body, worst_case_tokens
from server.services import Services
from server.streaming import EventStream, unless_disconnected

IGNORED_FIELDS_HEADER = "x-ignored-fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A checked request that holds its place until the answer is out."""

    request_id: str
    plan: GenerationPlan
    services: Services
    permit: Permit
    arrival_s: float
    headers: dict[str, str]

    async def requests(self) -> tuple[GenerationRequest, ...]:
        """What the engine is asked. Raises like `build_requests`, and like `Admission.permit` where it is more than there is room for."""
        requests = await build_requests(
            self.plan, services=self.services, info=self.permit.info, request_id=self.request_id, arrival_s=self.arrival_s
        )
        self.permit.raise_to(worst_case_tokens(requests))
        return requests


@asynccontextmanager
async def taking_in(
    request: Request, services: Services, wire: type[Wire], check: Callable[[Wire, Terms], Awaitable[GenerationPlan]]
) -> AsyncGenerator[Admitted]:
    """Read, check and admit. Raises what is wrong with the request, `Unavailable` and `QuotaExceeded` before anything costly."""
    arrival_s = time.monotonic()
    info = services.admission.check_open()
    body = await read_body(await request.body(), wire, limits=services.limits)
    terms = Terms(
        limits=services.limits,
        info=info,
        model=services.model,
        model_name=services.model_name,
        key_tenant=getattr(request.state, "key_tenant", ""),
    )
    plan = await check(body, terms)
    num_tokens = plan.min_worst_case_tokens(max_model_len=info.max_model_len)
    with services.admission.permit(plan.num_sequences, num_tokens=num_tokens, tenant=plan.tenant) as permit:
        yield Admitted(
            request_id=request.state.request_id,
            plan=plan,
            services=services,
            permit=permit,
            arrival_s=arrival_s,
            headers=ignored_fields_header(body.unknown_fields, limit=services.limits.max_ignored_fields),
        )


async def respond(request: Request, answer: Answer, admitted: Admitted) -> Response:
    """The answer as the client wants it: streamed, or whole. A client that leaves ends it."""
    if admitted.plan.stream:
        keep_alive_s = admitted.services.limits.keep_alive_s
        return EventStream(answer, keep_alive_s=keep_alive_s, translate=partial(translated, request), headers=admitted.headers)
    content = await unless_disconnected(request.receive, answer.body())
    return Response(content, media_type="application/json", headers=admitted.headers)


def ignored_fields_header(names: Iterable[str], *, limit: int) -> dict[str, str]:
    """`x-ignored-fields: a, b` for fields that mean nothing here; nothing where there are none.

    At most `limit` names of at most 64 characters each, then `...`; characters a header cannot carry become `?`.
    """
    safe = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) for name in islice(names, limit + 1)]
    if not safe:
        return {}
    return {IGNORED_FIELDS_HEADER: ", ".join(safe[:limit] + ["..."] * (len(safe) > limit))}
