"""Tools with the built-in model, which calls them, through OpenAI's own client: whole, streamed, and with the tools'
answers; and what people complain of elsewhere."""

import json

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MODEL = "nanoserve-builtin"
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY = {"model": MODEL, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Current weather of a city", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
SUNNY = '{"temperature": 18, "sky": "clear"}'


class get_weather(BaseModel):
    """Current weather of a city"""

    city: str


@pytest.fixture(scope="module")
def client(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**{**GREEDY, "messages": PARIS, "tools": TOOLS, **options})


def respond(client, **options):
    tools = [{"type": "function", **FUNCTION}]
    return client.responses.create(**{**GREEDY, "tools": tools, "input": PARIS, **options})


def test_a_round_trip(client):
    answer = chat(client)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    type(answer).model_validate(answer.to_dict())
    messages = [*PARIS, choice.message, {"role": "tool", "tool_call_id": call.id, "content": SUNNY}]
    last = chat(client, messages=messages).choices[0]
    assert last.finish_reason == "stop"
    assert "18 degrees" in last.message.content
    assert not last.message.tool_calls


def test_a_stream_says_the_same_piece_by_piece(client):
    chunks = list(chat(client, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert [bool(piece.id) for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert (pieces[0].function.name, pieces[0].function.arguments) == ("get_weather", "")
    assert len(pieces) > 2, "the arguments come in one lump"
    assert all(piece.function.name is None for piece in pieces[1:])
    assert "".join(piece.function.arguments for piece in pieces) == '{"city": "Paris"}'
    assert "".join(delta.content or "" for delta in deltas) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_packages_helpers_read_calls(client):
    tools = [openai.pydantic_function_tool(get_weather)]
    parsed = client.chat.completions.parse(**GREEDY, messages=PARIS, tools=tools).choices[0]
    assert parsed.message.tool_calls[0].function.parsed_arguments == get_weather(city="Paris")
    with client.chat.completions.stream(**GREEDY, messages=PARIS, tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.parsed_arguments == get_weather(city="Paris")
    assert final.finish_reason == "tool_calls"
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == get_weather(city="Paris")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}], ids=str)
def test_a_call_that_is_required_is_made_whatever_is_asked(client, choice):
    tools = [*TOOLS, {"type": "function", "function": {**FUNCTION, "name": "get_time"}}]
    messages = [{"role": "user", "content": "What is TTFT?"}]
    answer = chat(client, messages=messages, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=80)
    [made] = answer.choices[0].message.tool_calls
    assert choice == "required" or made.function.name == "get_time"
    if answer.choices[0].finish_reason != "length":
        assert json.loads(made.function.arguments).keys() == {"city"}
        assert answer.choices[0].finish_reason == "tool_calls"


def test_a_choice_of_none_shows_no_tools(client):
    plain = client.chat.completions.create(**GREEDY, messages=PARIS)
    none = chat(client, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


@pytest.mark.parametrize("max_tokens", range(1, 22))
def test_a_call_that_is_cut_off_is_never_told_as_one_to_be_made(client, max_tokens):
    choice = chat(client, max_tokens=max_tokens).choices[0]
    assert choice.finish_reason == "length"
    streamed = list(chat(client, max_tokens=max_tokens, stream=True))
    assert streamed[-1].choices[0].finish_reason == "length"


def test_functions_by_the_older_name(client):
    asked = {**GREEDY, "functions": [FUNCTION]}
    choice = client.chat.completions.create(**asked, messages=PARIS).choices[0]
    assert choice.finish_reason == "function_call"
    assert json.loads(choice.message.function_call.arguments) == {"city": "Paris"}
    messages = [*PARIS, choice.message, {"role": "function", "name": "get_weather", "content": SUNNY}]
    assert "18 degrees" in client.chat.completions.create(**asked, messages=messages).choices[0].message.content


def test_the_prompt_that_is_told_has_its_tools(client):
    answer = chat(client, extra_body={"return_token_ids": True})
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    body = {"messages": PARIS, "tools": TOOLS}
    assert client.post("/../tokenize", body=body, cast_to=object)["tokens"] == answer.prompt_token_ids
    asked = {"input": PARIS, "tools": [{"type": "function", **FUNCTION}], "model": MODEL}
    assert client.responses.input_tokens.count(**asked).input_tokens == answer.usage.prompt_tokens


def test_a_response_calls_and_goes_on(client):
    first = respond(client)
    [call] = first.output
    assert (call.type, call.status, json.loads(call.arguments)) == ("function_call", "completed", {"city": "Paris"})
    type(first).model_validate(first.to_dict())
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}
    remembered = respond(client, previous_response_id=first.id, input=[answer])
    sent_back = respond(client, input=[*PARIS, *first.output, answer])
    referred = respond(client, input=[*PARIS, {"type": "item_reference", "id": call.id}, answer])
    assert "18 degrees" in remembered.output_text
    assert remembered.output_text == sent_back.output_text == referred.output_text
    kinds = [item.type for item in client.responses.input_items.list(sent_back.id, order="asc").data]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_a_streamed_response_calls(client):
    tools = [openai.pydantic_function_tool(get_weather)["function"] | {"type": "function"}]
    with client.responses.stream(**GREEDY, input=PARIS, tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_response()
    [call] = final.output
    assert json.loads(call.arguments) == {"city": "Paris"}
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 1
    cut = respond(client, max_output_tokens=16)
    assert cut.status == "incomplete"
    assert [item.status for item in cut.output] == ["incomplete"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {
                                "type": "object",
                                "properties": {"x": {"type": "array", "uniqueItems": True}},
                            },
                        },
                    }
                ]
            },
            "tools[0].function.parameters",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        (
            {
                "messages": [
                    *PARIS,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                    },
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
    ids=["name", "twice", "no object", "not enforceable", "choice", "arguments"],
)
def test_what_is_wrong_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.body["param"] == param


def test_a_function_that_is_named_is_called_once_unless_more_are_asked_for(client):
    """Also by a model that would not end, which programs that want one answer could not use."""
    endless = {"temperature": 2, "seed": 1, "logit_bias": {"0": -100, "2": -100}, "max_tokens": 120}
    named = {"type": "function", "function": {"name": "get_weather"}}
    [once] = chat(client, **endless, tool_choice=named).choices
    assert (len(once.message.tool_calls), once.finish_reason) == (1, "tool_calls")
    for more in ({"tool_choice": named, "parallel_tool_calls": True}, {"tool_choice": "required"}):
        assert len(chat(client, **endless, **more).choices[0].message.tool_calls) > 1


@pytest.mark.parametrize("seed", [1, 2])
def test_wherever_calls_are_cut_off_streams_say_the_same_and_no_mark_is_content(client, seed):
    """Several calls, which come in steps of several tokens: what a grammar forces is guessed."""
    # The model does not want to end.
    options = {"tool_choice": "required", "temperature": 2, "seed": seed, "logit_bias": {"0": -100, "2": -100}}
    num_calls = set()
    for limit in range(4, 120, 5):
        [choice] = chat(client, **options, max_tokens=limit).choices
        chunks = [c.choices[0].delta for c in chat(client, **options, max_tokens=limit, stream=True) if c.choices]
        pieces = [piece for delta in chunks for piece in delta.tool_calls or ()]
        calls = choice.message.tool_calls or []
        assert not choice.message.content
        assert not any(delta.content for delta in chunks)
        assert [piece.function.name for piece in pieces if piece.id] == [call.function.name for call in calls]
        for index, call in enumerate(calls):
            said = "".join(piece.function.arguments for piece in pieces if piece.index == index)
            assert said == call.function.arguments
        # Responses have neither seed nor bias.
        asked = {"tool_choice": "required", "max_output_tokens": limit}
        items = respond(client, **asked).output
        *_, last = respond(client, **asked, stream=True)
        assert [told(item) for item in items] == [told(item) for item in last.response.output]
        num_calls.add(len(calls))
    assert max(num_calls) > 1


def told(item):
    """Of an item, what is the same in every answer."""
    if item.type == "message":
        # Of a call that was cut off before its name there is an empty message.
        assert item.content[0].text == ""
        return item.type
    return item.type, item.status, item.name, item.arguments
