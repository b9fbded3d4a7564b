"""Chat templates: a `Conversation` becomes the prompt of its next turn, by a Jinja template in Hugging Face's conventions.

`create_app` is handed one `ChatTemplate` for the server's life; the chat-like endpoints render with it. Templates published for other
servers work unchanged: they get `messages`, `tools`, `add_generation_prompt`, `bos_token`, `eos_token` and the like, `raise_exception`,
`strftime_now`, `tojson`, loop controls and `{% generation %}`.

No message can forge a turn. Where the template's own source spells a special token (`<|separator|>`), that spelling is replaced, before it
is compiled, by a sentinel of private characters that are random in each process. The rendered text is cut at the sentinels into a
`RenderedPrompt`: the ids of special tokens, and runs of text, which are encoded with special parsing off. So whatever a message spells, it
stays text. Text may still read like the beginning of a turn ("Human: ..."), but a turn ends at its separator's id, and no text has that.

The template comes from the operator and is trusted as far as its configuration is; what it renders is not. It runs in Jinja's immutable
sandbox, and stops at `max_chars` of output.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import ConfigError
from engine.tokenizer import Tokenizer
from server.conversation import Conversation, Tool, Turn
from server.errors import InvalidRequest, shortened
from server.limits import Limits
from server.plan import RenderedPrompt

SEPARATOR = "<|separator|>"
DEFAULT_MAX_CHARS = Limits().max_rendered_chars
INLINE_CHARS = 16 * 1024  # of messages and tools; more is rendered in a thread
MAX_REASON_CHARS = 200  # of what a template says when it refuses a conversation
RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})

_PRIVATE_USE = 0xF0000  # a plane of characters that no text means anything by: not cased, not white space
_SENTINEL_CHARS = 8


class ChatTemplate:
    """A compiled template for one tokenizer. Immutable, safe to share between threads."""

    def __init__(self, source: str, *, tokenizer: Tokenizer, max_chars: int = DEFAULT_MAX_CHARS) -> None:
        """Raises `ConfigError` with one line where the template does not compile."""
        self.source = source
        self._max_chars = max_chars
        self._ids = tokenizer.special_tokens
        self._sentinels = {token: _new_sentinel() for token in self._ids}
        self._environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
        self._environment.globals.update(  # pyright: ignore[reportUnknownMemberType]
            {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        )
        try:
            self._template = self._environment.from_string(self._with_sentinels(source))
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            where = "" if line is None else f", line {line}"
            raise ConfigError(f"--chat-template{where}: {self._with_spellings(' '.join(str(error).split()))}") from None

    @classmethod
    def default(cls, tokenizer: Tokenizer, *, max_chars: int = DEFAULT_MAX_CHARS) -> "ChatTemplate":
        """Grok's own format."""
        source = resources.files("server").joinpath("templates", "grok-1.jinja").read_text(encoding="utf-8")
        return cls(source, tokenizer=tokenizer, max_chars=max_chars)

    @classmethod
    def chosen(cls, choice: str, *, tokenizer: Tokenizer, max_chars: int = DEFAULT_MAX_CHARS) -> "ChatTemplate":
        """The template that `--chat-template` means: a file, or the template itself.

        Raises `ConfigError` where it is neither, or does not compile.
        """
        return cls(_source_of(choice), tokenizer=tokenizer, max_chars=max_chars)

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """The tokens that end the assistant's turn, beside the end of the document."""
        return (self._ids[SEPARATOR],) if SEPARATOR in self._ids else ()

    def render(
        self, conversation: Conversation, *, variables: Mapping[str, Any] | None = None, turns_param: str = "messages"
    ) -> RenderedPrompt:
        """The prompt of the next turn; `variables` are further names for the template (`chat_template_kwargs`).

        `turns_param` is the field that the turns are from.

        Raises `InvalidRequest` where the template refuses the conversation, cannot render it, or renders too much.
        """
        variables = variables or {}
        if taken := sorted(variables.keys() & (RESERVED_NAMES | self._token_names.keys())):
            raise InvalidRequest(f"chat_template_kwargs: {taken[0]} is the template's own name", param="chat_template_kwargs")
        mark = _new_sentinel() if conversation.continue_final_message else ""
        text = self._text_of(
            {
                **variables,
                **self._token_names,
                "messages": _messages(conversation.turns, mark=mark),
                "tools": [_described(tool) for tool in conversation.callable_tools] or None,
                "documents": None,
                "add_generation_prompt": conversation.add_generation_prompt,
            },
            turns_param=turns_param,
        )
        if mark:
            text, found, _ = text.partition(mark)
            if not found:
                raise InvalidRequest(
                    "continue_final_message: the chat template does not show the last message", param="continue_final_message"
                )
        return self._cut(text)

    async def render_off_loop(
        self, conversation: Conversation, *, variables: Mapping[str, Any] | None = None, turns_param: str = "messages"
    ) -> RenderedPrompt:
        """The same, in a thread where there is much to render."""
        num_chars = sum(len(turn.text) + sum(len(call.arguments) for call in turn.tool_calls) + 64 for turn in conversation.turns)
        if num_chars <= INLINE_CHARS and not conversation.callable_tools and not variables:
            return self.render(conversation, turns_param=turns_param)
        return await asyncio.to_thread(self.render, conversation, variables=variables, turns_param=turns_param)

    def _text_of(self, names: Mapping[str, Any], *, turns_param: str) -> str:
        pieces: list[str] = []
        room = self._max_chars
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise InvalidRequest(
                        f"the conversation is more than {self._max_chars:,} characters as the chat template writes it", param=turns_param
                    )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = shortened(self._with_spellings(" ".join(str(error).split())), MAX_REASON_CHARS)
            raise InvalidRequest(f"the chat template does not take this conversation: {reason}", param=turns_param) from None
        return "".join(pieces)

    def _cut(self, text: str) -> RenderedPrompt:
        runs = self._at_sentinels.split(text)
        return tuple(self._ids_by_sentinel.get(run, run) for run in runs if run)

    def _with_sentinels(self, source: str) -> str:
        return self._at_spellings.sub(lambda found: self._sentinels[found[0]], source)

    def _with_spellings(self, text: str) -> str:
        return self._at_sentinels.sub(lambda found: self._spellings[found[0]], text)

    @cached_property
    def _token_names(self) -> dict[str, str]:
        """`bos_token` and the like, as far as the tokenizer has them under Grok's spellings."""
        names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        return {name: self._sentinels.get(spelling, "") for name, spelling in names.items()}

    @cached_property
    def _spellings(self) -> dict[str, str]:
        return {sentinel: token for token, sentinel in self._sentinels.items()}

    @cached_property
    def _ids_by_sentinel(self) -> dict[str, int]:
        return {sentinel: self._ids[token] for token, sentinel in self._sentinels.items()}

    @cached_property
    def _at_sentinels(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(self._spellings)})") if self._spellings else re.compile("(?!)")

    @cached_property
    def _at_spellings(self) -> re.Pattern[str]:
        longest_first = sorted(self._sentinels, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else re.compile("(?!)")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what a model is trained on: here only what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _source_of(choice: str) -> str:
    if "{%" in choice or "{{" in choice or "\n" in choice:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--chat-template: {choice} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"--chat-template: cannot read {choice}: {reason}; give a file, or a template itself") from None


def _new_sentinel() -> str:
    return "".join(chr(_PRIVATE_USE + secrets.randbelow(0xFFFE)) for _ in range(_SENTINEL_CHARS))


def _messages(turns: tuple[Turn, ...], *, mark: str) -> list[dict[str, Any]]:
    """Turns as templates expect them. `mark` goes behind the last one's text, to find in the output where that ends."""
    last = len(turns) - 1
    names = {call.id: call.name for turn in turns for call in turn.tool_calls}
    return [_message(turn, names=names, mark=mark if index == last else "") for index, turn in enumerate(turns)]


def _message(turn: Turn, *, names: Mapping[str, str], mark: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text + mark}
    if turn.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
            for call in turn.tool_calls
        ]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    name = turn.name or names.get(turn.tool_call_id or "")
    if name:
        message["name"] = name
    return message


def _arguments(text: str) -> Any:
    """Arguments as the object that templates write out themselves; text that is none (a call that was cut short) as it is."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else text


def _described(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": tool.parameters}}


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """As Hugging Face has it: Jinja's own would escape what HTML minds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
