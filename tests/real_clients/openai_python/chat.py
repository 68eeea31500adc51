"""Chat with OpenAI's Python client: whole, streamed, and a second turn.

python chat.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
options = {"model": "smollm2", "temperature": 0, "max_tokens": 50}
messages = [{"role": "user", "content": "What is the capital of France?"}]

answer = client.chat.completions.create(**options, messages=messages, logprobs=True, top_logprobs=2)
[choice] = answer.choices
assert "Paris" in choice.message.content, choice
assert choice.finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
# The token that ends the answer is counted too, and has logprobs.
assert len(choice.logprobs.content) == answer.usage.completion_tokens
assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
# A user finds the request in the server's log by it.
assert answer._request_id

cut = client.chat.completions.create(**{**options, "max_tokens": 3}, messages=messages)
assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)

# `continuous_usage_stats` is an extension of vLLM's, by which benchmarks count tokens.
usage = {"include_usage": True, "continuous_usage_stats": True}
chunks = list(client.chat.completions.create(**options, messages=messages, stream=True, stream_options=usage))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
counts = [chunk.usage.completion_tokens for chunk in chunks]
assert counts == sorted(counts), counts

# What came back is sent back: as the object that the client returned, and as a mapping with all of its nulls.
for message in (choice.message, choice.message.model_dump()):
    turns = [*messages, message, {"role": "user", "content": "And of Italy?"}]
    second = client.chat.completions.create(**options, messages=turns)
    assert "Rome" in second.choices[0].message.content, second
    assert second.usage.prompt_tokens > answer.usage.total_tokens
