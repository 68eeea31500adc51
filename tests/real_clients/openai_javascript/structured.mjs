// Structured output with OpenAI's JavaScript client and zod: chats and responses that are parsed, streamed and cut off.
//
// node structured.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const Capital = z.object({ city: z.string().max(20), country: z.enum(["France", "Italy"]) });
const options = { model: "smollm2", temperature: 0 };
const messages = [{ role: "user", content: "What is the capital of France? Answer in JSON." }];
const response_format = zodResponseFormat(Capital, "capital");

const answer = await client.chat.completions.parse({ ...options, messages, response_format });
const paris = answer.choices[0].message.parsed;
assert.deepEqual(paris, { city: "Paris", country: "France" });
assert.equal(answer.choices[0].finish_reason, "stop");
assert.equal(answer.choices[0].constraint_outcome, "satisfied");

const runner = client.chat.completions.stream({ ...options, messages, response_format });
assert.deepEqual((await runner.finalChatCompletion()).choices[0].message.parsed, paris);

const format = zodTextFormat(Capital, "capital");
const response = await client.responses.parse({ ...options, input: messages, text: { format } });
assert.deepEqual(response.output_parsed, paris);
assert.equal(response.text.format.name, "capital");
const stream = client.responses.stream({ ...options, input: messages, text: { format } });
assert.deepEqual((await stream.finalResponse()).output_parsed, paris);

const cut = client.chat.completions.parse({ ...options, messages, response_format, max_tokens: 4 });
await assert.rejects(cut, OpenAI.LengthFinishReasonError);
const unique = { name: "x", strict: true, schema: { type: "array", uniqueItems: true } };
const refused = { ...options, messages, response_format: { type: "json_schema", json_schema: unique } };
await assert.rejects(client.chat.completions.create(refused), /uniqueItems cannot be enforced/);
