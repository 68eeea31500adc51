"""LiteLLM and the Responses API: its own call, and its bridge from chat completions.

python responses.py http://127.0.0.1:8000/v1
"""

import sys

import litellm

server = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0}
FRANCE = {"role": "user", "content": "What is the capital of France?"}
ITALY = {"role": "user", "content": "And of Italy?"}


def respond(input, model="openai/smollm2", **options):
    return litellm.responses(model=model, input=input, max_output_tokens=50, **server, **options)


def text_of(response):
    return "".join(part.text for item in response.output if item.type == "message" for part in item.content)


first = respond([FRANCE])
assert "Paris" in text_of(first), first
assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
# LiteLLM makes its own id of ours, and must find the way back.
assert "Rome" in text_of(respond([ITALY], previous_response_id=first.id))
assert "Rome" in text_of(respond([FRANCE, *(item.model_dump() for item in first.output), ITALY]))

events = list(respond([FRANCE], stream=True))
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text_of(first)
assert events[-1].type == "response.completed"

# completion() that speaks Responses to the server.
bridged = {"model": "openai/responses/smollm2", "max_tokens": 50, **server}
answer = litellm.completion(**bridged, messages=[FRANCE])
assert answer.choices[0].message.content == text_of(first)
chunks = list(litellm.completion(**bridged, messages=[FRANCE], stream=True))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(first)
second = litellm.completion(**bridged, messages=[FRANCE, answer.choices[0].message, ITALY])
assert "Rome" in second.choices[0].message.content, second

# responses() that speaks chat completions to the server.
other = respond([FRANCE], model="hosted_vllm/smollm2")
assert "Paris" in text_of(other), other
assert "Rome" in text_of(
    respond([FRANCE, *(item.model_dump() for item in other.output), ITALY], model="hosted_vllm/smollm2")
)
