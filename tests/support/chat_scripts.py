"""Scripts of engines that speak in turns, for the tests of chat-like endpoints."""

from fake_engine import ScriptFor, tokens_script
from tiny_tokenizer import tiny_tokenizer

from engine.types import FinishReason

SEPARATOR = 47
WEATHER_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
TIME_CALL = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'


def turn_script(text: str) -> ScriptFor:
    """Say this, and end the turn."""
    return tokens_script(*tiny_tokenizer().encode_continuation(text), SEPARATOR)


def cut_script(text: str) -> ScriptFor:
    """Say this, and be cut off for its length."""
    return tokens_script(*tiny_tokenizer().encode_continuation(text), finish=FinishReason.LENGTH)


def function(name: str, **fields: object) -> dict[str, object]:
    """A tool as OpenAI writes it."""
    return {"type": "function", "function": {"name": name} | fields}


WEATHER = function(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
TIME = function("get_time")
