"""What the routes work with, made once by `create_app` and handed to each route that asks for it."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from engine.client import EngineClient
from engine.config import ModelConfig
from engine.tokenizer import Tokenizer
from server.admission import Admission
from server.chat_template import ChatTemplate
from server.grammar_check import GrammarCheck
from server.limits import Limits
from server.observability import Metrics
from server.response_store import ResponseStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The collaborators of one application."""

    client: EngineClient
    tokenizer: Tokenizer | None  # None with --skip-tokenizer-init
    chat_template: ChatTemplate | None  # None without a tokenizer
    model: ModelConfig
    model_name: str
    limits: Limits
    admission: Admission
    metrics: Metrics
    responses: ResponseStore
    grammar_check: GrammarCheck | None  # None without a tokenizer
    created: int  # unix seconds at which this model was first offered
    fingerprint: str


async def _of_app(request: Request) -> Services:
    return request.app.state.services  # async, because FastAPI sends a plain function to a thread


FromApp = Annotated[Services, Depends(_of_app)]
