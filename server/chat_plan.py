"""From a chat request to its plan: `Conversation`, prompt, grammar.

`plan_of_conversation` is for every endpoint that maps onto a `Conversation`; `check_chat` is that of `POST /v1/chat/completions`. What they
give is a `GenerationPlan` that also knows the conversation, by which the answer is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from server.conversation import Conversation, Role, Tool, ToolCall, ToolChoice, Turn, check_conversation
from server.errors import InvalidRequest, shown
from server.limits import Limits
from server.plan import GenerationPlan, Terms, check_logprobs, plan_of
from server.schemas.chat import ChatRequest, ConversationFields, Message, WireTool
from server.schemas.common import SamplingFields
from server.services import Services
from server.structured_output import OutputGrammar, output_grammar
from server.tools import tools_grammar

_ROLES: Mapping[str, Role] = {"developer": "system", "function": "tool"}  # the others are called alike


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPlan(GenerationPlan):
    """The plan of a conversation's next turn."""

    conversation: Conversation


async def check_chat(body: ChatRequest, terms: Terms, services: Services) -> ConversationPlan:
    """The plan of a `POST /v1/chat/completions`. Raises `InvalidRequest` with the field, or `ModelNotFound`."""
    conversation = conversation_of(body, limits=terms.limits)
    if body.n > terms.limits.max_sequences:
        raise InvalidRequest(f"n is {body.n}, the limit is {terms.limits.max_sequences} sequences", param="n")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
    check_logprobs(body.top_logprobs, param="top_logprobs", terms=terms)
    return await plan_of_conversation(
        body,
        terms,
        services,
        conversation=conversation,
        max_tokens=_max_tokens(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        text_grammar=output_grammar(body, limits=terms.limits),
        variables=body.chat_template_kwargs,
    )


async def plan_of_conversation(
    body: SamplingFields,
    terms: Terms,
    services: Services,
    *,
    conversation: Conversation,
    max_tokens: int | None,
    logprobs: int | None = None,
    text_grammar: OutputGrammar | None = None,
    variables: Mapping[str, Any] | None = None,
    turns_param: str = "messages",
) -> ConversationPlan:
    """Check the conversation and render it, once there is room for the request; `turns_param` is the field that its turns are from.

    Without `max_tokens` the answer may take what room the context leaves. Raises `InvalidRequest` with the field, `ModelNotFound`, or like
    `Admission.permit`.
    """
    if services.chat_template is None:
        raise InvalidRequest("this server runs without a tokenizer and cannot write a conversation: send token ids to /v1/completions")
    if body.parse_special_tokens:
        raise InvalidRequest(
            "parse_special_tokens is for /v1/completions: what a message says is always text", param="parse_special_tokens"
        )
    check_conversation(conversation, turns_param=turns_param)
    plan = plan_of(
        body,
        terms,
        prompts=(("",),),  # rendered last: it is the costly part
        prompt_param=turns_param,
        max_tokens=max_tokens,
        logprobs=logprobs,
        default_max_tokens=None,
        more_stop_token_ids=() if body.ignore_eos else services.chat_template.end_of_turn_ids,
        grammar=_grammar(conversation, text_grammar),
    )
    num_tokens = plan.min_worst_case_tokens(max_model_len=terms.info.max_model_len)
    with services.admission.permit(plan.num_sequences, num_tokens=num_tokens, tenant=plan.tenant):
        prompt = await services.chat_template.render_off_loop(conversation, variables=variables, turns_param=turns_param)
    shared: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    shared["prompts"] = (prompt or ("",),)  # nothing is the document start
    return ConversationPlan(**shared, conversation=conversation)


def conversation_of(body: ConversationFields, *, limits: Limits) -> Conversation:
    """What messages and tools mean. Raises `InvalidRequest` for too many messages, and for a `tool_choice` that is none."""
    if len(body.messages) > limits.max_messages:
        raise InvalidRequest(f"{len(body.messages):,} messages, the limit is {limits.max_messages:,}", param="messages")
    tools = tuple(map(_tool, body.tools))
    conversation = Conversation(
        turns=tuple(map(_turn, body.messages)),
        tools=tools,
        parallel_tool_calls=body.parallel_tool_calls,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    match body.tool_choice:
        case None:
            return conversation
        case "none" | "auto" | "required":
            return replace(conversation, tool_choice=ToolChoice(body.tool_choice))
        case {"type": "function", "function": {"name": str(name)}}:
            return replace(conversation, tool_choice=name)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list()}}:
            names = _allowed_names(body.tool_choice["allowed_tools"]["tools"])
            _check_are_tools(names, tools)
            chosen = tuple(tool for tool in tools if tool.name in names)
            return replace(conversation, tools=chosen, tool_choice=ToolChoice(mode))
        case other:
            raise InvalidRequest(
                f"tool_choice must be none, auto, required, an object that names a function, or one of allowed_tools; found {shown(other)}",
                param="tool_choice",
            )


def _turn(message: Message) -> Turn:
    return Turn(
        role=_ROLES.get(message.role, cast("Role", message.role)),
        text=message.content if message.content is not None else message.refusal or "",
        tool_calls=tuple(ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _tool(tool: WireTool) -> Tool:
    function = tool.function
    described = Tool(name=function.name, description=function.description, strict=function.strict)
    return described if function.parameters is None else replace(described, parameters=function.parameters)


def _allowed_names(allowed: list[Any]) -> set[str]:
    names: set[str] = set()
    for tool in allowed:
        match tool:
            case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
                names.add(name)
            case other:
                raise InvalidRequest(f"tool_choice: allowed_tools holds {shown(other)}, which names no function", param="tool_choice")
    return names


def _check_are_tools(names: set[str], tools: tuple[Tool, ...]) -> None:
    if unknown := sorted(names - {tool.name for tool in tools}):
        raise InvalidRequest(f"tool_choice allows {shown(unknown[0])}, which is none of the tools", param="tool_choice")


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens are two names of one field: send only one of them", param="max_tokens")
    return body.max_completion_tokens


def _grammar(conversation: Conversation, text_grammar: OutputGrammar | None) -> OutputGrammar | None:
    """The grammar of the whole answer, text or calls."""
    if not conversation.callable_tools:
        return text_grammar
    if text_grammar is not None and text_grammar.param not in ("response_format", "text", "output_config", "output_format"):
        raise InvalidRequest(
            f"{text_grammar.param} cannot be combined with tools that may be called: use response_format, or tool_choice none",
            param=text_grammar.param,
        )
    grammar = tools_grammar(conversation, text_grammar=None if text_grammar is None else text_grammar.text)
    return None if grammar is None else OutputGrammar(text=grammar, param="tools")
