"""LiteLLM's completion: whole, streamed with usage, a second turn, text completions and errors.

python completion.py http://127.0.0.1:8000/v1
"""

import sys

import litellm

options = {"model": "openai/smollm2", "api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 50}
messages = [{"role": "user", "content": "What is the capital of France?"}]

answer = litellm.completion(**options, messages=messages)
[choice] = answer.choices
assert "Paris" in choice.message.content, choice
assert choice.finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

chunks = list(litellm.completion(**options, messages=messages, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
rebuilt = litellm.stream_chunk_builder(chunks, messages=messages)
assert rebuilt.choices[0].message.content == choice.message.content

# What came back is sent back: as LiteLLM's object, and as a mapping with all of its nulls.
for message in (choice.message, choice.message.model_dump(), rebuilt.choices[0].message):
    turns = [*messages, message, {"role": "user", "content": "And of Italy?"}]
    assert "Rome" in litellm.completion(**options, messages=turns).choices[0].message.content

text = litellm.text_completion(
    **{**options, "model": "text-completion-openai/smollm2", "max_tokens": 5}, prompt="The capital of France is"
)
assert "Paris" in text.choices[0].text, text

try:
    litellm.completion(**{**options, "model": "openai/gpt-4"}, messages=messages)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("a model that is not served")
