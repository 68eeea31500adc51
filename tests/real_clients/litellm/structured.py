"""LiteLLM's response_format: a class, a schema, any object, and vLLM's constraints.

python structured.py http://127.0.0.1:8000/v1
"""

import json
import sys
from typing import Literal

import litellm
from pydantic import BaseModel, Field

options = {"model": "openai/smollm2", "api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 100}
messages = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


answer = litellm.completion(**options, messages=messages, response_format=Capital)
text = answer.choices[0].message.content
assert Capital.model_validate_json(text) == Capital(city="Paris", country="France"), answer
assert answer.choices[0].finish_reason == "stop"

form = {
    "type": "json_schema",
    "json_schema": {"name": "capital", "strict": True, "schema": Capital.model_json_schema()},
}
chunks = list(litellm.completion(**options, messages=messages, response_format=form, stream=True))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
rebuilt = litellm.stream_chunk_builder(chunks, messages=messages)
assert rebuilt.choices[0].message.content == text
assert rebuilt.choices[0].finish_reason == "stop"

loose = litellm.completion(**{**options, "max_tokens": 300}, messages=messages, response_format={"type": "json_object"})
if loose.choices[0].finish_reason == "stop":
    assert isinstance(json.loads(loose.choices[0].message.content), dict)

for constraint in ({"structured_outputs": {"choice": ["Rome", "Paris"]}}, {"guided_choice": ["Rome", "Paris"]}):
    picked = litellm.completion(**options, messages=messages, extra_body=constraint)
    assert picked.choices[0].message.content == "Paris", picked

form["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}
try:
    litellm.completion(**options, messages=messages, response_format=form)
except litellm.BadRequestError as error:
    refusal = str(error)
else:
    raise AssertionError("a keyword that cannot be enforced")
assert "/uniqueItems cannot be enforced" in refusal
