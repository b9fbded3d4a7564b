"""Formats that nobody enforces do not make a schema a bad one."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from llguidance import LLMatcher
from pydantic import BaseModel, SecretStr
from tiny_tokenizer import tiny_tokenizer

from engine.errors import GrammarError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from server.schema_formats import ENFORCED, without_loose_formats


def compiles(schema: dict) -> bool:
    tokenizer = GrammarTokenizer(tiny_tokenizer(), vocab_size=420, eos_token=2)
    try:
        GrammarMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except GrammarError:
        return False
    return True


def test_the_formats_that_stay_are_those_that_the_grammar_engine_knows():
    others = {
        "path",
        "password",
        "binary",
        "byte",
        "regex",
        "uri-reference",
        "json-pointer",
        "uuid4",
        "decimal",
        "int32",
        "float",
        "made-up",
    }

    assert {name for name in ENFORCED | others if compiles({"type": "string", "format": name})} == ENFORCED


def test_a_format_goes_wherever_a_schema_stands_and_the_rest_stays():
    loose, strict = {"type": "string", "format": "path", "maxLength": 3}, {"type": "string", "format": "date"}
    schema = {
        "$defs": {"a": loose},
        "properties": {"format": loose, "b": {"type": "array", "items": loose, "prefixItems": [strict]}},
        "anyOf": [loose, strict],
        "additionalProperties": loose,
    }
    bare = {"type": "string", "maxLength": 3}

    assert without_loose_formats(schema) == {
        "$defs": {"a": bare},
        "properties": {"format": bare, "b": {"type": "array", "items": bare, "prefixItems": [strict]}},
        "anyOf": [bare, strict],
        "additionalProperties": bare,
    }


def test_values_that_look_like_schemas_are_left_alone():
    schema = {"enum": [{"format": "path"}], "const": {"format": "path"}, "default": {"format": "path"}, "format": 5}

    assert without_loose_formats(schema) == schema


@pytest.mark.parametrize("kind", [Path, SecretStr, bytes, Decimal], ids=lambda kind: kind.__name__)
def test_what_pydantic_writes_of_common_types_compiles(kind: type):
    class Model(BaseModel):
        value: kind

    assert compiles(without_loose_formats(Model.model_json_schema()))
