// A tool with OpenAI's JavaScript client: its runner, streamed or not, and the Responses API.
//
// node tools.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const options = { model: "nanoserve-builtin", temperature: 0 };
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const described = { name: "get_weather", description: "Current weather of a city", parameters };
const cities = [];
const get_weather = ({ city }) => {
  cities.push(city);
  return '{"temperature": 18, "sky": "clear"}';
};
const tools = [{ type: "function", function: { ...described, function: get_weather, parse: JSON.parse } }];

const texts = [];
for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({ ...options, messages, tools, stream });
  texts.push(await runner.finalContent());
}
assert.match(texts[0], /18 degrees/);
assert.equal(texts[1], texts[0]);

const asked = { ...options, tools: [{ type: "function", strict: true, ...described }] };
const first = await client.responses.create({ ...asked, input: messages });
const stream = client.responses.stream({ ...asked, input: messages });
let text = "";
for await (const event of stream) if (event.type === "response.function_call_arguments.delta") text += event.delta;
const [call] = (await stream.finalResponse()).output;
assert.equal(call.type, "function_call");
assert.equal(text, call.arguments);
assert.equal(call.arguments, first.output[0].arguments);

const answer = (id) => ({ type: "function_call_output", call_id: id, output: get_weather(JSON.parse(call.arguments)) });
for (const second of [
  { input: [answer(first.output[0].call_id)], previous_response_id: first.id },
  { input: [...messages, call, answer(call.call_id)] },
])
  assert.match((await client.responses.create({ ...asked, ...second })).output_text, /18 degrees/);
assert.deepEqual(cities, Array(4).fill("Paris"));
