"""OpenAI's Agents SDK without tools, over the Responses API and over chat completions: whole, streamed, a second turn.

python agent.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
QUESTION = "What is the capital of France?"
# Traces would go to OpenAI's platform.
set_tracing_disabled(True)


async def check(model):
    settings = ModelSettings(temperature=0, max_tokens=50, include_usage=True)
    agent = Agent(name="assistant", model=model, model_settings=settings)
    first = await Runner.run(agent, QUESTION)
    assert "Paris" in first.final_output, first
    usage = first.context_wrapper.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0

    streamed = Runner.run_streamed(agent, QUESTION)
    events = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == streamed.final_output == first.final_output
    assert streamed.context_wrapper.usage.total_tokens == usage.total_tokens

    second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And of Italy?"}])
    assert "Rome" in second.final_output, second

    # The package remembers the conversation.
    session = SQLiteSession("conversation")
    await Runner.run(agent, QUESTION, session=session)
    assert "Rome" in (await Runner.run(agent, "And of Italy?", session=session)).final_output
    return agent, first


async def main():
    agent, first = await check(OpenAIResponsesModel("smollm2", openai_client=client))
    # The server remembers it.
    second = await Runner.run(agent, "And of Italy?", previous_response_id=first.last_response_id)
    assert "Rome" in second.final_output, second
    await check(OpenAIChatCompletionsModel("smollm2", openai_client=client))


asyncio.run(main())
