"""The documents say what the code does: fields, routes, make targets, flags, files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngineClient
from pydantic.fields import FieldInfo

from server.console import readable_number
from server.conversation import MAX_TOOLS
from server.limits import Limits
from server.observability import Metrics
from server.routes.responses import MAX_PAGE
from server.schemas.chat import ChatRequest, ConversationFields
from server.schemas.common import MAX_PRIORITY, SamplingFields
from server.schemas.completions import CompletionRequest
from server.schemas.messages import MessagesRequest
from server.schemas.responses import (
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARS,
    ResponsesRequest,
)
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from server.settings import Settings, limits_by_setting
from server.watchdog import START_SILENCE_S, STEPS_PER_TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def field_rows() -> dict[str, list[str]]:
    return {row[0].strip("`"): row for row in rows(API, "Fields of `POST /v1/completions`")}


def test_the_table_of_fields_is_the_schema():
    assert set(field_rows()) == set(CompletionRequest.model_fields)


def test_the_table_of_fields_gives_plain_defaults_as_they_are():
    for name, field in CompletionRequest.model_fields.items():
        if isinstance(field.default, bool | int | float):
            assert field_rows()[name][1] == str(field.default).lower(), name


def test_the_table_of_fields_gives_the_limits_as_they_are():
    limits = Limits()
    takes = {name: row[2].replace(",", "") for name, row in field_rows().items()}

    assert takes["logprobs"] == takes["prompt_logprobs"] == f"0 to {limits.max_logprobs}"
    assert takes["allowed_token_ids"] == f"list of 1 to {limits.max_allowed_token_ids} ids"
    assert takes["bad_words"] == f"up to {limits.max_bad_words} strings of up to {limits.max_stop_chars} characters"
    assert f"up to {limits.max_stop_strings} of up to {limits.max_stop_chars} characters" in takes["stop"]
    assert f"up to {limits.max_stop_token_ids} ids" in takes["stop_token_ids"]
    assert f"up to {limits.max_logit_bias}" in takes["logit_bias"]
    assert f"up to {limits.max_timeout_s:.0f}" in takes["timeout"]
    assert f"-{MAX_PRIORITY} to {MAX_PRIORITY}" == takes["priority"]
    assert f"1 to {limits.max_cache_salt_chars} characters" in takes["cache_salt"]


def test_the_table_of_the_tokenizers_fields_is_their_schemas():
    documented = {(row[0].strip("`"), name, row[2]) for row in rows(API, "Tokens") for name in re.findall(r"`(\w+)`", row[1])}

    def default_of(name: str, field: FieldInfo) -> str:
        if name in ConversationFields.model_fields:
            return "as in chat"
        return "required" if field.is_required() else str(field.default).lower()

    assert documented == {
        (route, name, default_of(name, field))
        for route, wire in (("/tokenize", TokenizeRequest), ("/detokenize", DetokenizeRequest))
        for name, field in wire.model_fields.items()
    }


def test_the_documents_name_every_field_that_is_refused():
    assert [name for name in CompletionRequest.refused_fields if f"`{name}`" not in API] == []


def chat_field_rows() -> dict[str, list[str]]:
    return {row[0].strip("`"): row for row in rows(API, "Chat")}


def test_the_table_of_chat_has_the_fields_that_differ_from_those_of_completions():
    shared = {
        name
        for name, field in ChatRequest.model_fields.items()
        if name in CompletionRequest.model_fields and name not in ("max_tokens", "logprobs")
    }

    assert {*chat_field_rows()} == {*ChatRequest.model_fields} - shared


def test_the_table_of_chat_gives_plain_defaults_and_limits_as_they_are():
    for name, row in chat_field_rows().items():
        if isinstance(default := ChatRequest.model_fields[name].default, bool):
            assert row[1] == str(default).lower(), name
    assert f"list of 1 to {Limits().max_messages:,} messages" == chat_field_rows()["messages"][2]
    assert f"up to {MAX_TOOLS} functions" in chat_field_rows()["tools"][2]
    assert f"0 to {Limits().max_logprobs}" in chat_field_rows()["top_logprobs"][2]


def test_the_chapter_on_chat_names_every_field_that_is_refused():
    assert [name for name in ChatRequest.refused_fields if f"`{name}`" not in API] == []


@pytest.mark.parametrize(("heading", "wire"), [("Responses", ResponsesRequest), ("Messages", MessagesRequest)])
def test_the_tables_of_responses_and_messages_have_the_fields_that_differ_from_those_of_completions(
    heading: str, wire: type[SamplingFields]
):
    documented = {row[0].strip("`"): row for row in rows(API, heading)}
    differing = {
        field.alias or name: field
        for name, field in wire.model_fields.items()
        if name not in CompletionRequest.model_fields or repr(field) != repr(CompletionRequest.model_fields[name])
    }

    assert {*documented} == {*differing}
    for name, field in differing.items():
        if isinstance(field.default, bool | int | float) or field.is_required():
            assert documented[name][1] == ("required" if field.is_required() else str(field.default).lower()), name
    assert [name for name in wire.refused_fields if f"`{name}`" not in API] == []


def test_the_documents_give_the_bounds_of_conversations_and_of_what_is_kept_as_they_are():
    limits = Limits()

    assert API.count(f"list of 1 to {limits.max_messages:,} messages") == 2
    assert API.count(f"list of up to {MAX_TOOLS} ") == 3
    assert f"{limits.max_stored_responses:,} of up to {limits.max_stored_bytes:,} bytes" in API
    assert (
        f"up to {MAX_METADATA_PAIRS} strings of up to {MAX_METADATA_VALUE_CHARS} characters, names of up to {MAX_METADATA_KEY_CHARS}" in API
    )
    assert f"`limit` 1 to {MAX_PAGE}" in API


def test_every_setting_in_the_operations_guide_exists():
    named = {name for row in rows(OPERATIONS, "Settings") for name in re.findall(r"`(\w+)`", row[1])}

    assert named <= set(Settings.model_fields)


def test_the_operations_guide_gives_times_as_they_are():
    defaults = {name: field.default for name, field in Settings.model_fields.items()}

    assert f"`engine_stall_timeout` of silence ({defaults['engine_stall_timeout']:g} s;" in OPERATIONS
    assert f"{STEPS_PER_TIMEOUT} times its largest step" in OPERATIONS
    assert f"takes {START_SILENCE_S:g} s of total silence" in OPERATIONS
    assert f"`engine_start_timeout` ({defaults['engine_start_timeout'] / 60:g} min)" in OPERATIONS
    assert f"`shutdown_notice` ({defaults['shutdown_notice']:g} s)" in OPERATIONS
    assert f"`shutdown_timeout` ({defaults['shutdown_timeout']:g} s)" in OPERATIONS


def test_the_documents_give_the_bounds_of_the_whole_server_as_they_are():
    limits = Limits()

    assert f"{limits.max_queued_sequences} sequences waiting" in API
    assert f"as many as the cache holds and {limits.max_queued_tokens:,} more" in API
    assert limits.max_queued_tokens == limits.max_queued_sequences * 8192  # "what the default queue holds at Grok-1's whole context"
    assert (limits.max_tenant_sequences, limits.max_tenant_tokens) == (None, None)  # "off unless set"


def test_the_operations_guide_has_every_limit_with_its_default():
    documented = {row[0].strip("`"): row[1] for row in rows(OPERATIONS, "Limits")}

    assert documented == {name: readable_number(value) for name, value in limits_by_setting(Limits()).items()}


def test_every_metric_in_the_operations_guide_exists():
    series = Metrics(FakeEngineClient(), model_name="m").scrape().decode()

    named = {name for row in rows(OPERATIONS, "Metrics") for name in re.findall(r"`(\w+:\w+)`", row[0])}

    assert sorted(name for name in named if name not in series) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_the_documents_exists(document: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    named = set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"```sh\n.*?```|`[^`\n]+`", document.read_text(), flags=re.DOTALL))))

    assert named <= targets


@pytest.fixture(scope="module")
def serve_help() -> str:
    command = [sys.executable, "-m", "server", "serve", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "200"}).stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_of_serve_in_the_documents_exists(document: Path, serve_help: str):
    commands = re.findall(r"grok-server serve([^`\n]*)|ARGS=\"([^\"]*)\"", document.read_text())

    flags = {flag for parts in commands for part in parts for flag in re.findall(r"(--[a-z][a-z-]+)", part)}

    assert sorted(flag for flag in flags if flag not in serve_help) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_between_documents_leads_somewhere(document: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_file_tree_of_the_readme_is_the_tree():
    tree = README.split("## Files\n", 1)[1].split("```")[1]
    listed, parents = set(), []
    for line in tree.strip().splitlines():
        if not (match := re.match(r"^( *)(\S+)", line)):
            continue
        depth, name = len(match[1]) // 2, match[2]
        parents[depth:] = [name.rstrip("/")]
        listed.add("/".join(parents))

    missing = sorted(path for path in listed if not (ROOT / path).exists())
    ours = {str(path.relative_to(ROOT)) for folder in ("server", "engine") for path in (ROOT / folder).glob("*.py")}
    unlisted = sorted(path for path in ours - listed if not path.endswith("__init__.py"))

    assert (missing, unlisted) == ([], [])
