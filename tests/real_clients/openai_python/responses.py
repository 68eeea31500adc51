"""The Responses API with OpenAI's Python client: whole, streamed, and second turns of every kind.

python responses.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
FRANCE = {"role": "user", "content": "What is the capital of France?"}
ITALY = {"role": "user", "content": "And of Italy?"}


def respond(input, **options):
    return client.responses.create(model="smollm2", input=input, temperature=0, max_output_tokens=50, **options)


def check_second_turn(answer):
    assert "Rome" in answer.output_text, answer
    assert answer.usage.input_tokens > first.usage.total_tokens


first = respond([FRANCE])
assert first.status == "completed"
assert "Paris" in first.output_text, first
assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
assert respond(FRANCE["content"]).output_text == first.output_text
cut = client.responses.create(model="smollm2", input=[FRANCE], temperature=0, max_output_tokens=3)
assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")

# The server remembers.
check_second_turn(respond([ITALY], previous_response_id=first.id))
# The caller remembers: the objects that came, the same as mappings with all of their nulls, or their ids alone.
check_second_turn(respond([FRANCE, *first.output, ITALY]))
check_second_turn(respond([FRANCE, *(item.model_dump() for item in first.output), ITALY]))
check_second_turn(respond([FRANCE, *({"type": "item_reference", "id": item.id} for item in first.output), ITALY]))
# Nothing shall be kept on the server. Programs then ask for the reasoning of models that have one.
stateless = {"store": False, "include": ["reasoning.encrypted_content"]}
alone = respond([FRANCE], **stateless)
check_second_turn(respond([FRANCE, *alone.output, ITALY], **stateless))

with client.responses.stream(model="smollm2", input=[FRANCE], temperature=0, max_output_tokens=50) as stream:
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    final = stream.get_final_response()
assert text == final.output_text == first.output_text
assert final.usage.output_tokens == first.usage.output_tokens

assert client.responses.retrieve(first.id).output_text == first.output_text
client.responses.delete(first.id)
