"""`/livez`: this process answers. `/readyz` and `/health`: requests are taken, or how far the start has come."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from engine.types import Progress
from server.errors import Unavailable
from server.services import FromApp

router = APIRouter()


@router.get("/livez")
@router.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> JSONResponse:
    """200 for as long as the event loop turns."""
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
@router.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
@router.get("/health")
@router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz(services: FromApp) -> JSONResponse:
    """200 while requests are taken; else 503 with the reason, and the phase and percentage of a start."""
    try:
        services.admission.check_ready()
    except Unavailable as reason:
        body = {"status": reason.code, **_progress(services.client.progress)}
        return JSONResponse(body, status_code=503, headers=reason.headers)
    return JSONResponse({"status": "ready", "model": services.model_name})


def _progress(progress: Progress | None) -> dict[str, Any]:
    if progress is None:
        return {"phase": None, "percent": None}
    body: dict[str, Any] = {"phase": progress.phase, "percent": round(progress.percent, 1)}
    body |= {"done": progress.done, "total": progress.total, "unit": progress.unit}
    if progress.tensors_total:
        body |= {"tensors_done": progress.tensors_done, "tensors_total": progress.tensors_total}
    if progress.per_second and progress.left_s is not None:
        body |= {"per_second": round(progress.per_second), "left_s": round(progress.left_s, 1)}
    return body
