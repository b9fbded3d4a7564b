"""Wiring only, in reading order: what the routes work with, what wraps every request, the routes, the errors.

Who starts the engine, reads settings or opens a port is not here: see `server/supervisor.py` and `server/cli.py`.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.client import EngineClient
from engine.config import ModelConfig
from engine.tokenizer import Tokenizer
from server.admission import Admission
from server.api_keys import ApiKeys
from server.auth import RequireKey
from server.chat_template import ChatTemplate
from server.errors import install_error_handlers
from server.grammar_check import GrammarCheck
from server.limits import Limits
from server.middleware import BodyLimit, HeaderLimit, LastAnswers, RequestContext, TidyPath
from server.observability import Metrics
from server.response_store import ResponseStore
from server.routes import chat, completions, health, messages, metrics, models, responses, tokens
from server.services import Services

EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "x-should-retry",
    "retry-after",
    "retry-after-ms",
    "x-ignored-fields",
)  # to pages of other origins


def create_app(
    *,
    client: EngineClient,
    tokenizer: Tokenizer | None,
    model: ModelConfig,
    model_name: str,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    allowed_origins: Sequence[str] = (),
    has_metrics: bool = True,
    grammar_check: GrammarCheck | None = None,
    chat_template: ChatTemplate | None = None,
) -> FastAPI:
    """The whole HTTP side over an engine client, which need not be ready yet. Without `has_metrics`, they are `create_metrics_app`'s.

    `grammar_check` is needed where there is a tokenizer, for requests with a grammar; it is closed when the application's lifespan ends.
    `app.state.services` holds the collaborators; `app.state.services.admission.drain()` makes the app refuse new requests for good.
    """
    limits = limits or Limits()
    version = metadata.version("grok-server")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        if grammar_check is not None:
            await grammar_check.close()

    app = FastAPI(title="grok-server", version=version, redirect_slashes=False, docs_url=None, redoc_url=None, lifespan=lifespan)
    if chat_template is None and tokenizer is not None:
        chat_template = ChatTemplate.default(tokenizer, max_chars=limits.max_rendered_chars)
    admission = Admission(client, limits=limits)
    app.state.services = Services(
        client=client,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model=model,
        model_name=model_name,
        limits=limits,
        admission=admission,
        responses=ResponseStore(max_responses=limits.max_stored_responses, max_bytes=limits.max_stored_bytes),
        metrics=Metrics(client, model_name=model_name),
        grammar_check=grammar_check,
        created=int(time.time()),
        fingerprint=f"grok-server-{version}",
    )

    app.add_middleware(BodyLimit, limits=limits)  # innermost
    app.add_middleware(TidyPath)
    app.add_middleware(HeaderLimit, limits=limits)
    app.add_middleware(RequireKey, keys=keys or ApiKeys())
    if allowed_origins:  # before the keys: a browser asks for leave without one
        app.add_middleware(
            CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
        )
    app.add_middleware(LastAnswers, is_leaving=lambda: admission.is_retiring)
    app.add_middleware(RequestContext)  # outermost

    for routes in (completions, chat, responses, messages, tokens, models, health, *([metrics] if has_metrics else [])):
        app.include_router(routes.router)
    install_error_handlers(app)
    return app


def create_metrics_app(services: Services) -> FastAPI:
    """What answers on the metrics' own port: `/metrics` alone, without a key."""
    app = FastAPI(title="grok-server metrics", openapi_url=None, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.services = services
    app.add_middleware(HeaderLimit, limits=services.limits)
    app.add_middleware(RequestContext)
    app.include_router(metrics.router)
    install_error_handlers(app)
    return app
