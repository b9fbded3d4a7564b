// npm `openai` on /v1/responses: answers, streams, parse() with zod, tools, the store.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { MODEL } from "./served.mjs";

const sdk = new OpenAI({ timeout: 60_000 });

const Pet = z.object({ name: z.string().max(12), kind: z.enum(["cat", "dog"]), age: z.number().int().min(0).max(20) });
const Weather = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int().min(1).max(7) });

export async function check_a_response_has_its_fields() {
  const answer = await sdk.responses.create({ model: MODEL, input: "Hello!", max_output_tokens: 16 });

  assert(answer.id.startsWith("resp_"));
  assert.equal(answer.object, "response");
  assert(answer.output_text);
  assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
}

export async function check_a_stream_tells_its_events_in_order() {
  const kinds = [];
  let text = "";
  let last;
  const request = { model: MODEL, input: "Hello!", max_output_tokens: 300, stream: true };
  for await (const event of await sdk.responses.create(request)) {
    kinds.push(event.type);
    assert.equal(event.sequence_number, kinds.length - 1);
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }

  assert.equal(kinds[0], "response.created");
  assert(["response.completed", "response.incomplete"].includes(kinds.at(-1)));
  assert.equal(last.response.output[0].content[0].text, text);
}

export async function check_the_stream_helper_gives_the_final_response() {
  const stream = sdk.responses.stream({
    model: MODEL,
    input: "Tell me of a pet.",
    text: { format: zodTextFormat(Pet, "pet") },
    max_output_tokens: 300,
  });

  const final = await stream.finalResponse();

  Pet.parse(final.output_parsed);
}

export async function check_parse_gives_an_object_of_the_schema_asked_for() {
  const answer = await sdk.responses.parse({
    model: MODEL,
    input: "Tell me of a pet.",
    text: { format: zodTextFormat(Pet, "pet") },
    max_output_tokens: 300,
  });

  Pet.parse(answer.output_parsed);
}

export async function check_a_required_call_has_arguments_that_fit() {
  const answer = await sdk.responses.parse({
    model: MODEL,
    input: "Hello!",
    tools: [zodResponsesFunction({ name: "get_weather", parameters: Weather })],
    tool_choice: "required",
    parallel_tool_calls: false,
    max_output_tokens: 200,
  });

  assert.equal(answer.output[0].type, "function_call");
  Weather.parse(answer.output[0].parsed_arguments);
}

export async function check_a_stored_response_goes_on_and_is_deleted() {
  const first = await sdk.responses.create({ model: MODEL, input: "My name is Ann.", max_output_tokens: 16 });

  const second = await sdk.responses.create({ model: MODEL, input: "And?", previous_response_id: first.id, max_output_tokens: 16 });
  await sdk.responses.delete(first.id);

  assert.equal(second.previous_response_id, first.id);
  await assert.rejects(sdk.responses.retrieve(first.id), OpenAI.NotFoundError);
}
