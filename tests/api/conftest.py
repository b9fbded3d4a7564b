"""The application over an engine that follows a script: in process for single answers, on a real port where timing matters."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import structlog
from fake_engine import VOCAB_SIZE, FakeEngineClient, tiny_config
from fastapi import FastAPI
from live_server import serve_in_thread
from tiny_tokenizer import tiny_model_proto, tiny_tokenizer

from server.app import create_app
from server.grammar_check import GrammarCheck
from server.limits import Limits


@pytest.fixture(autouse=True, scope="session")
def _logs_go_where_pytest_captures_them() -> None:
    structlog.configure(logger_factory=structlog.stdlib.LoggerFactory(), cache_logger_on_first_use=False)


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


@pytest.fixture
def limits() -> Limits:
    """Short waits, so that tests of them are quick."""
    return replace(Limits(), keep_alive_s=0.05, body_timeout_s=0.3)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiny_model_proto())
    return path


@pytest.fixture
def grammar_check(tokenizer_path: Path, limits: Limits) -> GrammarCheck:
    """The application closes it."""
    return GrammarCheck(tokenizer_path=tokenizer_path, vocab_size=VOCAB_SIZE, eos_token=tiny_config().eos_token, limits=limits)


@pytest.fixture
def app(engine: FakeEngineClient, limits: Limits, grammar_check: GrammarCheck) -> FastAPI:
    return create_app(
        client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits, grammar_check=grammar_check
    )


@pytest.fixture
def idless_app(engine: FakeEngineClient, limits: Limits) -> FastAPI:
    """The application as --skip-tokenizer-init starts it."""
    return create_app(client=engine, tokenizer=None, model=tiny_config(), model_name="tiny", limits=limits)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def live_url(app: FastAPI) -> Iterator[str]:
    with serve_in_thread(app) as url:
        yield url
