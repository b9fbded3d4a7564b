"""From Anthropic's request to the same `Conversation` and plan as everybody's: blocks become turns, and tools, stop sequences and the like
become the fields of the others.
"""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from server.chat_plan import ConversationPlan, plan_of_conversation
from server.conversation import Conversation, Role, Tool, ToolCall, ToolChoice, Turn
from server.errors import InvalidRequest, shown
from server.limits import Limits
from server.plan import Terms, tenant_of
from server.schemas.messages import (
    ConversationFields,
    InputBlock,
    InputMessage,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    ResultBlock,
)
from server.services import Services
from server.structured_output import OutputGrammar, json_grammar

INLINE_BLOCKS = 500  # so many are read on the event loop

Value = TypeVar("Value")


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A turn that may still grow."""

    role: Role
    texts: list[str] = field(default_factory=list[str])
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    tool_call_id: str | None = None

    def turn(self) -> Turn:
        text = "\n".join(filter(None, self.texts))
        return Turn(role=self.role, text=text, tool_calls=tuple(self.calls), tool_call_id=self.tool_call_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagePlan(ConversationPlan):
    """The plan of a message, with how long it may be at most: `default_max_tokens` of it, as far as there is room."""

    max_message_tokens: int


async def check_message(body: MessagesRequest, terms: Terms, services: Services) -> MessagePlan:
    """The plan of a `POST /v1/messages`. Raises `InvalidRequest` with the field, or `ModelNotFound`.

    `max_tokens` is a bound and not a demand, as Anthropic has it: where the context leaves less, the message may be as long as that.
    """
    _check_options(body)
    conversation = await conversation_off_loop(body, limits=terms.limits)
    plan = await plan_of_conversation(
        body, terms, services, conversation=conversation, max_tokens=body.max_tokens, text_grammar=_text_grammar(body, limits=terms.limits)
    )
    shared: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    shared["tenant"] = terms.key_tenant or tenant_of(body.metadata.user_id or body.user)
    if body.max_tokens:
        shared |= {"max_tokens": None, "default_max_tokens": body.max_tokens}
    return MessagePlan(**shared, max_message_tokens=body.max_tokens)


async def conversation_off_loop(body: ConversationFields, *, limits: Limits) -> Conversation:
    """The same as `conversation_of`, in a thread where there are many blocks."""
    if sum(len(message.content) for message in body.messages) <= INLINE_BLOCKS:
        return conversation_of(body, limits=limits)
    return await asyncio.to_thread(conversation_of, body, limits=limits)


def conversation_of(body: ConversationFields, *, limits: Limits) -> Conversation:
    """What the request's messages and tools mean. A last turn of the assistant's is gone on from. Raises `InvalidRequest`."""
    if not body.messages:
        raise InvalidRequest("messages is empty: say something", param="messages")
    if len(body.messages) > limits.max_messages:
        raise InvalidRequest(f"{len(body.messages):,} messages, the limit is {limits.max_messages:,}", param="messages")
    turns = tuple(draft.turn() for draft in _drafts(body))
    goes_on = bool(turns) and turns[-1].role == "assistant"
    if goes_on and turns[-1].tool_calls:
        raise InvalidRequest("messages: the last message has a tool_use: its tool_result must follow", param="messages")
    return Conversation(
        turns=turns,
        tools=tuple(_tool(tool, where=f"tools.{index}") for index, tool in enumerate(body.tools)),
        tool_choice=_tool_choice(body.tool_choice, goes_on=goes_on),
        parallel_tool_calls=not body.tool_choice.disable_parallel_tool_use,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
    )


def _check_options(body: MessagesRequest) -> None:
    if body.n != 1:
        raise InvalidRequest(f"n is {body.n}: a message is one answer; send several requests, or use /v1/chat/completions", param="n")
    if body.return_token_ids:
        raise InvalidRequest("return_token_ids is not supported here; use /v1/chat/completions", param="return_token_ids")


def _tool_choice(choice: MessagesToolChoice, *, goes_on: bool) -> ToolChoice | str:
    if goes_on and choice.type in ("any", "tool"):
        raise InvalidRequest(
            "tool_choice wants a tool_use, but the last message is a text of the assistant's to go on with", param="tool_choice"
        )
    match choice.type:
        case "auto":
            return ToolChoice.AUTO
        case "none":
            return ToolChoice.NONE
        case "any":
            return ToolChoice.REQUIRED
        case "tool":
            if choice.name is None:
                raise InvalidRequest("tool_choice: a tool must be named", param="tool_choice")
            return choice.name


def _drafts(body: ConversationFields) -> list[_Draft]:
    """What was said. Tools' results are turns of their own; other neighbours of one role are one turn, as Anthropic has it."""
    drafts: list[_Draft] = []
    if system := _text_of(body.system, where="system"):
        drafts.append(_Draft(role="system", texts=[system]))
    for index, message in enumerate(body.messages):
        _add(drafts, message, where=f"messages.{index}")
    last = drafts[-1] if drafts else None
    if last is not None and last.role == "assistant" and not last.calls and not any(text.strip() for text in last.texts):
        drafts.pop()  # there is nothing to go on with
    return drafts


def _add(drafts: list[_Draft], message: InputMessage, *, where: str) -> None:
    if not message.content and message.role != "assistant":
        raise InvalidRequest(f"{where}: the message is empty", param="messages")
    for index, block in enumerate(message.content):
        here = f"{where}.content.{index}"
        match message.role, block.type:
            case role, "text":
                _of_role(drafts, role).texts.append(_required(block.text, "text", block, where=here))
            case "assistant", "tool_use":
                _of_role(drafts, "assistant").calls.append(_call(block, where=here))
            case "user", "tool_result":
                text = _text_of(block.content, where=f"{here}.content")
                tool_call_id = _required(block.tool_use_id, "tool_use_id", block, where=here)
                drafts.append(_Draft(role="tool", texts=[f"Error: {text}" if block.is_error else text], tool_call_id=tool_call_id))
            case "assistant", "thinking" | "redacted_thinking":  # of another model, which no model takes over
                pass
            case role, kind:
                raise InvalidRequest(
                    f"{here}: blocks of type {shown(kind)} are not supported in a message of role {role}", param="messages"
                )


def _of_role(drafts: list[_Draft], role: Role) -> _Draft:
    """The last turn, where it is of that role; else a new one."""
    if not drafts or drafts[-1].role != role:
        drafts.append(_Draft(role=role))
    return drafts[-1]


def _call(block: InputBlock, *, where: str) -> ToolCall:
    return ToolCall(
        id=_required(block.id, "id", block, where=where),
        name=_required(block.name, "name", block, where=where),
        arguments=json.dumps(_required(block.input, "input", block, where=where)),
    )


def _tool(tool: MessagesTool, *, where: str) -> Tool:
    if tool.type != "custom":
        raise InvalidRequest(
            f"{where}: tools of type {shown(tool.type)} are not supported: the server runs none, only tools of yours can be used",
            param="tools",
        )
    if tool.input_schema is None:
        raise InvalidRequest(f"{where}: a tool needs an input_schema", param="tools")
    return Tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)


def _text_of(blocks: Iterable[ResultBlock], *, where: str) -> str:
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            raise InvalidRequest(
                f"{where}.{index}: blocks of type {shown(block.type)} are not supported here: the model reads text alone",
                param=where.partition(".")[0],
            )
        texts.append(block.text)
    return "\n".join(texts)


def _text_grammar(body: MessagesRequest, *, limits: Limits) -> OutputGrammar | None:
    if body.output_config.format is not None and body.output_format is not None:
        raise InvalidRequest("output_format is the older name of output_config.format: send only one of them", param="output_format")
    chosen, param = (body.output_config.format, "output_config") if body.output_format is None else (body.output_format, "output_format")
    return None if chosen is None else OutputGrammar(text=json_grammar(chosen.schema_, param=param, limits=limits), param=param)


def _required(value: Value | None, name: str, block: InputBlock, *, where: str) -> Value:
    if value is None:
        raise InvalidRequest(f"{where}: a block of type {block.type} needs {name}", param="messages")
    return value
