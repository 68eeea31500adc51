"""OpenAI's Agents SDK with a tool, over the Responses API and over chat completions: whole, streamed, remembered.

python tools.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
MODEL = "nanoserve-builtin"
QUESTION = "What is the weather in Paris?"
cities = []
# Traces would go to OpenAI's platform.
set_tracing_disabled(True)


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city"""
    cities.append(city)
    return '{"temperature": 18, "sky": "clear"}'


async def check(model):
    settings = ModelSettings(temperature=0, max_tokens=80, include_usage=True)
    agent = Agent(name="assistant", model=model, model_settings=settings, tools=[get_weather])
    first = await Runner.run(agent, QUESTION)
    assert "18 degrees" in first.final_output, first
    assert [type(item).__name__ for item in first.new_items] == [
        "ToolCallItem",
        "ToolCallOutputItem",
        "MessageOutputItem",
    ]

    streamed = Runner.run_streamed(agent, QUESTION)
    names = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    assert names == ["tool_called", "tool_output", "message_output_created"], names
    assert streamed.final_output == first.final_output
    assert streamed.context_wrapper.usage.total_tokens == first.context_wrapper.usage.total_tokens
    return agent, first


async def main():
    agent, first = await check(OpenAIResponsesModel(MODEL, openai_client=client))
    # The server remembers the call.
    remembered = await Runner.run(agent, QUESTION, auto_previous_response_id=True)
    assert remembered.final_output == first.final_output
    await check(OpenAIChatCompletionsModel(MODEL, openai_client=client))
    assert cities == ["Paris"] * 5, cities


asyncio.run(main())
