"""Tool calls: what the grammar lets a model write, and what the reader finds in it."""

import json
import random
from functools import cache
from itertools import pairwise

import llguidance
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from engine.grammar import GrammarMatcher, GrammarTokenizer
from server.conversation import Conversation, Tool, ToolChoice, Turn
from server.tools import ArgumentsPart, CallPart, Part, TextPart, ToolCallReader, tools_grammar

ASK = Turn(role="user", text="Hello")
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
WEATHER = Tool(name="get_weather", parameters=CITY | {"additionalProperties": False})
CLOCK = Tool(name="get_time")
ROME = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
NOW = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'


@cache
def byte_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def grammar(*tools: Tool, **fields: object) -> str:
    text_grammar = fields.pop("text_grammar", None)
    found = tools_grammar(Conversation(turns=(ASK,), tools=tools, **fields), text_grammar=text_grammar)
    assert found is not None
    return found


def takes(grammar: str, text: str) -> bool:
    """Whether the grammar takes the whole text and lets it end there."""
    matcher = llguidance.LLMatcher(byte_tokenizer(), grammar)
    assert not matcher.is_error(), matcher.get_error()
    content = text.encode()
    return matcher.try_consume_tokens(list(content)) == len(content) and matcher.is_accepting()


def read(*pieces: str, **options: bool) -> list[Part]:
    reader = ToolCallReader(**options)
    return [part for piece in pieces for part in reader.push(piece)] + reader.flush()


def summary(parts: list[Part]) -> tuple[str, list[tuple[str, str]]]:
    """(text, calls as name and arguments) of an answer."""
    calls = {part.index: part.name for part in parts if isinstance(part, CallPart)}
    arguments = {index: "".join(p.text for p in parts if isinstance(p, ArgumentsPart) and p.index == index) for index in calls}
    return "".join(p.text for p in parts if isinstance(p, TextPart)), [(name, arguments[index]) for index, name in calls.items()]


def test_without_tools_that_may_be_called_there_is_no_grammar():
    assert tools_grammar(Conversation(turns=(ASK,))) is None
    assert tools_grammar(Conversation(turns=(ASK,), tools=(CLOCK,), tool_choice=ToolChoice.NONE)) is None
    assert tools_grammar(Conversation(turns=(ASK,)), text_grammar='start: "a"') == 'start: "a"'


def test_a_required_answer_is_one_or_more_calls():
    required = grammar(WEATHER, CLOCK, tool_choice=ToolChoice.REQUIRED)

    for answer in (ROME, NOW, f" {ROME}", f"{ROME}\n{NOW}\n{ROME}"):
        assert takes(required, answer)
    for answer in ("", "Hello", f"Well {ROME}", f"{ROME} and", ROME[:-1], f"{ROME}{NOW}"):
        assert not takes(required, answer)


def test_without_parallel_calls_there_is_one():
    single = grammar(WEATHER, CLOCK, tool_choice=ToolChoice.REQUIRED, parallel_tool_calls=False)
    free = grammar(WEATHER, CLOCK, parallel_tool_calls=False)

    for one in (single, free):
        assert takes(one, ROME)
        assert not takes(one, f"{ROME}\n{NOW}")


def test_a_named_tool_is_the_only_one_and_called_once():
    named = grammar(WEATHER, CLOCK, tool_choice="get_time")

    assert takes(named, NOW)
    assert not takes(named, ROME)
    assert not takes(named, f"{NOW}\n{NOW}")


def test_a_free_answer_is_text_that_may_end_in_calls():
    free = grammar(WEATHER, CLOCK)

    for answer in (
        "",
        "Hello",
        "1 < 2 <tool",
        "<tool_call",
        "<tool_calls>",
        ROME,
        f"Let me see.\n{ROME}",
        f"Well {NOW}\n{ROME}",
        "a" * 3000,
    ):
        assert takes(free, answer)
    for answer in ("<tool_call>", "<tool_call>x", f"{ROME} done", f"Well {ROME[:-1]}", f"Well {ROME}\n", f"{ROME}<tool_call>"):
        assert not takes(free, answer)


def test_arguments_keep_to_their_schema():
    required = grammar(WEATHER, tool_choice=ToolChoice.REQUIRED)

    def call(arguments: str) -> str:
        return f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>'

    assert takes(required, call('{"city": "}</tool_call>\\n<tool_call>"}'))
    for wrong in ("{}", '{"city": 5}', '{"city": "Rome", "more": 1}', '{"city":"Rome"}', '{ "city": "Rome"}', '"Rome"', ""):
        assert not takes(required, call(wrong))


def test_arguments_hold_what_is_listed_and_nothing_else():
    listed = Tool(name="a", parameters={"type": "object", "properties": {"now": {"type": "boolean"}}, "required": ["now"]})
    required = grammar(listed, tool_choice=ToolChoice.REQUIRED)

    assert takes(required, '<tool_call>{"name": "a", "arguments": {"now": true}}</tool_call>')
    assert not takes(required, '<tool_call>{"name": "a", "arguments": {"now": true, "x": 1}}</tool_call>')


def test_arguments_are_an_object_whatever_the_schema_leaves_open():
    loose = Tool(name="a", parameters={})
    referring = Tool(
        name="b", parameters={"$ref": "#/$defs/B", "$defs": {"B": {"type": "object", "properties": {"n": {"type": "integer"}}}}}
    )
    required = grammar(loose, referring, tool_choice=ToolChoice.REQUIRED)

    assert takes(required, '<tool_call>{"name": "a", "arguments": {"x": [1, {"y": null}]}}</tool_call>')
    assert takes(required, '<tool_call>{"name": "b", "arguments": {"n": 1}}</tool_call>')
    assert not takes(required, '<tool_call>{"name": "a", "arguments": [1]}</tool_call>')
    assert not takes(required, '<tool_call>{"name": "b", "arguments": {"n": "1"}}</tool_call>')


def test_a_strict_tool_takes_no_schema_that_cannot_be_enforced():
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}

    def is_refused(**fields: bool) -> bool:
        return llguidance.LLMatcher.validate_grammar_with_warnings(grammar(Tool(name="a", parameters=parameters, **fields)))[0]

    assert is_refused(strict=True)
    assert not is_refused(strict=False)


def test_a_client_cannot_set_the_compilers_options():
    sneaky = Tool(name="a", parameters=CITY | {"x-guidance": {"whitespace_flexible": True}})

    assert not takes(grammar(sneaky, tool_choice=ToolChoice.REQUIRED), '<tool_call>{"name": "a", "arguments": {"city":   "x"}}</tool_call>')


def test_text_with_a_grammar_of_its_own_stands_beside_the_calls():
    text_grammar = llguidance.LLMatcher.grammar_from_json_schema({"enum": ["aha"]})
    free = grammar(WEATHER, text_grammar=text_grammar)
    required = grammar(WEATHER, tool_choice=ToolChoice.REQUIRED, text_grammar=text_grammar)

    assert takes(free, '"aha"')
    assert takes(free, ROME)
    assert not takes(free, f'"aha"{ROME}')
    assert not takes(free, "oho")
    assert takes(required, ROME)
    assert not takes(required, '"aha"')


def test_128_tools_make_one_grammar():
    tools = tuple(Tool(name=f"tool_{n}", parameters=CITY) for n in range(128))

    assert takes(grammar(*tools), '<tool_call>{"name": "tool_127", "arguments": {"city": "x"}}</tool_call>')


def test_text_alone_comes_through_as_it_comes():
    reader = ToolCallReader()

    assert reader.push(" Yes") == [TextPart(text="Yes")]
    assert reader.push(", no \n") == [TextPart(text=", no \n")]
    assert reader.flush() == []
    assert reader.num_calls == 0


def test_space_before_an_answer_is_kept_where_it_goes_on():
    assert read("\n ", " Hi") == [TextPart(text="Hi")]
    assert read(" Hi", drops_leading_space=False) == [TextPart(text=" Hi")]
    assert read(" \n") == []


def test_a_call_is_told_when_its_arguments_begin_and_then_as_they_come():
    reader = ToolCallReader("toolu_")

    assert reader.push('Well.<tool_call>{"name": "get_weather", "argu') == [TextPart(text="Well.")]
    (call,) = reader.push('ments": ')
    assert reader.push('{"ci') == [ArgumentsPart(index=0, text='{"ci')]
    assert reader.push('ty": 1}') == [ArgumentsPart(index=0, text='ty": 1}')]
    assert reader.push("}</tool_") == []
    assert reader.push("call>\n") == []
    assert reader.flush() == []
    assert isinstance(call, CallPart)
    assert (call.index, call.name, call.id[:6], len(call.id)) == (0, "get_weather", "toolu_", 30)
    assert reader.num_calls == 1


def test_calls_are_numbered_and_have_ids_of_their_own():
    parts = read(f"{ROME}\n{NOW}")

    calls = [part for part in parts if isinstance(part, CallPart)]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert summary(parts) == ("", [("get_weather", '{"city": "Rome", "days": 3}'), ("get_time", "{}")])


def test_what_ends_a_value_does_not_end_it_within_a_string():
    arguments = '{"a": "}]\\"}</tool_call>\\\\", "b": [[{}], "{["]}'

    assert summary(read(f'<tool_call>{{"name": "x", "arguments": {arguments}}}</tool_call>')) == ("", [("x", arguments)])


@pytest.mark.parametrize(
    "text", ["1 < 2", "a <tool", "<tool_call", "<tool_calls>", "<<tool_call", "<tool_call>{}", '<tool_call>{"name": ""']
)
def test_what_only_looks_like_a_call_is_text(text: str):
    assert summary(read(text)) == (text, [])
    assert summary(read(*text)) == (text, [])


def test_a_call_behind_what_only_looked_like_one_is_found():
    assert summary(read(f"<tool_call>? <tool_call{ROME}")) == (
        "<tool_call>? <tool_call",
        [("get_weather", '{"city": "Rome", "days": 3}')],
    )


def test_without_tools_a_call_is_text():
    assert summary(read(*ROME, reads_calls=False)) == (ROME, [])


def test_a_call_cut_short_keeps_what_it_has():
    in_head = ROME[: ROME.index("weather")]
    in_arguments = ROME[: ROME.index("days")]
    in_tail = ROME[:-3]

    assert summary(read(*in_head)) == (in_head, [])
    assert summary(read(*in_arguments)) == ("", [("get_weather", '{"city": "Rome", "')])
    assert summary(read(*in_tail)) == ("", [("get_weather", '{"city": "Rome", "days": 3}')])


def test_the_conversation_says_how_its_answer_is_read():
    def answer(text: str, **fields: object) -> tuple[str, list[tuple[str, str]]]:
        reader = ToolCallReader.of(Conversation(turns=(ASK,), tools=(CLOCK,), **fields))
        return summary(reader.push(text) + reader.flush())

    assert answer(f" {NOW}") == ("", [("get_time", "{}")])
    assert answer(f" {NOW}", tool_choice=ToolChoice.NONE) == (NOW, [])
    assert answer(" on", continue_final_message=True, add_generation_prompt=False) == (" on", [])


JSON = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=6), st.sampled_from(("</tool_call>", "<tool_call>", '"}', "\\"))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,8}", fullmatch=True), st.dictionaries(st.text(max_size=3), JSON)), max_size=3)
TEXT = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(("<tool_call", "<", "{"))), max_size=4).map("".join)


@given(text=TEXT, calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=30), ascii_only=st.booleans())
def test_however_it_is_cut_the_same_is_read(text: str, calls: list[tuple[str, dict[str, object]]], cuts: list[int], ascii_only: bool):
    written = [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]
    whole = text + "\n".join(f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>' for name, arguments in written)
    places = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]

    parts = read(*(whole[begin:end] for begin, end in pairwise(places)))

    assert summary(parts) == (text.lstrip(), written)
    assert all(part.text for part in parts if not isinstance(part, CallPart))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_tokens_are_chosen_a_call_comes_out_whole(seed: int):
    bounded = Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    )
    chance = random.Random(seed)
    tokenizer = tiny_tokenizer()
    known = GrammarTokenizer(tokenizer, vocab_size=tokenizer.vocab_size, eos_token=2)
    matcher = GrammarMatcher(known, grammar(bounded, CLOCK, tool_choice=ToolChoice.REQUIRED, parallel_tool_calls=False))
    row = np.zeros(known.num_mask_words, np.int32)
    chosen: list[int] = []

    matcher.fill_mask(row)
    while row.any():
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        chosen.append(chance.choice([int(token) for token in allowed]))
        matcher.advance(chosen[-1])
        matcher.fill_mask(row)

    assert matcher.is_accepting
    text, ((name, arguments),) = summary(read(b"".join(map(tokenizer.token_bytes, chosen)).decode()))
    assert text == ""
    found = json.loads(arguments)
    assert found == {} if name == "get_time" else (len(found["city"]) <= 6 and found["days"] in (1, 2, 3))
