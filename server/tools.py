"""Tool calls as the model writes them: the grammar that makes it write them well, and the reader that finds them again.

A call is `<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>`; several follow one another, each in a line of
its own. The default chat template shows the model this form. Under the grammar a call that has begun is whole and its arguments are valid
by their schema, unless the generation ends in the middle of it. The endpoints that offer tools use both, through `Conversation`.
"""

import json
import re
import secrets
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from server.closed_schema import closed_schema
from server.conversation import Conversation, Tool, ToolChoice
from server.schema_formats import without_loose_formats

BEGIN, END = "<tool_call>", "</tool_call>"
_BEFORE_NAME, _BEFORE_ARGUMENTS, _AFTER_ARGUMENTS = '{"name": "', '", "arguments": ', "}" + END
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `json.dumps` and the chat template write it

# What stands between the braces, brackets and quotation marks that decide where a JSON value ends.
_PLAIN_JSON = re.compile(r'[^{}\[\]"]*')
_PLAIN_STRING = re.compile(r'[^"\\]*')


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPart:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentsPart:
    """More of a call's arguments, as they were generated; all of a call's joined are JSON text."""

    index: int
    text: str


Part = TextPart | CallPart | ArgumentsPart


class _State(Enum):
    SPACE = auto()  # white space that begins a text, or stands before a call
    TEXT = auto()
    HEAD = auto()  # behind BEGIN, up to the arguments
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments


class ToolCallReader:
    """Reads one generation as it grows. What it gives out is the same however the text was cut; each character costs constant work.

    White space at the beginning of the answer and between calls is dropped. What only looks like a call, which cannot come about under the
    grammar, is text.
    """

    def __init__(self, id_prefix: str = "call_", *, reads_calls: bool = True, drops_leading_space: bool = True) -> None:
        """Ids of calls are `id_prefix` and 24 random characters. Without `reads_calls` everything is text."""
        self.num_calls = 0
        self._id_prefix = id_prefix
        self._reads_calls = reads_calls
        self._state = _State.SPACE if drops_leading_space else _State.TEXT
        self._held = ""  # not given out yet: it may become something else
        self._depth = 0  # of the arguments' braces and brackets
        self._is_in_string = False
        self._is_escaped = False

    @classmethod
    def of(cls, conversation: Conversation, id_prefix: str = "call_", *, is_text_given_form: bool = False) -> "ToolCallReader":
        """The reader of an answer to this conversation. A text that must look like something is not touched."""
        reads_calls = bool(conversation.callable_tools)
        return cls(
            id_prefix,
            reads_calls=reads_calls,
            drops_leading_space=not conversation.continue_final_message and (reads_calls or not is_text_given_form),
        )

    @property
    def is_in_arguments(self) -> bool:
        """Whether a call has begun whose arguments are not whole."""
        return self._state is _State.ARGUMENTS

    def push(self, text: str) -> list[Part]:
        """Take more text; return what is certain now."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._step(parts):
            pass
        return _joined(parts)

    def flush(self) -> list[Part]:
        """The text has ended: return what was held back. A call that was cut short in its head is text, one cut in its tail is whole."""
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            return [TextPart(text=BEGIN + held)]
        return [TextPart(text=held)] if held and self._state is _State.TEXT else []

    def _step(self, parts: list[Part]) -> bool:
        """Take what can be taken of the held text in this state; False where more text has to come first."""
        match self._state:
            case _State.SPACE:
                return self._read_space()
            case _State.TEXT:
                return self._read_text(parts)
            case _State.HEAD:
                return self._read_head(parts)
            case _State.ARGUMENTS:
                return self._read_arguments(parts)
            case _State.TAIL:
                return self._read_tail()

    def _read_space(self) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._state = _State.TEXT
        return bool(self._held)

    def _read_text(self, parts: list[Part]) -> bool:
        if not self._reads_calls:
            return self._give_text(parts, len(self._held))
        begin = self._held.find(BEGIN)
        if begin < 0:
            self._give_text(parts, len(self._held) - _overlap(self._held, BEGIN))
            return False
        self._give_text(parts, begin)
        self._held = self._held[len(BEGIN) :]
        self._state = _State.HEAD
        return True

    def _read_head(self, parts: list[Part]) -> bool:
        found = _HEAD.match(self._held)
        if found is not None:
            self._held = self._held[found.end() :]
            parts.append(CallPart(index=self.num_calls, id=f"{self._id_prefix}{secrets.token_hex(12)}", name=found[1]))
            self.num_calls += 1
            self._state = _State.ARGUMENTS
            return True
        if _can_become_head(self._held):
            return False
        parts.append(TextPart(text=BEGIN))
        self._state = _State.TEXT
        return True

    def _read_arguments(self, parts: list[Part]) -> bool:
        end = self._end_of_arguments()
        taken = len(self._held) if end is None else end
        if taken:
            parts.append(ArgumentsPart(index=self.num_calls - 1, text=self._held[:taken]))
        self._held = self._held[taken:]
        if end is not None:
            self._state = _State.TAIL
        return end is not None

    def _end_of_arguments(self) -> int | None:
        """Where in the held text the arguments end, if they do. Remembers the state of the JSON up to there."""
        position = 0
        while position < len(self._held):
            if self._is_in_string:
                position = self._pass_string(position)
                continue
            position = _end_of(_PLAIN_JSON, self._held, position)
            if position == len(self._held):
                break
            char = self._held[position]
            position += 1
            if char == '"':
                self._is_in_string = True
            else:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    self._depth = 0
                    return position
        return None

    def _pass_string(self, position: int) -> int:
        """Where the string goes on, or the text behind it begins."""
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        position = _end_of(_PLAIN_STRING, self._held, position)
        if position < len(self._held):
            self._is_escaped = self._held[position] == "\\"
            self._is_in_string = self._is_escaped
            position += 1
        return position

    def _read_tail(self) -> bool:
        if self._held.startswith(_AFTER_ARGUMENTS):
            self._held = self._held[len(_AFTER_ARGUMENTS) :]
        elif _AFTER_ARGUMENTS.startswith(self._held):
            return False
        self._state = _State.SPACE
        return True

    def _give_text(self, parts: list[Part], end: int) -> bool:
        if end:
            parts.append(TextPart(text=self._held[:end]))
        self._held = self._held[end:]
        return False


def tools_grammar(conversation: Conversation, *, text_grammar: str | None = None) -> str | None:
    """The llguidance grammar of an answer to this conversation; `text_grammar`, where given, is that of an answer in text, as
    llguidance serializes a JSON schema.

    With `tool_choice` auto a text, with free text also one that ends in calls; otherwise calls alone. Where no tool may be called, the
    grammar of the text, if any. Nothing is checked here: a schema may be one that llguidance refuses.
    """
    tools = conversation.callable_tools
    if not tools:
        return text_grammar
    may_repeat = conversation.parallel_tool_calls and isinstance(conversation.tool_choice, ToolChoice)  # a named tool is called once
    calls = 'call ("\\n" call)*' if may_repeat else "call"
    grammars: list[dict[str, Any]] = []
    if conversation.must_call:
        lines = [f"start: / ?/ {calls}"]
    elif text_grammar is not None:
        lines = [f"start: @text | / ?/ {calls}"]
        grammars.append({**_single(text_grammar), "name": "text"})
    else:
        # The lazy rule ends at the first BEGIN, and wins over the text there.
        lines = [f"start: TEXT | begun {calls.replace('call', 'rest', 1)}", r"TEXT: /(.|\n)*/", rf"begun[lazy]: /(.|\n)*{BEGIN}/"]
    lines += [f"call: {_quoted(BEGIN)} rest", "rest: " + " | ".join(f"rest_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        head = _quoted(_BEFORE_NAME + tool.name + _BEFORE_ARGUMENTS)
        lines.append(f"rest_{index}: {head} @arguments_{index} {_quoted(_AFTER_ARGUMENTS)}")
        grammars.append({"name": f"arguments_{index}", "json_schema": _arguments_schema(tool)})
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": "\n".join(lines)}, *grammars]})


def _single(grammar: str) -> dict[str, Any]:
    """A serialized grammar, as a member of a larger one."""
    (member,) = json.loads(grammar)["grammars"]
    return member


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        **closed_schema(without_loose_formats(tool.parameters)),
        "x-guidance": _COMPACT | {"lenient": not tool.strict},
    }


def _quoted(text: str) -> str:
    """A literal in a Lark grammar; JSON's escapes are Lark's."""
    return json.dumps(text)


_HEAD = re.compile(f"{re.escape(_BEFORE_NAME)}([a-zA-Z0-9_-]{{1,64}}){re.escape(_BEFORE_ARGUMENTS)}")


def _can_become_head(text: str) -> bool:
    if len(text) <= len(_BEFORE_NAME):
        return _BEFORE_NAME.startswith(text)
    if not text.startswith(_BEFORE_NAME):
        return False
    name = re.match(r"[a-zA-Z0-9_-]{0,64}", text[len(_BEFORE_NAME) :])
    assert name is not None, "the empty name matches"
    rest = text[len(_BEFORE_NAME) + name.end() :]
    return not rest or (bool(name[0]) and _BEFORE_ARGUMENTS.startswith(rest))


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return position if found is None else found.end()


def _overlap(text: str, mark: str) -> int:
    """How much of `mark` the text ends with, less than all of it."""
    longest = min(len(mark) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring texts as one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and joined and isinstance(last := joined[-1], TextPart):
            joined[-1] = TextPart(text=last.text + part.text)
        else:
            joined.append(part)
    return joined
