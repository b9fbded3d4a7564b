"""What the log shows of a failure, and what it does not."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
import structlog
from server.observability import configure_logging

configure_logging(as_json=sys.argv[1] == "json")

def fail():
    prompt = "Tell nobody"
    raise ValueError("broken")

try:
    fail()
except ValueError as error:
    structlog.get_logger("server").error("a request failed", exc_info=error)
    logging.getLogger("uvicorn.error").error("an application failed", exc_info=error)
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_failure_is_logged_with_its_traceback_and_without_any_variables_value(form: str):
    log = subprocess.run([sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, check=True).stderr

    assert log.count("in fail") == log.count("ValueError: broken") == 2
    assert "Tell nobody" not in log
