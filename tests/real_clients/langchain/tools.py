"""LangChain's ChatOpenAI with a tool, over chat completions and over the Responses API: a call, its answer, a stream.

python tools.py http://127.0.0.1:8000/v1
"""

import sys

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

QUESTION = HumanMessage("What is the weather in Paris?")


@tool
def get_weather(city: str) -> str:
    """Current weather of a city"""
    assert city == "Paris"
    return '{"temperature": 18, "sky": "clear"}'


def check(model, **options):
    bound = model.bind_tools([get_weather], **options)
    asked = bound.invoke([QUESTION])
    [call] = asked.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), asked

    whole = None
    for chunk in bound.stream([QUESTION]):
        whole = chunk if whole is None else whole + chunk
    assert [(made["name"], made["args"]) for made in whole.tool_calls] == [("get_weather", {"city": "Paris"})], whole
    assert whole.invalid_tool_calls == []

    for message in (asked, whole):
        answers = [get_weather.invoke(made) for made in message.tool_calls]
        answer = model.bind_tools([get_weather]).invoke([QUESTION, message, *answers])
        assert "18 degrees" in answer.text, answer


options = {"model": "nanoserve-builtin", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0}
options |= {"temperature": 0, "max_tokens": 80}
chat = ChatOpenAI(**options)
check(chat)
check(chat, tool_choice="get_weather")
check(chat, strict=True, parallel_tool_calls=False)
assert chat.bind_tools([get_weather]).invoke([QUESTION]).response_metadata["finish_reason"] == "tool_calls"
check(ChatOpenAI(**options, use_responses_api=True))
check(ChatOpenAI(**options, use_responses_api=True, use_previous_response_id=True))
