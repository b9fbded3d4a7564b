"""Masks under grammars: whatever is drawn from them parses, and what they cost is bounded."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from numpy.random import Generator
from tiny_tokenizer import FIRST_BYTE_ID, tiny_tokenizer

from engine.errors import GrammarError
from engine.grammar import GrammarMatcher, GrammarTokenizer, num_mask_words
from engine.tokenizer import Tokenizer

DEFAULT_MODEL = Path(__file__).parents[2] / "models" / "grok-1-tiny"
RELEASED = Path(__file__).parents[3] / "shared" / "reference" / "tokenizer.model"
EOS = 2
MARKER_IDS = range(47, 69)
NUM_UNUSED = 11  # rows that the model has and the tokenizer has not

COLOURS = ["red", "green", " blue", "▁x", "é\u0001漢", "<|separator|>", None, 1.5]
NODE = {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["left"]}

SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {  # with what holds for their values
    "object": (
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        lambda value: list(value) == ["name", "age"] and len(value["name"]) <= 12 and value["age"] in range(131),
    ),
    "enum": (
        {"type": "array", "items": {"enum": COLOURS}, "minItems": 1, "maxItems": 4},
        lambda value: 1 <= len(value) <= 4 and all(each in COLOURS for each in value),
    ),
    "const": (
        {
            "type": "object",
            "properties": {"kind": {"const": "[EOS]<0x0A>\n\t  "}, "on": {"type": "boolean"}, "at": {"type": "string", "format": "date"}},
            "required": ["kind", "on", "at"],
            "additionalProperties": False,
        },
        lambda value: (
            value["kind"] == "[EOS]<0x0A>\n\t  " and isinstance(value["on"], bool) and date.fromisoformat(value["at"]) is not None
        ),
    ),
    "recursive": (
        {"$defs": {"node": NODE | {"additionalProperties": False}}, "$ref": "#/$defs/node"},
        lambda value: list(value) == ["left"],
    ),
}


def of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def grammar_tokenizer(tokenizer: Tokenizer, *, num_unused: int = 0) -> GrammarTokenizer:
    return GrammarTokenizer(tokenizer, vocab_size=tokenizer.vocab_size + num_unused, eos_token=EOS)


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="module", params=["trained in memory", "of the default model", "released"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "trained in memory":
        return tiny_tokenizer()
    path = RELEASED if request.param == "released" else DEFAULT_MODEL / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def tiny() -> GrammarTokenizer:
    return grammar_tokenizer(tiny_tokenizer(), num_unused=NUM_UNUSED)


def allowed(matcher: GrammarMatcher, tokenizer: GrammarTokenizer) -> list[int]:
    """The ids that the matcher's mask allows."""
    row = np.full(num_mask_words(tokenizer.vocab_size), -1, np.int32)
    matcher.fill_mask(row)
    return np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def walk(matcher: GrammarMatcher, tokenizer: GrammarTokenizer, rng: Generator, *, max_tokens: int = 600) -> list[int]:
    """Random tokens until nothing may follow, ending early where that is allowed now and then."""
    token_ids: list[int] = []
    while not matcher.is_stopped and len(token_ids) < max_tokens:
        choices = allowed(matcher, tokenizer)
        assert choices or matcher.is_accepting, matcher.error
        if not choices or (matcher.is_accepting and rng.random() < 0.2):
            break
        token_ids.append(int(rng.choice(choices)))
        matcher.advance(token_ids[-1])
    return token_ids


def take(matcher: GrammarMatcher, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        matcher.advance(token_id)


def spelled(tokenizer: GrammarTokenizer, token_ids: list[int]) -> str:
    return b"".join(tokenizer.tokens[token_id] for token_id in token_ids).decode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_random_walk_under_a_json_schema_parses_and_validates(tokenizer: Tokenizer, name: str, rng: Generator) -> None:
    schema, is_valid = SCHEMAS[name]
    ours = grammar_tokenizer(tokenizer)
    for _ in range(5):
        matcher = GrammarMatcher(ours, of_schema(schema))

        token_ids = walk(matcher, ours, rng)

        assert matcher.is_accepting
        assert is_valid(json.loads(spelled(ours, token_ids)))


@pytest.mark.parametrize("regex", [r"[a-z ]{3,9}", r" ?(yes|no)\.", r"[0-9]{4}-[0-9][0-9]", r"(é|漢|▁){2,5}", r"\n\n+x"])
def test_a_random_walk_under_a_regular_expression_matches_it(tokenizer: Tokenizer, regex: str, rng: Generator) -> None:
    ours = grammar_tokenizer(tokenizer)

    for _ in range(5):
        text = spelled(ours, walk(GrammarMatcher(ours, LLMatcher.grammar_from_regex(regex)), ours, rng))

        assert re.fullmatch(regex, text)


@given(text=st.text(max_size=12) | st.sampled_from(["▁", " ", "\n\n\n", "<|separator|>", "[BOS]", "<0x0A>", "a  b"]))
def test_a_forced_text_is_encoded_to_the_byte(tiny: GrammarTokenizer, text: str) -> None:
    content = text.encode(errors="replace")

    assert b"".join(tiny.tokens[token_id] for token_id in tiny(content)) == content


def test_a_free_text_may_hold_any_token_but_special_ones_and_those_that_the_tokenizer_has_not(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_regex(r"(.|\n)*"))

    first = set(allowed(matcher, tiny))
    matcher.advance(FIRST_BYTE_ID + 0xC3)
    inside_character = set(allowed(matcher, tiny))

    num_pieces = tiny.vocab_size - NUM_UNUSED
    ascii_bytes = range(FIRST_BYTE_ID, FIRST_BYTE_ID + 0x80)
    assert {0, 1, EOS, 3, *MARKER_IDS, *range(num_pieces, tiny.vocab_size)}.isdisjoint(first)
    assert {*range(4, MARKER_IDS[0]), *ascii_bytes, *range(FIRST_BYTE_ID + 256, num_pieces)} <= first
    assert inside_character == set(range(FIRST_BYTE_ID + 0x80, FIRST_BYTE_ID + 0xC0))


def test_pieces_that_spell_the_same_are_allowed_together(tiny: GrammarTokenizer) -> None:
    assert allowed(GrammarMatcher(tiny, LLMatcher.grammar_from_regex("\n?")), tiny) == [4, FIRST_BYTE_ID + 0x0A]


def test_a_grammar_may_name_a_special_token(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_lark('start: "0" <[47]>'))

    take(matcher, [14])

    assert allowed(matcher, tiny) == [47]


def test_a_model_smaller_than_its_tokenizer_is_served_with_the_tokens_it_has(rng: Generator) -> None:
    ours = GrammarTokenizer(tiny_tokenizer(), vocab_size=330, eos_token=EOS)
    matcher = GrammarMatcher(ours, of_schema({"enum": ["hello world", "the quick brown fox"]}))

    assert json.loads(spelled(ours, walk(matcher, ours, rng))) in ("hello world", "the quick brown fox")


def test_a_text_that_nothing_may_follow_stops_the_matcher(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_regex("01"))

    states = [(matcher.is_accepting, matcher.is_stopped)]
    for token in (14, 15):
        matcher.advance(token)
        states.append((matcher.is_accepting, matcher.is_stopped))

    assert states == [(False, False), (False, False), (True, True)]
    assert allowed(matcher, tiny) == []
    assert matcher.error is None


def test_a_text_that_may_end_or_go_on_is_accepted_and_its_mask_has_no_end_token(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_regex("0+"))

    matcher.advance(14)

    assert (matcher.is_accepting, matcher.is_stopped) == (True, False)
    assert allowed(matcher, tiny) == [14, FIRST_BYTE_ID + ord("0")]


def test_a_token_that_was_not_allowed_is_an_error_and_allows_nothing_more(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_regex("0+"))

    matcher.advance(15)

    assert matcher.error is not None
    assert (matcher.is_accepting, matcher.is_stopped, allowed(matcher, tiny)) == (False, False, [])


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (LLMatcher.grammar_from_regex("(a+"), "unclosed group"),
        (LLMatcher.grammar_from_lark("start: missing"), "missing"),
        (of_schema({"type": "strung"}), "strung"),
        ('{"grammars": 5}', "invalid type"),
        ("", "Empty grammar"),
        (of_schema({"required": [f"k{n}" for n in range(20_000)]}), "too big"),
    ],
    ids=["regex", "lark", "schema", "no grammar", "empty", "too large"],
)
def test_what_does_not_compile_is_refused_with_the_reason_on_one_line(tiny: GrammarTokenizer, grammar: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as refused:
        GrammarMatcher(tiny, grammar)

    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 400


def test_a_mask_past_its_limit_is_an_error_and_comes_soon(tiny: GrammarTokenizer) -> None:
    matcher = GrammarMatcher(tiny, LLMatcher.grammar_from_lark("start: e\ne: e e e | e e | /[a-z ]/"))
    slowest_s = 0.0

    for _ in range(200):
        start_s = time.thread_time()
        choices = allowed(matcher, tiny)
        if not choices:
            break
        matcher.advance(choices[0])
        slowest_s = max(slowest_s, time.thread_time() - start_s)

    assert matcher.error is not None
    assert re.search("limit|max", matcher.error)
    assert slowest_s < 2  # a tenth of it where nothing else runs


def test_other_threads_go_on_while_a_grammar_is_compiled(tiny: GrammarTokenizer) -> None:
    grammar = LLMatcher.grammar_from_json_schema({"enum": [f"word number {n} of many" for n in range(15_000)]})
    compiling = threading.Thread(target=GrammarMatcher, args=(tiny, grammar))
    num_turns = 0

    compiling.start()
    while compiling.is_alive():
        num_turns += 1

    assert num_turns > 1000
