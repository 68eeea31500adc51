"""Anthropic's Messages API in the program, our server behind it: LiteLLM translates, as it does for Claude Code.

python anthropic_messages.py http://127.0.0.1:8000/v1
"""

import asyncio
import json
import sys

import litellm

FRANCE = {"role": "user", "content": "What is the capital of France?"}
ITALY = {"role": "user", "content": "And of Italy?"}


async def ask(model, messages, **options):
    return await litellm.anthropic.messages.acreate(
        model=model, messages=messages, max_tokens=50, temperature=0, api_base=sys.argv[1], api_key="none", **options
    )


async def check(model):
    first = await ask(model, [FRANCE])
    [block] = first["content"]
    assert "Paris" in block["text"], first
    assert first["stop_reason"] == "end_turn"
    assert first["usage"]["output_tokens"] > 0

    events = []
    async for chunk in await ask(model, [FRANCE], stream=True):
        lines = chunk.decode().splitlines()
        events += [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == block["text"]
    [end] = [event for event in events if event["type"] == "message_delta"]
    assert end["delta"]["stop_reason"] == "end_turn"
    assert end["usage"]["output_tokens"] == first["usage"]["output_tokens"]

    turns = [FRANCE, {"role": "assistant", "content": first["content"]}, ITALY]
    second = await ask(model, turns, system="You are a helpful assistant.")
    assert "Rome" in second["content"][0]["text"], second


# The first is translated to the Responses API, the second to chat completions.
asyncio.run(check("openai/smollm2"))
asyncio.run(check("hosted_vllm/smollm2"))
