"""Instructor in its usual mode, in which the model has to call a function that takes the answer: whole and in parts.

python answer_by_tool.py http://127.0.0.1:8000/v1
"""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


client = instructor.from_openai(OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0))
options = {"model": "smollm2", "temperature": 0, "max_tokens": 200, "max_retries": 0, "response_model": Capital}
options["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
answer, raw = client.chat.completions.create_with_completion(**options)
assert answer.country in ("France", "Italy"), answer
[call] = raw.choices[0].message.tool_calls
assert (call.function.name, raw.choices[0].finish_reason) == ("Capital", "tool_calls")
*_, last = client.chat.completions.create_partial(**options)
assert last.model_dump() == answer.model_dump(), last
