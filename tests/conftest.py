"""Settings for every test: eight fake CPU devices, so that sharding is always exercised; shapes checked; async tests run on asyncio."""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# Before any of these modules is imported. The checker may be missing, as where only the runtime is installed.
if find_spec("jaxtyping") and find_spec("beartype"):
    from jaxtyping import install_import_hook

    os.environ.setdefault("GROK_SERVER_CHECK_SHAPES", "1")
    install_import_hook(("engine.model", "engine.ops", "engine.sampling"), "beartype.beartype")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
