"""`openai`: a stream that its reader leaves is not computed any further."""

import asyncio

import openai
from served import MODEL, QUESTION, STORY, Refused, assert_nothing_runs_within, num_running

sdk = openai.OpenAI(timeout=60)
LONG = {"model": MODEL, "max_tokens": 800, "n": 8, "extra_body": {"ignore_eos": True}}  # many seconds, were it not left
LONG_RESPONSE = {"model": MODEL, "max_output_tokens": 800, "extra_body": {"ignore_eos": True}}


def check_a_completion_that_is_closed_in_mid_stream_ends_on_the_server():
    stream = sdk.completions.create(prompt=STORY, stream=True, **LONG)
    for _ in range(3):
        next(stream)
    was_running = num_running()

    stream.close()

    assert was_running == 8
    assert_nothing_runs_within(2)


def check_a_chat_that_is_left_in_mid_stream_ends_on_the_server():
    with sdk.chat.completions.create(messages=QUESTION, stream=True, **LONG) as stream:
        for _ in range(12):
            next(stream)
        was_running = num_running()

    assert was_running == 8
    assert_nothing_runs_within(2)


def check_a_response_that_is_left_in_mid_stream_ends_on_the_server():
    with sdk.responses.create(input="Tell me a long story.", stream=True, **LONG_RESPONSE) as stream:
        for _ in range(8):
            next(stream)
        was_running = num_running()

    assert was_running == 1
    assert_nothing_runs_within(2)


async def check_an_async_task_that_is_cancelled_ends_on_the_server():
    async with openai.AsyncOpenAI(timeout=60) as client:
        task = asyncio.create_task(client.completions.create(prompt=STORY, **LONG))
        while not await asyncio.to_thread(num_running):
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])

    assert_nothing_runs_within(2)


def check_a_client_that_loses_its_patience_ends_it_on_the_server():
    with Refused(openai.APITimeoutError):
        sdk.with_options(timeout=0.5, max_retries=0).completions.create(prompt=STORY, **LONG)

    assert_nothing_runs_within(2)
