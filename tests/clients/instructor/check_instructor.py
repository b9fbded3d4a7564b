"""`instructor`: objects of a pydantic model in each of its modes for OpenAI's API, whole, in parts and in lists."""

import instructor
import openai
from pets import Pet
from served import MODEL, QUESTION

ASKED = {"model": MODEL, "messages": QUESTION, "response_model": Pet, "max_tokens": 400, "max_retries": 1}


def _client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(timeout=60), mode=mode)


def check_by_a_required_tool():
    assert isinstance(_client(instructor.Mode.TOOLS).create(**ASKED), Pet)


def check_by_a_strict_tool():
    assert isinstance(_client(instructor.Mode.TOOLS_STRICT).create(**ASKED), Pet)


def check_by_a_json_schema():
    assert isinstance(_client(instructor.Mode.JSON_SCHEMA).create(**ASKED), Pet)


def check_the_raw_completion_comes_along():
    pet, completion = _client(instructor.Mode.TOOLS).create_with_completion(**ASKED)

    assert isinstance(pet, Pet)
    assert completion.usage.completion_tokens > 0


def check_parts_stream_as_they_grow():
    parts = list(_client(instructor.Mode.TOOLS).create_partial(**ASKED))

    assert len(parts) > 3
    Pet.model_validate(parts[-1].model_dump())


def check_parts_stream_from_json():
    parts = list(_client(instructor.Mode.JSON_SCHEMA).create_partial(**ASKED))

    assert len(parts) > 3
    Pet.model_validate(parts[-1].model_dump())


def check_over_the_responses_endpoint():
    client = _client(instructor.Mode.RESPONSES_TOOLS)

    pet = client.create(model=MODEL, messages=QUESTION, response_model=Pet, max_output_tokens=400, max_retries=1)

    assert isinstance(pet, Pet)


async def check_asynchronously():
    client = instructor.from_openai(openai.AsyncOpenAI(timeout=60), mode=instructor.Mode.TOOLS)

    assert isinstance(await client.create(**ASKED), Pet)
