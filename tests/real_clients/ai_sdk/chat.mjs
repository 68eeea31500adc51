// Vercel's AI SDK with its provider for servers like OpenAI's, which speaks chat completions: whole, streamed, a second
// turn.
//
// node chat.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const nanoserve = createOpenAICompatible({ name: "nanoserve", baseURL: process.argv[2], includeUsage: true });
const options = { model: nanoserve("smollm2"), temperature: 0, maxOutputTokens: 50, maxRetries: 0 };
const france = { role: "user", content: "What is the capital of France?" };
const italy = { role: "user", content: "And of Italy?" };

const first = await generateText({ ...options, messages: [france] });
assert.match(first.text, /Paris/);
assert.equal(first.finishReason, "stop");
assert.equal(first.usage.totalTokens, first.usage.inputTokens + first.usage.outputTokens);

const errors = [];
const streamed = streamText({ ...options, messages: [france], onError: ({ error }) => errors.push(error) });
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.deepEqual(errors, []);
assert.equal(text, first.text);
assert.equal((await streamed.usage).totalTokens, first.usage.totalTokens);

const second = await generateText({ ...options, messages: [france, ...first.response.messages, italy] });
assert.match(second.text, /Rome/);
