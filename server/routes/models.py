"""`GET /v1/models` and `GET /v1/models/{id}`."""

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from server.plan import check_model
from server.schemas.common import json_answer
from server.schemas.models import ModelCard, ModelList
from server.services import FromApp, Services

router = APIRouter()


@router.get("/v1/models", responses=json_answer(ModelList))
@router.api_route("/v1/models", methods=["GET", "HEAD"], include_in_schema=False)
async def list_models(services: FromApp) -> Response:
    """The one model served here."""
    return Response(msgspec.json.encode(ModelList(data=[_card(services)])), media_type="application/json")


@router.get("/v1/models/{model_id:path}", responses=json_answer(ModelCard))
@router.api_route("/v1/models/{model_id:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def get_model(model_id: str, services: FromApp) -> Response:
    """One model by its id, which may hold slashes."""
    check_model(model_id, model_name=services.model_name)
    return Response(msgspec.json.encode(_card(services)), media_type="application/json")


def _card(services: Services) -> ModelCard:
    info = services.client.info
    return ModelCard(id=services.model_name, created=services.created, max_model_len=None if info is None else info.max_model_len)
