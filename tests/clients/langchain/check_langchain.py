"""LangChain (`langchain-openai`): its chat model, over both of OpenAI's endpoints, and its completion model."""

import json

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pets import Mood, Pet
from served import MODEL, QUESTION, STORY, Refused

chat = ChatOpenAI(model=MODEL, max_tokens=16, timeout=60, stream_usage=True)  # not asked for by itself at addresses beyond OpenAI's
long_chat = ChatOpenAI(model=MODEL, max_tokens=400, timeout=60)
over_responses = ChatOpenAI(model=MODEL, max_tokens=300, timeout=60, use_responses_api=True)


@tool
def get_weather(is_today: bool) -> str:
    """Tell the weather."""
    return "Sunny." if is_today else "Who knows?"


def check_a_chat_is_invoked():
    answer = chat.invoke([SystemMessage("Be kind."), HumanMessage("Hello!"), AIMessage("Hi."), HumanMessage("How are you?")])

    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 16
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


def check_a_chat_streams():
    chunks = list(chat.stream(QUESTION))

    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 3
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 16
    assert whole.response_metadata["finish_reason"] in ("stop", "length")


def check_a_chain_runs_in_a_batch():
    chain = ChatPromptTemplate.from_messages([("human", "Tell me about {what}.")]) | chat

    answers = chain.batch([{"what": "cats"}, {"what": "dogs"}, {"what": "birds"}])

    assert len(answers) == 3
    assert all(answer.content for answer in answers)


def check_structured_output_by_schema():
    assert isinstance(long_chat.with_structured_output(Pet, method="json_schema").invoke(QUESTION), Pet)


def check_structured_output_by_a_function_call():
    assert isinstance(long_chat.with_structured_output(Mood, method="function_calling").invoke(QUESTION), Mood)


def check_structured_output_streams():
    *_, last = long_chat.with_structured_output(Pet).stream(QUESTION)

    assert isinstance(last, Pet)


def check_a_tool_is_called_and_its_result_goes_back_in():
    bound = long_chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)

    (call,) = answer.tool_calls
    result = get_weather.invoke(call)
    last = chat.bind_tools([get_weather], tool_choice="none").invoke([*QUESTION, answer, result])

    assert isinstance(call["args"]["is_today"], bool)
    assert isinstance(result, ToolMessage)
    assert last.content


def check_a_streamed_tool_call_joins():
    bound = long_chat.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)

    whole = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk

    (call,) = whole.tool_calls
    assert call["name"] == "get_weather"
    assert json.loads(whole.tool_call_chunks[0]["args"]) == call["args"]


def check_logprobs_arrive():
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)

    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def check_the_responses_endpoint_is_invoked_and_streams():
    answer = over_responses.invoke(QUESTION)
    chunks = list(over_responses.stream(QUESTION))

    assert answer.text
    assert "".join(chunk.text for chunk in chunks)


def check_structured_output_over_the_responses_endpoint():
    assert isinstance(over_responses.with_structured_output(Pet, method="json_schema").invoke(QUESTION), Pet)


def check_a_completion_is_invoked_and_streams():
    completion = OpenAI(model=MODEL, max_tokens=12, seed=3, timeout=60)

    assert completion.invoke(STORY) == "".join(completion.stream(STORY))


def check_errors_are_those_of_the_sdk():
    with Refused(openai.NotFoundError) as refusal:
        ChatOpenAI(model="gpt-4", max_retries=0).invoke(QUESTION)

    assert refusal.error.code == "model_not_found"


def check_too_long_a_prompt_is_known_as_that():
    with Refused(ContextOverflowError):
        chat.invoke("word " * 4000)


async def check_it_is_invoked_and_streams_asynchronously():
    answer = await chat.ainvoke(QUESTION)
    text = "".join([chunk.content async for chunk in chat.astream(QUESTION)])

    assert answer.content
    assert text
