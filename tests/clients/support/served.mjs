// The server under test as a check in Node sees it; `served.py` is its twin.

import assert from "node:assert/strict";

export const URL = process.env.SERVER_URL;
export const KEY = process.env.SERVER_KEY;
export const MODEL = process.env.SERVER_MODEL;
export const HAS_KEYS = process.env.SERVER_HAS_KEYS === "true";

export const STORY = "Once upon a time, there was a little girl named Lily.";
export const QUESTION = [{ role: "user", content: "Hello, how are you today?" }];

// Sequences that the engine runs or holds, as /metrics tells.
export async function numRunning() {
  const answer = await fetch(`${URL}/metrics`, { headers: { authorization: `Bearer ${KEY}` } });
  const lines = (await answer.text()).split("\n").filter((line) => !line.startsWith("#"));
  const counts = Object.fromEntries(lines.map((line) => line.split(" ")));
  return Number(counts["grok:num_requests_running"]) + Number(counts["grok:num_requests_waiting"]);
}

// Throws where the engine still works on something after that time: a stream that was left goes on.
export async function assertNothingRunsWithin(seconds) {
  const giveUp = performance.now() + 1000 * seconds;
  for (let running = await numRunning(); running > 0; running = await numRunning()) {
    assert(performance.now() < giveUp, `${running} sequences still run ${seconds} s after the client left`);
    await new Promise((resume) => setTimeout(resume, 50));
  }
}
