"""Tools with OpenAI's Python client, of a model that is held to call them: helpers, streams, and several turns.

python tools.py http://127.0.0.1:8000/v1
"""

import json
import sys
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
PARIS = {"role": "user", "content": "What is the weather in Paris?"}
options = {"model": "smollm2", "temperature": 0, "parallel_tool_calls": False}


class GetWeather(BaseModel):
    """Current weather of a city"""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
named = {"type": "function", "function": {"name": "get_weather"}}
for choice in ("required", named):
    chat = {**options, "messages": [PARIS], "tools": [tool], "tool_choice": choice, "max_tokens": 100}
    answer = client.chat.completions.parse(**chat).choices[0]
    [call] = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason) == ("get_weather", "tool_calls"), answer
    assert isinstance(call.function.parsed_arguments, GetWeather), call
    with client.chat.completions.stream(**chat) as stream:
        kinds = {event.type for event in stream}
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.delta" in kinds, kinds
    assert streamed.function.parsed_arguments == call.function.parsed_arguments

messages = [PARIS, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and clear"}]
second = client.chat.completions.create(**options, messages=messages, tools=[tool], tool_choice="none", max_tokens=30)
assert second.choices[0].message.content, second
assert not second.choices[0].message.tool_calls

function = {"type": "function", **{name: tool["function"][name] for name in ("name", "parameters", "strict")}}
asked = {**options, "tools": [function], "tool_choice": "required", "max_output_tokens": 100}
first = client.responses.create(**asked, input=[PARIS])
[item] = first.output
assert (item.type, item.status, item.name) == ("function_call", "completed", "get_weather"), item
GetWeather.model_validate_json(item.arguments)
with client.responses.stream(**asked, input=[PARIS]) as stream:
    pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    final = stream.get_final_response()
assert json.loads("".join(pieces)) == json.loads(final.output[0].arguments) == json.loads(item.arguments)
result = {"type": "function_call_output", "call_id": item.call_id, "output": "18 degrees and clear"}
told = {**asked, "tool_choice": "none", "max_output_tokens": 30}
by_id = client.responses.create(**told, input=[result], previous_response_id=first.id)
by_items = client.responses.create(**told, input=[PARIS, item, result])
assert by_id.output_text == by_items.output_text != ""
