// npm `openai`: typed errors, and streams that their reader leaves.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { HAS_KEYS, KEY, MODEL, QUESTION, STORY, assertNothingRunsWithin, numRunning } from "./served.mjs";

const sdk = new OpenAI({ timeout: 60_000, maxRetries: 0 });
const LONG = { model: MODEL, max_tokens: 800, n: 8, ignore_eos: true, stream: true };

export async function check_a_wrong_value_names_its_field() {
  await assert.rejects(sdk.completions.create({ model: MODEL, prompt: "Hello", temperature: 3 }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.deepEqual([error.type, error.param, error.code], ["invalid_request_error", "temperature", null]);
    assert(error.requestID);
    return true;
  });
}

export async function check_an_unknown_model_is_not_found() {
  await assert.rejects(sdk.chat.completions.create({ model: "gpt-4", messages: QUESTION }), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
}

export async function check_too_long_a_prompt_carries_openais_code() {
  await assert.rejects(sdk.completions.create({ model: MODEL, prompt: "word ".repeat(4000) }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
}

export async function check_a_wrong_key_is_an_authentication_error() {
  if (!HAS_KEYS) return;
  const stranger = new OpenAI({ apiKey: `${KEY}-not`, maxRetries: 0 });

  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
}

export async function check_a_completion_that_is_broken_off_ends_on_the_server() {
  let wasRunning;
  let numChunks = 0;
  for await (const _ of await sdk.completions.create({ ...LONG, prompt: STORY })) {
    if (++numChunks < 3) continue;
    wasRunning = await numRunning();
    break;
  }

  assert.equal(wasRunning, 8);
  await assertNothingRunsWithin(2);
}

export async function check_a_chat_that_is_aborted_ends_on_the_server() {
  const stream = await sdk.chat.completions.create({ ...LONG, messages: QUESTION });
  let numChunks = 0;
  let wasRunning;
  for await (const _ of stream) {
    if (++numChunks !== 12) continue;
    wasRunning = await numRunning();
    stream.controller.abort();
  }

  assert.equal(wasRunning, 8);
  await assertNothingRunsWithin(2);
}
