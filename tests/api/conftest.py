"""The application over an engine that follows a script: in process for single answers, on a real port where timing matters."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import pytest
import structlog
from fake_engine import FakeEngineClient, tiny_config
from fastapi import FastAPI
from live_server import serve_in_thread
from tiny_tokenizer import tiny_tokenizer

from server.app import create_app
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


@pytest.fixture
def app(engine: FakeEngineClient, limits: Limits) -> FastAPI:
    return create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits)


@pytest.fixture
def idless_app(engine: FakeEngineClient, limits: Limits) -> FastAPI:
    """The application as --skip-tokenizer-init starts it."""
    return create_app(client=engine, tokenizer=None, model=tiny_config(), model_name="tiny", limits=limits)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def live_url(app: FastAPI) -> Iterator[str]:
    with serve_in_thread(app) as url:
        yield url
