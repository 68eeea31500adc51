// Structured output with Vercel's AI SDK, over chat completions and over the Responses API: whole and streamed.
//
// node structured.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, streamObject } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const compatible = createOpenAICompatible({ name: "nanoserve", baseURL, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const schema = z.object({ city: z.string().max(20), country: z.enum(["France", "Italy"]) });
const prompt = "What is the capital of France? Answer in JSON.";

for (const model of [compatible("smollm2"), openai("smollm2"), openai.chat("smollm2")]) {
  const options = { model, schema, prompt, temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
  const { object, finishReason } = await generateObject(options);
  assert.deepEqual(object, { city: "Paris", country: "France" });
  assert.equal(finishReason, "stop");

  const errors = [];
  const streamed = streamObject({ ...options, onError: ({ error }) => errors.push(error) });
  let last;
  for await (const part of streamed.partialObjectStream) last = part;
  assert.deepEqual(errors, []);
  assert.deepEqual(last, object);
  assert.deepEqual(await streamed.object, object);
}
