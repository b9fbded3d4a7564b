// npm `openai` on /v1/chat/completions: answers, streams, parse() with zod, tools.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { MODEL, QUESTION } from "./served.mjs";

const sdk = new OpenAI({ timeout: 60_000 });

const Pet = z.object({
  name: z.string().max(12),
  kind: z.enum(["cat", "dog", "bird"]),
  age: z.number().int().min(0).max(20),
  toys: z.array(z.enum(["ball", "bone"])).max(2),
  owner: z.object({ name: z.string().max(10) }).nullable(),
});
const Weather = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int().min(1).max(7) });
const TOOLS = [zodFunction({ name: "get_weather", parameters: Weather })];
const CALL = { model: MODEL, messages: QUESTION, tools: TOOLS, tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };

export async function check_a_chat_has_its_fields() {
  const answer = await sdk.chat.completions.create({ model: MODEL, messages: QUESTION, max_completion_tokens: 8 });

  assert(answer.id.startsWith("chatcmpl-"));
  assert.equal(answer.choices[0].message.role, "assistant");
  assert(answer.choices[0].message.content);
  assert(["stop", "length"].includes(answer.choices[0].finish_reason));
}

export async function check_the_stream_helper_puts_several_choices_together() {
  const request = { model: MODEL, messages: QUESTION, max_tokens: 10, seed: 5, n: 2 };
  const whole = await sdk.chat.completions.create(request);

  const final = await sdk.chat.completions.stream(request).finalChatCompletion();

  assert.deepEqual(
    final.choices.map((choice) => choice.message.content),
    whole.choices.map((choice) => choice.message.content),
  );
}

export async function check_parse_gives_an_object_of_the_schema_asked_for() {
  const answer = await sdk.chat.completions.parse({
    model: MODEL,
    messages: QUESTION,
    response_format: zodResponseFormat(Pet, "pet"),
    max_tokens: 400,
  });

  Pet.parse(answer.choices[0].message.parsed);
  assert.equal(answer.choices[0].finish_reason, "stop");
}

export async function check_the_stream_helper_parses_at_the_end() {
  const stream = sdk.chat.completions.stream({
    model: MODEL,
    messages: QUESTION,
    response_format: zodResponseFormat(Pet, "pet"),
    max_tokens: 400,
  });

  const final = await stream.finalChatCompletion();

  Pet.parse(final.choices[0].message.parsed);
}

export async function check_a_required_call_has_arguments_that_fit() {
  const answer = await sdk.chat.completions.parse(CALL);

  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  assert.equal(call.function.name, "get_weather");
  Weather.parse(call.function.parsed_arguments);
}

export async function check_streamed_arguments_join_to_json() {
  const stream = sdk.chat.completions.stream(CALL);
  let arguments_ = "";
  stream.on("tool_calls.function.arguments.delta", (event) => (arguments_ += event.arguments_delta));

  const final = await stream.finalChatCompletion();

  const [call] = final.choices[0].message.tool_calls;
  assert.equal(arguments_, call.function.arguments);
  Weather.parse(JSON.parse(arguments_));
}

export async function check_a_tool_is_run_and_its_result_goes_back_in() {
  const calls = [];
  const first = await sdk.chat.completions.create(CALL);
  const { message } = first.choices[0];
  for (const call of message.tool_calls) calls.push({ role: "tool", tool_call_id: call.id, content: "Sunny." });

  const second = await sdk.chat.completions.create({
    model: MODEL,
    messages: [...QUESTION, message, ...calls],
    tools: TOOLS,
    tool_choice: "none",
    max_tokens: 10,
  });

  const without = await sdk.chat.completions.create({ model: MODEL, messages: [...QUESTION, message], max_tokens: 1 });
  assert(second.usage.prompt_tokens > without.usage.prompt_tokens);
  assert(second.choices[0].message.content);
}
