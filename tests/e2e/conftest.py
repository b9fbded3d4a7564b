"""One server per model and test process, shared by all end-to-end tests."""

from collections.abc import Iterator

import pytest
from server_process import ROOT, RunningServer, running_server


@pytest.fixture(scope="session")
def tiny_a_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The reference checkpoint in float32, token ids only."""
    model = ROOT / "tests" / "data" / "tiny-a"
    with running_server(tmp_path_factory.mktemp("tiny-a"), "--model", str(model), "--skip-tokenizer-init", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The default model with default flags."""
    with running_server(tmp_path_factory.mktemp("default")) as server:
        yield server
