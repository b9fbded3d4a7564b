"""`GET /metrics` for Prometheus."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.services import FromApp

router = APIRouter()


@router.get("/metrics")
@router.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
async def metrics(services: FromApp) -> Response:
    """All series in the text exposition format."""
    return Response(services.metrics.scrape(), media_type=CONTENT_TYPE_LATEST)
