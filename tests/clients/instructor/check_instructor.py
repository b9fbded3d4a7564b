"""`instructor`: objects of a pydantic model in each of its modes for OpenAI's API, whole and in parts."""

import instructor
import openai
from pets import Mood, Pet
from served import MODEL, QUESTION

ASKED = {"model": MODEL, "messages": QUESTION, "max_tokens": 300, "max_retries": 1}


def _client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(timeout=60), mode=mode)


def check_by_a_required_tool():
    assert isinstance(_client(instructor.Mode.TOOLS).create(response_model=Mood, **ASKED), Mood)


def check_by_a_strict_tool():
    assert isinstance(_client(instructor.Mode.TOOLS_STRICT).create(response_model=Mood, **ASKED), Mood)


def check_by_a_json_schema():
    assert isinstance(_client(instructor.Mode.JSON_SCHEMA).create(response_model=Pet, **ASKED), Pet)


def check_the_raw_completion_comes_along():
    mood, completion = _client(instructor.Mode.TOOLS).create_with_completion(response_model=Mood, **ASKED)

    assert isinstance(mood, Mood)
    assert completion.usage.completion_tokens > 0


def check_parts_stream_as_they_grow():
    parts = list(_client(instructor.Mode.TOOLS).create_partial(response_model=Mood, **ASKED))

    assert len(parts) > 3
    Mood.model_validate(parts[-1].model_dump())


def check_parts_stream_from_json():
    parts = list(_client(instructor.Mode.JSON_SCHEMA).create_partial(response_model=Pet, strict=False, **ASKED))  # else no text is an enum

    assert len(parts) > 3
    Pet.model_validate(parts[-1].model_dump())


def check_over_the_responses_endpoint():
    client = _client(instructor.Mode.RESPONSES_TOOLS)

    mood = client.create(model=MODEL, messages=QUESTION, response_model=Mood, max_output_tokens=300, max_retries=1)

    assert isinstance(mood, Mood)


async def check_asynchronously():
    client = instructor.from_openai(openai.AsyncOpenAI(timeout=60), mode=instructor.Mode.TOOLS)

    assert isinstance(await client.create(response_model=Mood, **ASKED), Mood)
