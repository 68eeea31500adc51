"""Completions with OpenAI's Python client: text, logprobs, and the logprobs of a prompt.

python completions.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
PROMPT = "The capital of France is"


def complete(**options):
    return client.completions.create(model="smollm2", prompt=PROMPT, temperature=0, **options)


plain = complete(max_tokens=5)
[choice] = plain.choices
assert "Paris" in choice.text, choice
assert choice.finish_reason == "length"
assert plain.usage.completion_tokens == 5
assert plain.usage.total_tokens == plain.usage.prompt_tokens + 5

[with_logprobs] = complete(max_tokens=5, logprobs=2).choices
logprobs = with_logprobs.logprobs
assert with_logprobs.text == choice.text == "".join(logprobs.tokens)
assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
# At temperature 0 the likeliest token is taken.
for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
    assert logprob == max(top.values()) <= 0

[echoed] = complete(max_tokens=5, logprobs=2, echo=True).choices
assert echoed.text == PROMPT + choice.text
assert len(echoed.logprobs.tokens) == plain.usage.total_tokens
# Nothing is before the first token, by which it could be more or less likely.
assert echoed.logprobs.token_logprobs[0] is None
assert all(logprob <= 0 for logprob in echoed.logprobs.token_logprobs[1:])

# Nothing is generated: how likely is the prompt itself?
scored = complete(max_tokens=0, logprobs=2, echo=True)
assert scored.choices[0].text == PROMPT
assert len(scored.choices[0].logprobs.token_logprobs) == plain.usage.prompt_tokens
assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (plain.usage.prompt_tokens, 0)

usage = {"include_usage": True}
chunks = list(complete(max_tokens=5, stream=True, stream_options=usage))
assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
assert chunks[-1].usage.total_tokens == plain.usage.total_tokens
