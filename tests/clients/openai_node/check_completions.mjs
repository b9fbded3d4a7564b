// npm `openai` on /v1/completions and /v1/models.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { MODEL, STORY } from "./served.mjs";

const sdk = new OpenAI({ timeout: 60_000 });

export async function check_a_completion_has_its_fields() {
  const answer = await sdk.completions.create({ model: MODEL, prompt: STORY, max_tokens: 6 });

  assert(answer.id.startsWith("cmpl-"));
  assert.equal(answer.object, "text_completion");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert(answer._request_id);
}

export async function check_a_stream_joins_to_the_whole_text() {
  const request = { model: MODEL, prompt: STORY, max_tokens: 24, seed: 4 };
  const whole = await sdk.completions.create(request);

  let text = "";
  let usage;
  for await (const chunk of await sdk.completions.create({ ...request, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices.map((choice) => choice.text).join("");
    usage = chunk.usage;
  }

  assert.equal(text, whole.choices[0].text);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
}

export async function check_the_model_is_listed_and_retrieved() {
  const ids = [];
  for await (const model of sdk.models.list()) ids.push(model.id);

  assert(ids.includes(MODEL));
  assert.equal((await sdk.models.retrieve(MODEL)).object, "model");
}
