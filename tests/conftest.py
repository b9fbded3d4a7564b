"""Settings for every test: eight fake CPU devices, so that sharding is always exercised; anyio runs the async tests on asyncio."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
