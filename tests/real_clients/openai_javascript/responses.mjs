// The Responses API with OpenAI's JavaScript client: whole, streamed, and second turns.
//
// node responses.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const options = { model: "smollm2", temperature: 0, max_output_tokens: 50 };
const france = { role: "user", content: "What is the capital of France?" };
const italy = { role: "user", content: "And of Italy?" };

const first = await client.responses.create({ ...options, input: [france] });
assert.equal(first.status, "completed");
assert.match(first.output_text, /Paris/);
assert.equal(first.usage.total_tokens, first.usage.input_tokens + first.usage.output_tokens);

// The server remembers, or the caller does.
for (const second of [
  { input: [italy], previous_response_id: first.id },
  { input: [france, ...first.output, italy] },
])
  assert.match((await client.responses.create({ ...options, ...second })).output_text, /Rome/);

let text = "";
const stream = client.responses.stream({ ...options, input: [france] });
for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, first.output_text);
assert.equal((await stream.finalResponse()).output_text, first.output_text);
