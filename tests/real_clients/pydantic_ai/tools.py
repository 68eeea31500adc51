"""Pydantic AI's Agent with a tool, over chat completions and over the Responses API: whole and streamed.

python tools.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
settings = {"temperature": 0, "max_tokens": 80}
QUESTION = "What is the weather in Paris?"


async def check(model):
    agent, cities = Agent(model, model_settings=settings), []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Current weather of a city"""
        cities.append(city)
        return '{"temperature": 18, "sky": "clear"}'

    first = await agent.run(QUESTION)
    assert "18 degrees" in first.output, first
    async with agent.run_stream(QUESTION) as stream:
        assert await stream.get_output() == first.output
    assert cities == ["Paris", "Paris"], cities


async def main():
    await check(OpenAIChatModel("nanoserve-builtin", provider=provider))
    await check(OpenAIResponsesModel("nanoserve-builtin", provider=provider))


asyncio.run(main())
