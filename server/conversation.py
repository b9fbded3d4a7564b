"""A conversation as every chat-like endpoint understands it: turns, tools, and what is asked of the next turn.

Each of these endpoints maps its wire type to a `Conversation` and checks it here, once; `server/chat_template.py` renders it, and
`server/tools.py` says what an answer with tool calls looks like. Nothing here knows of HTTP or of a wire format.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from server.errors import InvalidRequest, shown

MAX_TOOLS = 128  # OpenAI's bound
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Role = Literal["system", "user", "assistant", "tool"]


def _no_parameters() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=_no_parameters)  # a JSON schema of an object
    strict: bool = False  # refuse a schema with keywords that cannot be enforced, instead of leaving these out


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model made."""

    id: str
    name: str
    arguments: str  # JSON text, as the model wrote it


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message. `tool_call_id` and `name` say whose result a tool's turn is; another turn's `name` tells speakers of one role apart."""

    role: Role
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class ToolChoice(StrEnum):
    """Whether the model may, must or must not call tools."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What was said, and how it may go on."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | str = ToolChoice.AUTO  # a string that is no `ToolChoice` names the one tool to call
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True  # begin the assistant's next turn
    continue_final_message: bool = False  # leave the last turn open, for the model to go on with

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called in the next turn."""
        if not isinstance(self.tool_choice, ToolChoice):
            return tuple(tool for tool in self.tools if tool.name == self.tool_choice)
        return () if self.tool_choice is ToolChoice.NONE else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the next turn has to be a call."""
        return not isinstance(self.tool_choice, ToolChoice) or self.tool_choice is ToolChoice.REQUIRED


def check_conversation(conversation: Conversation, *, turns_param: str = "messages") -> None:
    """Raises `InvalidRequest` for what cannot be rendered or called; `turns_param` is the field that the turns are from."""
    if not conversation.turns:
        raise InvalidRequest(f"{turns_param} is empty: say something", param=turns_param)
    _check_tools(conversation)
    _check_tool_choice(conversation)
    if not conversation.continue_final_message:
        return
    if conversation.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message leaves the last turn open and add_generation_prompt begins a new one: set only one of them",
            param="continue_final_message",
        )
    if conversation.must_call:
        raise InvalidRequest(
            "continue_final_message goes on with a text, tool_choice wants a call: leave out one of them", param="continue_final_message"
        )
    if not conversation.turns[-1].text.strip() or conversation.turns[-1].tool_calls:
        raise InvalidRequest("continue_final_message needs a last message that has text and no tool calls", param="continue_final_message")


def _check_tools(conversation: Conversation) -> None:
    if len(conversation.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(conversation.tools):,} tools, the limit is {MAX_TOOLS}", param="tools")
    names: set[str] = set()
    for tool in conversation.tools:
        if not TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{shown(tool.name)} is no name of a tool: 1 to 64 letters, digits, underscores and hyphens make one", param="tools"
            )
        if tool.name in names:
            raise InvalidRequest(f"two tools are called {shown(tool.name)}", param="tools")
        if tool.parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f"the parameters of tool {shown(tool.name)} must be a JSON schema of type object, found type "
                f"{shown(tool.parameters['type'])}",
                param="tools",
            )
        names.add(tool.name)


def _check_tool_choice(conversation: Conversation) -> None:
    choice = conversation.tool_choice
    if choice is ToolChoice.REQUIRED and not conversation.tools:
        raise InvalidRequest("tool_choice is required, but there are no tools to choose from", param="tool_choice")
    if not isinstance(choice, ToolChoice) and not conversation.callable_tools:
        raise InvalidRequest(f"tool_choice names {shown(choice)}, which is none of the tools", param="tool_choice")
