"""The chapter on chat says what the code does: fields, defaults, limits, what is refused."""

from test_docs import API, rows

from server.conversation import MAX_TOOLS
from server.limits import Limits
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest


def field_rows() -> dict[str, list[str]]:
    return {row[0].strip("`"): row for row in rows(API, "Chat")}


def test_the_table_has_the_fields_that_differ_from_those_of_completions():
    shared = {
        name
        for name, field in ChatRequest.model_fields.items()
        if name in CompletionRequest.model_fields and name not in ("max_tokens", "logprobs")
    }

    assert {*field_rows()} == {*ChatRequest.model_fields} - shared


def test_the_table_gives_plain_defaults_and_limits_as_they_are():
    for name, row in field_rows().items():
        if isinstance(default := ChatRequest.model_fields[name].default, bool):
            assert row[1] == str(default).lower(), name
    assert f"list of 1 to {Limits().max_messages:,} messages" == field_rows()["messages"][2]
    assert f"up to {MAX_TOOLS} functions" in field_rows()["tools"][2]
    assert f"0 to {Limits().max_logprobs}" in field_rows()["top_logprobs"][2]


def test_the_chapter_names_every_field_that_is_refused():
    assert [name for name in ChatRequest.refused_fields if f"`{name}`" not in API] == []
