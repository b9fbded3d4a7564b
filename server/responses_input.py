"""From a request of the Responses API to its plan: input items, what is stored of the conversation before them, turns, tools.

    InputItem    as clients send it                                     server/schemas/responses.py
    Item         as it is kept, listed and sent back                    `new_items`
    Turn         as every chat-like endpoint understands it             `turns_of`

`check_response` goes this way. `shortened` is for `truncation: auto`: the same conversation with its oldest items left out.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import msgspec

from server.chat_plan import ConversationPlan, plan_of_conversation
from server.conversation import Conversation, Role, Tool, ToolCall, ToolChoice, Turn
from server.errors import InvalidRequest, PreviousResponseNotFound, ResponseNotFound, shown
from server.plan import Terms, check_logprobs, tenant_of
from server.preprocess import INLINE_BYTES
from server.response_store import ResponseStore
from server.schemas.responses import (
    LOGPROBS_INCLUDED,
    ContentPart,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ResponsesRequest,
    ResponseTool,
)
from server.services import Services
from server.structured_output import text_format_grammar

INCLUDABLE = frozenset(
    {
        LOGPROBS_INCLUDED,
        "reasoning.encrypted_content",  # of items that are never made here, like those below
        "message.input_image.image_url",
        "file_search_call.results",
        "web_search_call.action.sources",
        "web_search_call.results",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
    }
)
INLINE_PARTS = 500  # so many are read on the event loop
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_ROLES: dict[str, Role] = {"developer": "system"}  # the others are called alike
_item_decoder = msgspec.json.Decoder(Item)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePlan(ConversationPlan):
    """The plan of a response, with what its answer repeats and what is kept of it."""

    request: ResponsesRequest
    items: tuple[Item, ...]  # the whole conversation before the answer
    previous: tuple[bytes, ...]  # of them, those of earlier responses, as they are stored
    owner: str  # whose store it goes to


async def check_response(body: ResponsesRequest, terms: Terms, services: Services, *, request_id: str) -> ResponsePlan:
    """The plan of a `POST /v1/responses`.

    Raises `InvalidRequest` with the field, `PreviousResponseNotFound`, `ResponseNotFound` for an item referred to, or `ModelNotFound`.
    """
    _check_options(body)
    check_logprobs(body.top_logprobs, param="top_logprobs", terms=terms)
    previous = _previous(body.previous_response_id, store=services.responses, owner=terms.key_tenant)
    if (num_items := len(previous) + len(body.input)) > terms.limits.max_messages:
        raise InvalidRequest(f"{num_items:,} items in the conversation, the limit is {terms.limits.max_messages:,}", param="input")
    referred = _referred(body.input, store=services.responses, owner=terms.key_tenant)

    def conversation() -> tuple[tuple[Item, ...], Conversation]:
        items = (*map(_item_decoder.decode, previous), *new_items(body.input, referred=referred, request_id=request_id))
        return items, _conversation_of(body, items)

    num_parts = len(previous) + sum(1 + len(item.content or ()) + len(item.output or ()) for item in body.input)
    is_small = num_parts <= INLINE_PARTS and sum(map(len, previous)) <= INLINE_BYTES
    items, asked = conversation() if is_small else await asyncio.to_thread(conversation)
    plan = await plan_of_conversation(
        body,
        terms,
        services,
        conversation=asked,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if LOGPROBS_INCLUDED in body.include else None,
        text_grammar=None if body.text.format is None else text_format_grammar(body.text.format, limits=terms.limits),
        turns_param="input",
    )
    shared: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    shared["tenant"] = terms.key_tenant or tenant_of(body.user or body.safety_identifier)
    shared["max_tokens_param"] = "max_output_tokens"
    return ResponsePlan(**shared, request=body, items=items, previous=previous, owner=terms.key_tenant)


def _previous(response_id: str | None, *, store: ResponseStore, owner: str) -> tuple[bytes, ...]:
    """The items that a response was generated from, and gave; nothing for None. Raises `PreviousResponseNotFound`."""
    if response_id is None:
        return ()
    response = store.get(response_id, tenant=owner)
    if response is None:
        raise PreviousResponseNotFound(f"Previous response with id {shown(response_id)} not found.", param="previous_response_id")
    return response.items


def _referred(sent: Iterable[InputItem], *, store: ResponseStore, owner: str) -> dict[str, bytes]:
    """The items that are referred to, by id. Raises `ResponseNotFound`."""
    referred: dict[str, bytes] = {}
    for index, item in enumerate(sent):
        if _kind(item) != "item_reference" or item.id is None:
            continue
        found = store.output_item(item.id, tenant=owner)
        if found is None:
            raise ResponseNotFound(f"input.{index}: item with id {shown(item.id)} not found; send the item itself", param="input")
        referred[item.id] = found
    return referred


def _kind(item: InputItem) -> str:
    return item.type or ("message" if item.role is not None else "item_reference")


def new_items(sent: Iterable[InputItem], *, referred: Mapping[str, bytes], request_id: str) -> list[Item]:
    """The items of a request, whole and with ids; those in `referred` in the place of references. Raises `InvalidRequest`."""
    items: list[Item] = []
    for index, item in enumerate(sent):
        where = f"input.{index}"
        match _kind(item):
            case "message":
                items.append(_message(item, where=where, id=item.id or f"msg_{request_id}_in{index}"))
            case "function_call":
                items.append(_call(item, where=where, id=item.id or f"fc_{request_id}_in{index}"))
            case "function_call_output":
                items.append(_call_output(item, where=where, id=item.id or f"fco_{request_id}_in{index}"))
            case "item_reference":
                if item.id is None:
                    raise InvalidRequest(f"{where}: an item needs a type or a role", param="input")
                items.append(_item_decoder.decode(referred[item.id]))
            case "reasoning":  # of another model, which no model takes over
                pass
            case other:
                raise InvalidRequest(
                    f"{where}: items of type {shown(other)} are not supported, only messages, function calls and their outputs",
                    param="input",
                )
    return items


def turns_of(items: Sequence[Item]) -> tuple[Turn, ...]:
    """Turns; the calls that follow a message of the assistant, or each other, are one turn with it."""
    turns: list[Turn] = []
    is_assistants = False  # the last turn is, and no other item has come since
    for item in items:
        match item:
            case MessageItem():
                text = "\n".join(part.text for part in item.content)
                turns.append(Turn(role=_ROLES.get(item.role, cast("Role", item.role)), text=text))
            case FunctionCallItem():
                call = ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)
                if is_assistants:
                    turns[-1] = replace(turns[-1], tool_calls=(*turns[-1].tool_calls, call))
                else:
                    turns.append(Turn(role="assistant", text="", tool_calls=(call,)))
            case FunctionCallOutputItem():
                turns.append(Turn(role="tool", text=item.output, tool_call_id=item.call_id))
        is_assistants = turns[-1].role == "assistant"
    return tuple(turns)


def shortened(plan: ResponsePlan, *, num_left_out: int) -> Conversation:
    """The conversation without its oldest items. Instructions and the last item stay; a function's output goes where its call does."""
    items = plan.items[num_left_out:]
    while len(items) > 1 and isinstance(items[0], FunctionCallOutputItem):
        items = items[1:]
    return replace(plan.conversation, turns=_with_instructions(plan.request, items))


def _check_options(body: ResponsesRequest) -> None:
    if body.n != 1:
        raise InvalidRequest(f"n is {body.n}: a response is one answer; send several requests, or use /v1/chat/completions", param="n")
    if body.return_token_ids:
        raise InvalidRequest("return_token_ids is not supported here; use /v1/chat/completions", param="return_token_ids")
    if unknown := sorted(set(body.include) - INCLUDABLE):
        raise InvalidRequest(f"include: {shown(unknown[0])} is nothing that could be included", param="include")
    if not body.input and body.previous_response_id is None:
        raise InvalidRequest("input is missing or empty: send a text or items, or a previous_response_id to go on from", param="input")


def _conversation_of(body: ResponsesRequest, items: Sequence[Item]) -> Conversation:
    tools = tuple(_tool(tool, where=f"tools.{index}") for index, tool in enumerate(body.tools))
    conversation = Conversation(turns=_with_instructions(body, items), tools=tools, parallel_tool_calls=body.parallel_tool_calls)
    choice = body.tool_choice
    match choice.type:
        case "none" | "auto" | "required":
            return replace(conversation, tool_choice=ToolChoice(choice.type))
        case "function":
            if choice.name is None:
                raise InvalidRequest("tool_choice: a function must be named", param="tool_choice")
            return replace(conversation, tool_choice=choice.name)
        case "allowed_tools":
            names = {tool.name for tool in choice.tools if tool.type == "function"}
            if unknown := names - {tool.name for tool in tools}:
                raise InvalidRequest(f"tool_choice allows {shown(unknown.pop())}, which is none of the tools", param="tool_choice")
            allowed = tuple(tool for tool in tools if tool.name in names)
            return replace(conversation, tools=allowed, tool_choice=ToolChoice(choice.mode))
        case other:
            raise InvalidRequest(
                f"tool_choice must be none, auto, required, a function or allowed_tools, found {shown(other)}", param="tool_choice"
            )


def _with_instructions(body: ResponsesRequest, items: Sequence[Item]) -> tuple[Turn, ...]:
    instructions = (Turn(role="system", text=body.instructions),) if body.instructions else ()
    return (*instructions, *turns_of(items))


def _tool(tool: ResponseTool, *, where: str) -> Tool:
    if tool.type != "function":
        raise InvalidRequest(
            f"{where}: tools of type {shown(tool.type)} are not supported: the server runs none, only functions of yours can be called",
            param="tools",
        )
    if tool.name is None:
        raise InvalidRequest(f"{where}: a function needs a name", param="tools")
    described = Tool(name=tool.name, description=tool.description, strict=tool.strict)
    return described if tool.parameters is None else replace(described, parameters=tool.parameters)


def _message(item: InputItem, *, where: str, id: str) -> MessageItem:
    if item.role is None or item.content is None:
        raise InvalidRequest(f"{where}: a message needs a role and content", param="input")
    texts = [_text_of(part, where=f"{where}.content.{index}") for index, part in enumerate(item.content)]
    content: list[InputText | OutputText] = (
        [OutputText(text=text) for text in texts] if item.role == "assistant" else [InputText(text=text) for text in texts]
    )
    return MessageItem(id=id, status="completed", role=item.role, content=content)


def _call(item: InputItem, *, where: str, id: str) -> FunctionCallItem:
    if item.call_id is None or item.name is None or item.arguments is None:
        raise InvalidRequest(f"{where}: a function_call needs a call_id, a name and arguments", param="input")
    return FunctionCallItem(id=id, status="completed", call_id=item.call_id, name=item.name, arguments=item.arguments)


def _call_output(item: InputItem, *, where: str, id: str) -> FunctionCallOutputItem:
    if item.call_id is None or item.output is None:
        raise InvalidRequest(f"{where}: a function_call_output needs a call_id and an output", param="input")
    text = "\n".join(_text_of(part, where=f"{where}.output.{index}") for index, part in enumerate(item.output))
    return FunctionCallOutputItem(id=id, status="completed", call_id=item.call_id, output=text)


def _text_of(part: ContentPart, *, where: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise InvalidRequest(f"{where}: parts of type {shown(part.type)} are not supported: the model reads text alone", param="input")
    if part.text is None:
        raise InvalidRequest(f"{where}: a part of type {part.type} needs a text", param="input")
    return part.text
