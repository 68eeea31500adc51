"""Pydantic AI's native structured output, over chat completions and over the Responses API: whole, streamed, prompted.

python structured.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
settings = {"temperature": 0, "max_tokens": 100}
QUESTION = "What is the capital of France? Answer in JSON."


class Capital(BaseModel):
    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


async def check(model):
    agent = Agent(model, model_settings=settings, output_type=NativeOutput(Capital, strict=True))
    first = await agent.run(QUESTION)
    assert first.output == Capital(city="Paris", country="France"), first
    async with agent.run_stream(QUESTION) as stream:
        parts = [part async for part in stream.stream_output(debounce_by=None)]
    assert parts[-1] == first.output, parts
    relaxed = await Agent(model, model_settings=settings, output_type=NativeOutput(Capital)).run(QUESTION)
    assert relaxed.output == first.output
    # What came back is sent back.
    second = await agent.run("And of Italy?", message_history=first.all_messages())
    assert isinstance(second.output, Capital)


async def main():
    await check(OpenAIChatModel("smollm2", provider=provider))
    await check(OpenAIResponsesModel("smollm2", provider=provider))


asyncio.run(main())
