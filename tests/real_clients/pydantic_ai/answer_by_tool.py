"""Pydantic AI's usual output, by a function that the model has to call: over chat completions and responses.

python answer_by_tool.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
# A model that was made to call functions may not know when it has called enough.
settings = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


async def check(model):
    agent = Agent(model, model_settings=settings, output_type=Capital)
    first = await agent.run("What is the capital of France?")
    assert isinstance(first.output, Capital), first
    async with agent.run_stream("What is the capital of France?") as stream:
        assert await stream.get_output() == first.output


async def main():
    await check(OpenAIChatModel("smollm2", provider=provider))
    await check(OpenAIResponsesModel("smollm2", provider=provider))


asyncio.run(main())
