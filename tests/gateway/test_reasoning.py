"""Reasoning over REST, of a real model behind a real server: told apart whole and streamed, beside schemas and tools.

The weights are those of the built-in model, which has not learned to reason. Its template opens a block, as those of
many models do, so that what it writes is reasoning until the block is closed: a limit closes it.
"""

import json
import shutil

import pytest
from openai import BadRequestError, OpenAI
from serve_process import free_port, serving

from nanoserve.config import BUILTIN_MODEL

QUESTION = [{"role": "user", "content": "What is TTFT?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "number", "strict": True, "schema": SCHEMA}}
FUNCTION = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"at": {"enum": ["cache", "queue"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = [{"type": "function", "function": FUNCTION}]
PROMPT = "{{- '<|im_start|>assistant\\n' -}}"
THINKING = """{{- reasoning_effort ~ '\n' if reasoning_effort is defined -}}
    {%- if enable_thinking is defined and not enable_thinking -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- else -%}
        {{- '<think>\\n' -}}
    {%- endif -%}"""
LIMIT = 8
LIMITED = {"max_reasoning_tokens": LIMIT}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinker") / "thinker"
    shutil.copytree(BUILTIN_MODEL, folder, ignore=shutil.ignore_patterns("draft"))
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert PROMPT in text
    template.write_text(text.replace(PROMPT, PROMPT + THINKING))
    options = ("--dtype", "float32", "--no-compile", "--kv-memory", "32MiB", "--http-port", str(free_port()))
    with serving(str(folder), *options) as server:
        server.wait_until_ready_over_http()
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def chat(client, *, extra=None, **options):
    given = {"model": "thinker", "messages": QUESTION, "temperature": 0, "max_tokens": 120, **options}
    return client.chat.completions.create(**given, extra_body=extra)


def joined(chunks):
    """What a stream says, and the kinds of its pieces in their order, each once."""
    told = {"reasoning": "", "content": "", "arguments": ""}
    order = []
    for delta in (chunk.choices[0].delta for chunk in chunks if chunk.choices):
        pieces = {
            "reasoning": getattr(delta, "reasoning", None),
            "content": delta.content,
            "arguments": "".join(call.function.arguments for call in delta.tool_calls or ()),
        }
        for kind, text in pieces.items():
            if text:
                told[kind] += text
                order += [] if order[-1:] == [kind] else [kind]
    return told, order


def test_what_is_not_closed_is_reasoning_to_the_end(client):
    answer = chat(client, max_tokens=10)
    [choice] = answer.choices
    assert choice.message.reasoning == choice.message.reasoning_content != ""
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 10
    assert "<think>" not in choice.message.reasoning


def test_a_schema_holds_for_the_answer_alone(client):
    answer = chat(client, response_format=FORMAT, n=3, temperature=1, seed=5, extra=LIMITED)
    for choice in answer.choices:
        assert choice.message.reasoning
        assert "think>" not in choice.message.reasoning + choice.message.content
        assert json.loads(choice.message.content)["n"] in range(10)
        assert (choice.finish_reason, choice.constraint_outcome) == ("stop", "satisfied")
    assert len({choice.message.reasoning for choice in answer.choices}) > 1
    # Of each choice so many, and those that close the block.
    assert 3 * LIMIT < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_a_schema_that_reasoning_leaves_no_room_for_is_truncated(client):
    [choice] = chat(client, response_format=FORMAT, max_tokens=20).choices
    assert (choice.message.content, choice.finish_reason, choice.constraint_outcome) == ("", "length", "truncated")


def test_without_thinking_the_schema_holds_from_the_start(client):
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = chat(client, response_format=FORMAT, extra=kwargs)
    [choice] = answer.choices
    assert not hasattr(choice.message, "reasoning")
    assert json.loads(choice.message.content)["n"] in range(10)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("wanted", [{"response_format": FORMAT}, {"tools": TOOLS, "tool_choice": "required"}])
def test_a_stream_says_the_same_piece_by_piece(client, wanted):
    [choice] = chat(client, extra=LIMITED, **wanted).choices
    calls = choice.message.tool_calls or ()
    told, order = joined(chat(client, extra=LIMITED, stream=True, **wanted))
    assert told == {
        "reasoning": choice.message.reasoning,
        "content": choice.message.content or "",
        "arguments": "".join(call.function.arguments for call in calls),
    }
    assert order == ["reasoning", "arguments" if calls else "content"]
    assert choice.finish_reason == ("tool_calls" if calls else "stop")


def test_reasoning_may_be_left_out(client):
    told, order = joined(
        chat(client, response_format=FORMAT, stream=True, extra={**LIMITED, "include_reasoning": False})
    )
    assert order == ["content"]
    assert json.loads(told["content"])["n"] in range(10)


def test_an_effort_is_a_variable_of_the_template(client):
    plain = chat(client, max_tokens=1)
    for extra in ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        assert chat(client, max_tokens=1, extra=extra).usage.prompt_tokens > plain.usage.prompt_tokens
    asked = {"model": "thinker", "input": QUESTION, "max_output_tokens": 1}
    response = client.responses.create(**asked, reasoning={"effort": "high"})
    assert response.usage.input_tokens > client.responses.create(**asked).usage.input_tokens
    with pytest.raises(BadRequestError) as refused:
        chat(client, extra={"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}})
    assert refused.value.param == "chat_template_kwargs.reasoning_effort"


def test_a_template_without_it_refuses_it_by_the_name_that_the_caller_used(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for extra, param in (
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ):
            with pytest.raises(BadRequestError, match="not a variable of the model's chat template") as refused:
                chat(client, model="nanoserve-builtin", extra=extra)
            assert refused.value.param == param
        with pytest.raises(BadRequestError) as refused:
            client.responses.create(model="nanoserve-builtin", input=QUESTION, reasoning={"effort": "low"})
        assert refused.value.param == "reasoning.effort"


def test_a_response_has_items_of_each_kind_whole_and_streamed(client):
    tools = [{"type": "function", **FUNCTION}]
    asked = {"model": "thinker", "input": QUESTION, "temperature": 0, "tools": tools, "tool_choice": "required"}
    whole = client.responses.create(**asked, extra_body=LIMITED)
    assert [(item.type, item.status) for item in whole.output] == [
        ("reasoning", "completed"),
        ("function_call", "completed"),
    ]
    reasoning, call = whole.output
    assert json.loads(call.arguments)["at"] in ("cache", "queue")
    events = list(client.responses.create(**asked, stream=True, extra_body=LIMITED))
    pieces = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(pieces) == reasoning.content[0].text
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == call.arguments
    assert whole.usage.output_tokens_details.reasoning_tokens > LIMIT
    # All of it can be sent back, with the call's answer.
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "empty"}
    turns = [*QUESTION, *whole.output, answer]
    again = client.responses.create(**{**asked, "input": turns, "tool_choice": "auto"}, extra_body=LIMITED)
    assert again.output[0].type == "reasoning"
