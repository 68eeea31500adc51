"""Tools and reasoning in the Responses API: items in, items out, and the events between."""

import json

import grpc
import pytest
from google.rpc import error_details_pb2
from nanoserve_client.progress import Progress
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.answer import to_json
from nanoserve_gateway.fields import RESPONSES
from nanoserve_gateway.items import items_of, turns_of
from nanoserve_gateway.responses import ResponseAnswer
from nanoserve_gateway.schema import BadRequest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_server import RichStatus, delta, finished, started

TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
EOS, LENGTH = pb.FINISH_REASON_EOS, pb.FINISH_REASON_LENGTH
EVENT = TypeAdapter(ResponseStreamEvent)


def response(previous=None, **fields):
    kept = []
    answer = ResponseAnswer(RESPONSES.parse({"model": "m", "input": "hi", **fields}), previous, kept.append)
    return answer, kept


def asked(previous=None, **fields):
    return response(previous, **fields)[0].requests[0].chat


# ------------------------------------------------------------------------------------------------ what is asked for


def test_a_tool_is_strict_unless_it_says_otherwise():
    given = [TOOL, {**TOOL, "strict": False}, {**TOOL, "strict": None}, {"type": "function", "name": "f"}]
    tools = asked(tools=given).tools
    assert [tool.strict for tool in tools] == [True, False, True, True]
    assert [tool.parameters_json for tool in tools] == [*['{"type": "object"}'] * 3, ""]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)),
        ("none", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)),
        ({"type": "function", "name": "a"}, pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, names=["a"])),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "a"}]},
            pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO, names=["a"]),
        ),
    ],
    ids=str,
)
def test_every_choice_reaches_its_place(choice, expected):
    prompt = asked(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert prompt.tool_choice == expected
    assert not prompt.parallel_tool_calls


def call(number, **fields):
    arguments = {"arguments": '{"city": "Paris"}', **fields}
    return {"type": "function_call", "call_id": f"c{number}", "name": "get_weather", **arguments}


def answer(number, output="sunny"):
    return {"type": "function_call_output", "call_id": f"c{number}", "output": output}


REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
MADE = [pb.ToolCall(id=f"c{i}", name="get_weather", arguments_json='{"city": "Paris"}') for i in range(2)]
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}


def test_what_the_assistant_did_in_one_go_is_one_message():
    items = [
        {"role": "user", "content": "hi"},
        *[REASONING, SAID, call(0), call(1, status="completed", id="fc_1")],
        *[answer(0), answer(1, [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}])],
        *[SAID, SAID, REASONING, call(0)],
    ]
    assistant, tool = pb.ROLE_ASSISTANT, pb.ROLE_TOOL
    assert list(asked(input=items).messages) == [
        pb.ChatMessage(role=pb.ROLE_USER, content="hi"),
        pb.ChatMessage(role=assistant, content="I look.", reasoning="hm", tool_calls=MADE),
        pb.ChatMessage(role=tool, content="sunny", tool_call_id="c0"),
        pb.ChatMessage(role=tool, content_parts=["a", "b"], tool_call_id="c1"),
        pb.ChatMessage(role=assistant, content="I look."),
        pb.ChatMessage(role=assistant, content="I look."),
        pb.ChatMessage(role=assistant, reasoning="hm", tool_calls=MADE[:1]),
    ]


def test_every_item_can_be_listed():
    items = items_of([call(0), answer(0), {"type": "reasoning", "content": []}, {"role": "user", "content": "a"}])
    assert [item["id"].split("_")[0] for item in items] == ["fc", "fco", "rs", "msg"]
    assert items[2]["summary"] == []
    assert len(turns_of(items)) == 3  # nothing was thought


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "skip_special_tokens": False}, "skip_special_tokens"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(fields, param):
    with pytest.raises(BadRequest) as caught:
        response(**fields)
    assert [violation.param for violation in caught.value.violations] == [param]


@pytest.mark.parametrize(
    ("fields", "path", "param"),
    [
        ({"tools": [TOOL]}, "chat.tools[0].name", "tools[0].name"),
        ({"tools": [TOOL]}, "chat.tools[0].parameters_json", "tools[0].parameters"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}},
            "chat.tool_choice.names[0]",
            "tool_choice.name",
        ),
        *[
            ({"instructions": "a", "input": [REASONING, call(0), call(1), answer(0)]}, path, param)
            for path, param in (
                ("chat.messages[1].tool_calls[1].arguments_json", "input[2].arguments"),
                ("chat.messages[1].tool_calls[0].name", "input[1].name"),
                ("chat.messages[1].reasoning", "input[0].content"),
                ("chat.messages[2].content", "input[3].output"),
                ("chat.messages[2].tool_call_id", "input[3].call_id"),
            )
        ],
    ],
)
def test_what_the_service_refuses_is_named_as_the_caller_knows_it(scripted, fields, path, param):
    def refuse(_request, context):
        violation = error_details_pb2.BadRequest.FieldViolation(field=path, description="is wrong")
        info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="nanoserve")
        details = (info, error_details_pb2.BadRequest(field_violations=[violation]))
        context.abort_with_status(RichStatus(grpc.StatusCode.INVALID_ARGUMENT, packed=details))
        yield

    scripted.script.generate = refuse
    refused = scripted.http.post("/v1/responses", json={"input": "hi", **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


# ------------------------------------------------------------------------------------------------ what comes back


def begun(number, arguments=""):
    return pb.ToolCallDelta(index=number, id=f"c{number}", name="get_weather", arguments_json=arguments)


def more(number, arguments="", *, complete=False):
    return pb.ToolCallDelta(index=number, arguments_json=arguments, complete=complete)


def run(answer, *deltas):
    """The events of a stream, and its result."""
    progress = Progress(None, is_parsed=answer.requests[0].output.parse)
    progress.take(started())
    body = b"".join(answer.begin([progress.started]))
    for each in deltas:
        body += b"".join(answer.delta(0, progress.take(each)))
    progress.take(finished(3))
    progress.end()
    body += b"".join(answer.end([progress.result()]))
    lines = body.decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")], progress.result()


EVERYTHING = [
    delta(content="", reasoning="h"),
    delta(content="I look.", reasoning="m", tool_calls=[begun(0, '{"ci')]),
    delta(tool_calls=[more(0, 'ty": "Paris"}', complete=True), begun(1)]),
    delta(tool_calls=[more(1, '{"city": "Paris"}')]),
    delta(tool_calls=[more(1, complete=True)]),
    delta(finish_reason=EOS),
]


def test_every_kind_of_item_is_told_in_its_order():
    streamed, kept = response(tools=[TOOL], stream=True)
    events, result = run(streamed, *EVERYTHING)
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    parts = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
    reasoning, message = ([part.format(name) for part in parts] for name in ("reasoning_text", "output_text"))
    reasoning.insert(1, "reasoning_text.delta")
    arguments = [f"function_call_arguments.{name}" for name in ("delta", "delta", "done")]
    made = [reasoning, message, arguments, arguments[1:]]
    expected = [name for item in made for name in ("output_item.added", *item, "output_item.done")]
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *expected,
        "completed",
    ]
    last = events[-1]["response"]
    by_type = [item["type"] for item in last["output"]]
    assert by_type == ["reasoning", "message", "function_call", "function_call"]
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        assert own[-1]["item"] == item
        assert own[0]["item"]["status"] == "in_progress"
    told = "".join(e["delta"] for e in events if e["type"].endswith("arguments.delta") and e["output_index"] == 2)
    assert told == last["output"][2]["arguments"] == '{"city": "Paris"}'
    whole = json.loads(to_json(response(tools=[TOOL])[0].whole([result])))
    Response.model_validate(whole)
    assert [without_id(item) for item in whole["output"]] == [without_id(item) for item in last["output"]]
    assert json.loads(to_json(kept[0].response)) == last


def without_id(item):
    return {name: value for name, value in item.items() if name != "id"}


def test_a_response_repeats_its_tools():
    answer, _ = response(tools=[TOOL], tool_choice="required")
    whole = answer.snapshot("queued")
    assert whole.tools == [{**TOOL, "strict": True}]
    assert (whole.tool_choice, whole.parallel_tool_calls) == ("required", True)
    assert (response()[0].snapshot("queued").tool_choice, response()[0].snapshot("queued").tools) == ("none", [])


def test_a_call_that_was_cut_off_is_never_told_as_complete():
    streamed, kept = response(tools=[TOOL], stream=True)
    events, _ = run(streamed, delta(tool_calls=[begun(0, '{"ci')]), delta(finish_reason=LENGTH))
    assert "response.function_call_arguments.done" not in [event["type"] for event in events]
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    [item] = last["response"]["output"]
    assert (item["status"], item["arguments"]) == ("incomplete", '{"ci')
    # Whoever goes on from it goes on without it.
    assert [message["role"] for message in kept[0].messages] == ["user"]


def test_calls_are_remembered():
    first, kept = response(tools=[TOOL])
    _, result = run(response(tools=[TOOL], stream=True)[0], *EVERYTHING)
    first.whole([result])
    messages = asked(kept[0], input=[answer(0), answer(1)], previous_response_id=first.id, tools=[TOOL]).messages
    assert list(messages)[1:] == [
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="I look.", reasoning="hm", tool_calls=MADE),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="sunny", tool_call_id="c0"),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="sunny", tool_call_id="c1"),
    ]


def test_without_any_output_there_is_an_empty_message():
    events, _ = run(response(stream=True)[0], delta(finish_reason=EOS))
    [item] = events[-1]["response"]["output"]
    assert item["content"][0]["text"] == ""
