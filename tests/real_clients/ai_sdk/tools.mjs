// A tool with Vercel's AI SDK, over chat completions and over the Responses API: whole and streamed, call and answer.
//
// node tools.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const compatible = createOpenAICompatible({ name: "nanoserve", baseURL, includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const cities = [];
const tools = {
  get_weather: tool({
    description: "Current weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      cities.push(city);
      return { temperature: 18, sky: "clear" };
    },
  }),
};
const prompt = "What is the weather in Paris?";
const name = "nanoserve-builtin";

for (const model of [compatible(name), openai.chat(name), openai(name)]) {
  cities.length = 0;
  const options = { model, tools, prompt, temperature: 0, maxOutputTokens: 80, maxRetries: 0, stopWhen: stepCountIs(3) };
  const whole = await generateText(options);
  assert.match(whole.text, /18 degrees/);
  assert.deepEqual(whole.steps.map((step) => step.finishReason), ["tool-calls", "stop"]);

  const errors = [];
  const streamed = streamText({ ...options, onError: ({ error }) => errors.push(error) });
  const kinds = [];
  for await (const part of streamed.fullStream) kinds.push(part.type);
  assert.deepEqual(errors, []);
  assert.equal(await streamed.text, whole.text);
  for (const kind of ["tool-input-start", "tool-input-delta", "tool-call", "tool-result"]) assert(kinds.includes(kind), kind);
  assert.deepEqual(cities, ["Paris", "Paris"]);
}
