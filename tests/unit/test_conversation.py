"""What a conversation must be before it is rendered: the one check of all chat-like endpoints."""

import pytest

from server.conversation import MAX_TOOLS, Conversation, Tool, ToolCall, ToolChoice, Turn, check_conversation
from server.errors import InvalidRequest

ASK = Turn(role="user", text="Hello")
WEATHER = Tool(name="get_weather")
CLOCK = Tool(name="get_time")


def refused(param: str, **fields: object) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        check_conversation(Conversation(**{"turns": (ASK,)} | fields))
    assert refusal.value.param == param
    return refusal.value.message


def taken(**fields: object) -> None:
    check_conversation(Conversation(**{"turns": (ASK,)} | fields))


def test_a_conversation_says_something():
    taken()
    refused("messages", turns=())


def test_the_field_that_turns_are_from_is_named_as_the_endpoint_calls_it():
    with pytest.raises(InvalidRequest) as refusal:
        check_conversation(Conversation(turns=()), turns_param="input")

    assert refusal.value.param == "input"


def test_there_may_be_128_tools_and_not_one_more():
    tools = tuple(Tool(name=f"tool_{n}") for n in range(MAX_TOOLS + 1))

    taken(tools=tools[:MAX_TOOLS])
    refused("tools", tools=tools)


@pytest.mark.parametrize("name", ["a", "Z9_-", "x" * 64])
def test_names_of_tools_are_openais(name: str):
    taken(tools=(Tool(name=name),))


@pytest.mark.parametrize("name", ["", "x" * 65, "get weather", 'a"b', "a\n", "é"])
def test_other_names_are_refused(name: str):
    refused("tools", tools=(Tool(name=name),))


def test_two_tools_of_one_name_are_refused():
    assert "get_weather" in refused("tools", tools=(WEATHER, WEATHER))


def test_parameters_are_those_of_an_object():
    taken(tools=(Tool(name="a", parameters={}), Tool(name="b", parameters={"$ref": "#/$defs/A", "$defs": {"A": {}}})))
    refused("tools", tools=(Tool(name="a", parameters={"type": "array"}),))


def test_a_tool_without_parameters_takes_none():
    assert WEATHER.parameters == {"type": "object", "properties": {}, "additionalProperties": False}


def test_a_call_can_only_be_required_of_what_is_there():
    taken(tools=(WEATHER,), tool_choice=ToolChoice.REQUIRED)
    taken(tools=(WEATHER,), tool_choice="get_weather")
    refused("tool_choice", tool_choice=ToolChoice.REQUIRED)
    refused("tool_choice", tools=(WEATHER,), tool_choice="get_time")
    refused("tool_choice", tool_choice="get_time")


def test_the_choice_says_which_tools_may_be_called():
    def callable_with(choice: ToolChoice | str) -> tuple[Tool, ...]:
        return Conversation(turns=(ASK,), tools=(WEATHER, CLOCK), tool_choice=choice).callable_tools

    assert callable_with(ToolChoice.NONE) == ()
    assert callable_with(ToolChoice.AUTO) == callable_with(ToolChoice.REQUIRED) == (WEATHER, CLOCK)
    assert callable_with("get_time") == (CLOCK,)


def test_a_tool_may_be_called_like_a_choice():
    for name in ("none", "auto", "required"):
        named = Conversation(turns=(ASK,), tools=(WEATHER, Tool(name=name)), tool_choice=name)
        assert named.callable_tools == (Tool(name=name),)
        assert named.must_call


def test_a_last_message_goes_on_only_where_it_is_open():
    reply = Turn(role="assistant", text="The")
    called = Turn(role="assistant", text="", tool_calls=(ToolCall(id="a", name="get_time", arguments="{}"),))
    going_on = {"continue_final_message": True, "add_generation_prompt": False}

    taken(turns=(ASK, reply), **going_on)
    refused("continue_final_message", turns=(ASK, reply), continue_final_message=True)
    refused("continue_final_message", turns=(ASK, called), **going_on)
    refused("continue_final_message", turns=(ASK, Turn(role="assistant", text=" ")), **going_on)
    refused("continue_final_message", turns=(ASK, reply), tools=(CLOCK,), tool_choice=ToolChoice.REQUIRED, **going_on)
