"""Every refusal tells a client whether and when to come back."""

from inspect import signature
from typing import Any

import pytest

from server import errors
from server.errors import ApiError, error_body

REFUSALS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ApiError) and not kind.__name__.startswith("_")
]


def made(kind: type[ApiError]) -> ApiError:
    values: dict[str, Any] = {"message": "m", "retry_after_s": 1.5, "code": "c", "kind": "requests"}
    wanted = {name: values[name] for name in signature(kind).parameters if name in values}
    return kind(**wanted)


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_a_refusal_says_when_to_come_back_or_that_it_is_no_use(kind: type[ApiError]):
    refusal = made(kind)

    if refusal.status in (429, 503):
        assert (refusal.headers["retry-after"], refusal.headers["retry-after-ms"]) == ("2", "1500")
        assert "x-should-retry" not in refusal.headers
    elif refusal.status == 408:
        assert "x-should-retry" not in refusal.headers
    else:
        assert refusal.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_a_refusal_has_all_four_parts_of_openais_body(kind: type[ApiError]):
    error = error_body(made(kind))["error"]

    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
