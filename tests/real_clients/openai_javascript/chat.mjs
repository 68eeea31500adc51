// Chat with OpenAI's JavaScript client: whole, streamed, and a second turn.
//
// node chat.mjs http://127.0.0.1:8000/v1

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const options = { model: "smollm2", temperature: 0, max_tokens: 50 };
const messages = [{ role: "user", content: "What is the capital of France?" }];

const answer = await client.chat.completions.create({ ...options, messages });
const [choice] = answer.choices;
assert.match(choice.message.content, /Paris/);
assert.equal(choice.finish_reason, "stop");
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);

let text = "";
let usage;
const stream_options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ ...options, messages, stream: true, stream_options })) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage;
}
assert.equal(text, choice.message.content);
assert.equal(usage.total_tokens, answer.usage.total_tokens);

// The package's own helper puts the chunks together again.
const runner = client.chat.completions.stream({ ...options, messages });
assert.equal(await runner.finalContent(), choice.message.content);

const turns = [...messages, choice.message, { role: "user", content: "And of Italy?" }];
const second = await client.chat.completions.create({ ...options, messages: turns });
assert.match(second.choices[0].message.content, /Rome/);

await assert.rejects(client.chat.completions.create({ ...options, messages, model: "gpt-4" }), OpenAI.NotFoundError);
