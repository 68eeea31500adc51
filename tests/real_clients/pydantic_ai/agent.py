"""Pydantic AI's Agent, over chat completions and over the Responses API: whole, streamed, and a second turn.

python agent.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
settings = {"temperature": 0, "max_tokens": 50}
QUESTION = "What is the capital of France?"


async def check(model):
    agent = Agent(model, model_settings=settings)
    first = await agent.run(QUESTION)
    assert "Paris" in first.output, first
    assert first.usage.output_tokens > 0

    async with agent.run_stream(QUESTION) as stream:
        text = "".join([piece async for piece in stream.stream_text(delta=True)])
        assert text == await stream.get_output() == first.output
    assert stream.usage.output_tokens == first.usage.output_tokens

    for history in (first.all_messages(), stream.all_messages()):
        second = await agent.run("And of Italy?", message_history=history)
        assert "Rome" in second.output, second


async def main():
    await check(OpenAIChatModel("smollm2", provider=provider))
    await check(OpenAIResponsesModel("smollm2", provider=provider))


asyncio.run(main())
