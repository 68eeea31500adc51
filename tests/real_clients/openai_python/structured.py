"""Structured output with OpenAI's Python client: chats and responses that are parsed, streamed, cut off and refused.

python structured.py http://127.0.0.1:8000/v1
"""

import json
import re
import sys
from typing import Literal

from openai import BadRequestError, LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
question = "What is the capital of France? Answer in JSON."
options = {"model": "smollm2", "temperature": 0}
messages = [{"role": "user", "content": question}]


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]
    is_large: bool


answer = client.chat.completions.parse(**options, messages=messages, response_format=Capital)
[choice] = answer.choices
assert (choice.message.parsed.city, choice.message.parsed.country) == ("Paris", "France"), choice
assert (choice.finish_reason, choice.constraint_outcome) == ("stop", "satisfied")

with client.chat.completions.stream(**options, messages=messages, response_format=Capital) as stream:
    for event in stream:
        if event.type == "content.done":
            assert event.parsed == choice.message.parsed
    assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed

response = client.responses.parse(**options, input=question, text_format=Capital)
assert response.output_parsed == choice.message.parsed, response
with client.responses.stream(**options, input=question, text_format=Capital) as stream:
    stream.until_done()
    assert stream.get_final_response().output_parsed == choice.message.parsed

# What the schema's author left out of `strict` is only checked.
schema = {
    "type": "array",
    "items": {"type": "string", "maxLength": 10},
    "minItems": 2,
    "maxItems": 3,
    "uniqueItems": True,
}
form = {"type": "json_schema", "json_schema": {"name": "cities", "schema": schema}}
checked = client.chat.completions.create(**options, messages=messages, response_format=form, max_tokens=100).choices[0]
cities = json.loads(checked.message.content)
assert checked.constraint_outcome == ("relaxed_ok" if len(set(cities)) == len(cities) else "relaxed_violated")
assert [each["keyword"] for each in checked.unenforced] == ["uniqueItems"]
form["json_schema"]["strict"] = True
try:
    client.chat.completions.create(**options, messages=messages, response_format=form)
except BadRequestError as error:
    refusal = error
else:
    raise AssertionError("a keyword that cannot be enforced")
assert (refusal.code, refusal.param) == ("constraint_invalid", "response_format.json_schema.schema")
assert "/uniqueItems" in refusal.message

try:
    client.chat.completions.parse(**options, messages=messages, response_format=Capital, max_tokens=5)
except LengthFinishReasonError:
    pass
else:
    raise AssertionError("an answer that is cut off")

# JSON of no schema, which may be long, and vLLM's other constraints.
plain = client.chat.completions.create(
    **options, messages=messages, response_format={"type": "json_object"}, max_tokens=300
).choices[0]
if plain.finish_reason == "stop":
    assert isinstance(json.loads(plain.message.content), dict)
for extra, pattern in (
    ({"structured_outputs": {"choice": ["Rome", "Paris"]}}, "Rome|Paris"),
    ({"guided_regex": "[A-Z][a-z]{3,9}[.]"}, "[A-Z][a-z]{3,9}[.]"),
):
    picked = client.chat.completions.create(**options, messages=messages, extra_body=extra).choices[0]
    assert re.fullmatch(pattern, picked.message.content), picked
