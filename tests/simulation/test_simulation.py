"""Some seeds of the simulated world; `make simulate` lives through as many as there is time for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulate import COVERED, Failure, live, shortcomings
from world import MIN_REQUESTS, MIN_STEPS, simulate

pytestmark = pytest.mark.timeout(600)  # seconds, but not on a machine that is busy otherwise

NUM_SEEDS = 40


def test_no_invariant_breaks_and_every_fault_occurs() -> None:
    outcomes = [simulate(seed) for seed in range(NUM_SEEDS)]

    assert shortcomings(outcomes) == []
    for field in COVERED.values():
        assert sum(getattr(outcome, field) > 0 for outcome in outcomes) >= NUM_SEEDS / 5, field
    assert all(outcome.num_requests >= MIN_REQUESTS for outcome in outcomes)
    assert all(outcome.num_steps >= MIN_STEPS for outcome in outcomes)


def test_a_seed_is_the_same_world_in_every_process() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", "from world import simulate; print(simulate(7))"]
    paths = os.pathsep.join([str(here), str(here.parent / "support")])

    worlds = [
        subprocess.run(command, env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]

    assert worlds[0].stdout == worlds[1].stdout == f"{simulate(7)}\n"


def test_a_failing_seed_is_reported_with_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.EngineCore.abort", lambda core, request_id: None)  # noqa: ARG005

    failure = next(outcome for seed in range(NUM_SEEDS) if isinstance(outcome := live(seed), Failure))

    assert "an aborted sequence is still there" in failure.report
    assert "arrives" in failure.report
