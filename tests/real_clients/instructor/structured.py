"""Instructor in the modes that constrain the answer itself: whole, streamed in parts, asyncio, and JSON of no schema.

python structured.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys
from typing import Literal

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

options = {"model": "smollm2", "temperature": 0, "max_tokens": 100, "max_retries": 0}
options["messages"] = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
server = {"base_url": sys.argv[1], "api_key": "none", "max_retries": 0}


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


client = instructor.from_openai(OpenAI(**server), mode=instructor.Mode.JSON_SCHEMA)
answer, raw = client.chat.completions.create_with_completion(**options, response_model=Capital)
# Instructor makes a class of its own from this one.
assert answer.model_dump() == {"city": "Paris", "country": "France"}, answer
assert raw.choices[0].constraint_outcome == "satisfied"
*_, last = client.chat.completions.create_partial(**options, response_model=Capital)
assert last.model_dump() == answer.model_dump(), last


async def main():
    async with AsyncOpenAI(**server) as openai:
        client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
        again = await client.chat.completions.create(**options, response_model=Capital)
        assert again.model_dump() == answer.model_dump(), again


asyncio.run(main())
