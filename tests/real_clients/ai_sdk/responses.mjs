// Vercel's AI SDK with its provider for OpenAI, which speaks the Responses API: whole, streamed, and a second turn.
//
// node responses.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: "none" });
const france = { role: "user", content: "What is the capital of France?" };
const italy = { role: "user", content: "And of Italy?" };

// Kept by the server, so that the next turn refers to the message by its id; or not, so that the message is sent.
for (const store of [true, false]) {
  const options = {
    model: openai("smollm2"),
    temperature: 0,
    maxOutputTokens: 50,
    maxRetries: 0,
    providerOptions: { openai: { store } },
  };
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
}
