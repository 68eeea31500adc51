"""Tools and their calls: from OpenAI's names to the contract's Chat, and from its parts to OpenAI's messages."""

import itertools
import json

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoserve_client.progress import Progress
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.answer import to_json
from nanoserve_gateway.chat import ChatAnswer
from nanoserve_gateway.fields import CHAT
from nanoserve_gateway.schema import BadRequest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted_server import RichStatus, delta, finished, started

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {**TIME, "strict": True}}]
MESSAGES = [{"role": "user", "content": "hi"}]
AUTO, REQUIRED = pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_REQUIRED


def chat(**fields):
    return ChatAnswer(CHAT.parse({"model": "m", "messages": MESSAGES, **fields}))


def asked(**fields):
    return chat(**fields).requests[0].chat


# ------------------------------------------------------------------------------------------------ what is asked for


def test_tools_reach_their_place():
    prompt = asked(tools=TOOLS, parallel_tool_calls=False)
    assert list(prompt.tools) == [
        pb.Tool(name="get_weather", description="Weather.", parameters_json=json.dumps(SCHEMA)),
        pb.Tool(name="get_time", strict=True),
    ]
    assert prompt.HasField("parallel_tool_calls")
    assert not prompt.parallel_tool_calls
    assert not prompt.HasField("tool_choice")
    assert chat(tools=TOOLS).requests[0].output.parse


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("none", pb.TOOL_CHOICE_MODE_NONE, []),
        ("auto", AUTO, []),
        ("required", REQUIRED, []),
        ({"type": "function", "function": {"name": "get_time"}}, REQUIRED, ["get_time"]),
        *[
            (
                {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}},
                number,
                ["get_time", "get_weather"],
            )
            for mode, number in (("auto", AUTO), ("required", REQUIRED))
            for named in [[{"type": "function", "function": {"name": name}} for name in ("get_time", "get_weather")]]
        ],
    ],
    ids=str,
)
def test_every_choice_reaches_its_place(choice, mode, names):
    assert asked(tools=TOOLS, tool_choice=choice).tool_choice == pb.ToolChoice(mode=mode, names=names)


def test_a_tool_may_be_called_like_a_mode():
    tools = [{"type": "function", "function": {"name": "auto"}}]
    choice = {"type": "function", "function": {"name": "auto"}}
    assert asked(tools=tools, tool_choice=choice).tool_choice == pb.ToolChoice(mode=REQUIRED, names=["auto"])


@pytest.mark.parametrize("nothing", [{}, {"tools": []}, {"tool_choice": "auto"}, {"tools": [], "tool_choice": "none"}])
def test_no_tools_are_none(nothing):
    assert asked(**nothing, parallel_tool_calls=True) == asked()


def test_older_names_mean_the_same():
    prompt = asked(functions=[WEATHER, TIME], function_call={"name": "get_time"})
    assert list(prompt.tools) == list(asked(tools=[{"type": "function", "function": f} for f in (WEATHER, TIME)]).tools)
    assert prompt.tool_choice == pb.ToolChoice(mode=REQUIRED, names=["get_time"])
    # An answer has room for one.
    assert prompt.HasField("parallel_tool_calls")
    assert not prompt.parallel_tool_calls
    assert asked(functions=[TIME], function_call="auto").tool_choice.mode == AUTO


def test_the_ids_of_the_prompt_are_told_with_its_tools():
    assert chat(tools=TOOLS, return_token_ids=True).prompts[0].options["tools"][0]["name"] == "get_weather"
    assert "tools" not in chat(tools=TOOLS, tool_choice="none").prompts[0].options


def test_calls_and_reasoning_of_earlier_turns_are_kept():
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "so"},
    ]
    made = pb.ToolCall(id="c1", name="get_weather", arguments_json='{"city": "Paris"}')
    assert list(asked(messages=messages).messages)[1:] == [
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, reasoning="hm", tool_calls=[made]),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="sunny", tool_call_id="c1"),
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="It is sunny.", reasoning="so"),
    ]


def test_calls_by_the_older_name_are_tied_to_their_answers():
    call = {"name": "get_weather", "arguments": ""}
    answer = {"role": "function", "name": "get_weather", "content": "sunny"}
    said = {"role": "assistant", "content": None, "function_call": call}
    messages = [*MESSAGES, said, answer, {"role": "function", "name": "get_time", "content": None}]
    made = pb.ToolCall(id="call_1", name="get_weather", arguments_json="{}")
    assert list(asked(messages=messages).messages)[1:] == [
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[made]),
        pb.ChatMessage(role=pb.ROLE_TOOL, name="get_weather", content="sunny", tool_call_id="call_1"),
        pb.ChatMessage(role=pb.ROLE_TOOL, name="get_time", content=""),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tools": TOOLS, "function_call": "none"}, "function_call"),
        ({"functions": [TIME], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "functions": [TIME]}, "functions"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "skip_special_tokens": False}, "skip_special_tokens"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(fields, param):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert [violation.param for violation in caught.value.violations] == [param]


OLD = [*MESSAGES, {"role": "assistant", "function_call": {"name": "f", "arguments": "["}}]
ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("fields", "path", "param"),
    [
        ({"tools": TOOLS}, "chat.tools[1].name", "tools[1].function.name"),
        ({"tools": TOOLS}, "chat.tools[0].parameters_json", "tools[0].function.parameters"),
        ({"tools": TOOLS}, "chat.tools", "tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "chat.tool_choice", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required"}, "chat.tool_choice.mode", "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "chat.tool_choice.names[0]",
            "tool_choice.function.name",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED}},
            "chat.tool_choice.names[0]",
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"functions": [TIME]}, "chat.tools[0].name", "functions[0].name"),
        ({"functions": [TIME]}, "chat.tools[0].parameters_json", "functions[0].parameters"),
        (
            {"functions": [TIME], "function_call": {"name": "f"}},
            "chat.tool_choice.names[0]",
            "function_call.name",
        ),
        ({"tools": TOOLS}, "chat.parallel_tool_calls", "parallel_tool_calls"),
        ({}, "chat.messages[1].tool_calls[0].arguments_json", "messages[1].tool_calls[0].function.arguments"),
        ({"messages": OLD}, "chat.messages[1].tool_calls[0].arguments_json", "messages[1].function_call.arguments"),
        ({}, "stopping.max_reasoning_tokens", "max_reasoning_tokens"),
    ],
)
def test_what_the_service_refuses_is_named_as_the_caller_knows_it(scripted, fields, path, param):
    def refuse(_request, context):
        violation = error_details_pb2.BadRequest.FieldViolation(field=path, description="is wrong")
        context.abort_with_status(
            RichStatus(
                grpc.StatusCode.INVALID_ARGUMENT,
                packed=(
                    error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="nanoserve"),
                    error_details_pb2.BadRequest(field_violations=[violation]),
                ),
            )
        )
        yield

    scripted.script.generate = refuse
    answer = scripted.http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# ------------------------------------------------------------------------------------------------ what comes back


def begun(call, name, arguments=""):
    return pb.ToolCallDelta(index=call, id=f"call_{call}", name=name, arguments_json=arguments)


def more(call, arguments="", *, complete=False):
    return pb.ToolCallDelta(index=call, arguments_json=arguments, complete=complete)


def run(answer, *deltas, **end):
    """The chunks of a stream, and its result."""
    progress = Progress(None, is_parsed=answer.requests[0].output.parse)
    progress.take(started())
    body = b"".join(answer.begin([progress.started]))
    for each in deltas:
        body += b"".join(answer.delta(0, progress.take(each)))
    progress.take(finished(3, **end))
    progress.end()
    body += b"".join(answer.end([progress.result()]))
    datas = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    assert datas.pop() == "[DONE]"
    return [json.loads(data) for data in datas], progress.result()


def both(deltas, **fields):
    """The choice of the answer, and deltas of the chunks without the first and the last one, and its reason."""
    chunks, result = run(chat(tools=TOOLS, **fields, stream=True), *deltas)
    whole = json.loads(to_json(chat(tools=TOOLS, **fields).whole([result])))
    ChatCompletion.model_validate(whole)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    return whole["choices"][0], [choice["delta"] for choice in choices[1:-1]]


EOS, LENGTH, STOP = pb.FINISH_REASON_EOS, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP
CALL = [
    delta(content="", tool_calls=[begun(0, "get_weather", '{"ci')]),
    delta(content="", tool_calls=[more(0, 'ty": "Paris"}', complete=True)]),
]


def test_a_call_is_begun_once_and_its_arguments_follow():
    last = delta(finish_reason=EOS)
    choice, deltas = both([*CALL, last])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    }
    head = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    assert deltas == [
        {"tool_calls": [head]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Paris"}'}}]},
    ]


def test_parts_come_in_the_order_in_which_they_were_written():
    calls = [begun(0, "get_time"), more(0, "{}", complete=True), begun(1, "get_weather", "{}"), more(1, complete=True)]
    everything = delta(text="hm...", reasoning="hm", content="I look.", tool_calls=calls, finish_reason=EOS)
    choice, deltas = both([everything])
    assert [next(iter(each)) for each in deltas] == ["reasoning_content", "content", *["tool_calls"] * 4]
    assert deltas[0] == {"reasoning_content": "hm", "reasoning": "hm"}
    assert [each["tool_calls"][0]["index"] for each in deltas[2:]] == [0, 0, 1, 1]
    message = choice["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("I look.", "hm", "hm")
    assert [call["id"] for call in message["tool_calls"]] == ["call_0", "call_1"]


def test_reasoning_may_be_left_out():
    choice, deltas = both([delta(content="so", reasoning="hm"), delta(finish_reason=EOS)], include_reasoning=False)
    assert deltas == [{"content": "so"}]
    assert not {"reasoning", "reasoning_content"} & choice["message"].keys()


CUT = delta(content="", tool_calls=[begun(1, "get_weather", '{"ci')])


@pytest.mark.parametrize(
    ("deltas", "end", "reason"),
    [
        (CALL, EOS, "tool_calls"),
        (CALL, pb.FINISH_REASON_COMPLETE, "tool_calls"),
        (CALL, STOP, "tool_calls"),
        # What was cut off is never told as a call to be made.
        *[([*CALL, CUT], end, "length") for end in (LENGTH, pb.FINISH_REASON_CONTEXT, pb.FINISH_REASON_TIME_LIMIT)],
        (CALL, LENGTH, "length"),
        ([*CALL, CUT], STOP, "stop"),
        ([CUT], STOP, "stop"),
        ([], EOS, "stop"),
    ],
)
def test_why_it_ended(deltas, end, reason):
    choice, _ = both([*deltas, delta(finish_reason=end)])
    assert choice["finish_reason"] == reason


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_that_were_required_end_like_all_others(choice):
    made, _ = both([*CALL, delta(finish_reason=pb.FINISH_REASON_COMPLETE)], tool_choice=choice)
    assert made["finish_reason"] == "tool_calls"


def test_a_call_by_the_older_name():
    fields = {"functions": [WEATHER]}
    chunks, result = run(chat(**fields, stream=True), *CALL, delta(finish_reason=EOS))
    choice = json.loads(to_json(chat(**fields).whole([result])))["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert choice["message"]["content"] is None
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [
        {"function_call": {"name": "get_weather", "arguments": ""}},
        {"function_call": {"arguments": '{"ci'}},
        {"function_call": {"arguments": 'ty": "Paris"}'}},
    ]


def test_tokens_and_logprobs_are_told_once_of_a_delta_with_many_parts():
    token = pb.TokenLogprob(token_id=7, token=b"x", logprob=-1, rank=1)
    event = delta(content="so", token_ids=(7,), logprobs=[token], reasoning="hm", tool_calls=[begun(0, "f", "{}")])
    answer = chat(tools=TOOLS, stream=True, logprobs=True, return_token_ids=True)
    chunks, _ = run(answer, event, delta(finish_reason=EOS))
    choices = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert [choice["token_ids"] for choice in choices] == [[7], [], [], []]
    assert ["logprobs" in choice for choice in choices] == [True, False, False, False]


def test_tokens_of_reasoning_are_counted():
    progress = Progress(None, is_parsed=True)
    usage = pb.Usage(prompt_tokens=4, completion_tokens=5, reasoning_tokens=2)
    last = pb.GenerateResponse(finished=pb.Finished(usage=usage))
    for event in (started(), delta(content="so", reasoning="hm", finish_reason=EOS), last):
        progress.take(event)
    progress.end()
    told = json.loads(to_json(chat().whole([progress.result()])))["usage"]
    assert told["completion_tokens_details"]["reasoning_tokens"] == 2


def test_what_of_a_tool_was_not_enforced_is_told_of_that_tool():
    keyword = pb.UnenforcedKeyword(keyword="uniqueItems", why="x", field="chat.tools[1].parameters_json")
    end = {"constraint_outcomes": [pb.CONSTRAINT_OUTCOME_RELAXED_OK], "unenforced": [keyword]}
    chunks, result = run(chat(tools=TOOLS, stream=True), *CALL, delta(finish_reason=EOS), **end)
    whole = json.loads(to_json(chat(tools=TOOLS).whole([result])))
    for choice in (chunks[-1]["choices"][0], whole["choices"][0]):
        assert choice["unenforced"][0]["param"] == "tools[1].function.parameters"


TEXTS = st.text(max_size=6)


@settings(deadline=None)
@given(
    TEXTS, TEXTS, st.lists(TEXTS, max_size=3), st.lists(st.integers(0, 40), max_size=6), st.sampled_from([EOS, LENGTH])
)
def test_openais_own_client_puts_the_chunks_together_as_they_are_whole(reasoning, content, calls, cuts, end):
    """However the pieces are cut."""
    pieces = [("reasoning", c) for c in reasoning] + [("content", c) for c in content]
    for number, text in enumerate(calls):
        pieces.append(("begin", number))
        pieces += [("arguments", (number, c)) for c in json.dumps({"x": text})]
        pieces.append(("end", number))
    marks = sorted({0, *(cut % (len(pieces) + 1) for cut in cuts), len(pieces)})
    deltas = [delta_of(pieces[begin:stop]) for begin, stop in itertools.pairwise(marks)]
    chunks, result = run(chat(tools=TOOLS, stream=True), *deltas, delta(finish_reason=end))
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    joined = state.get_final_completion().choices[0] if end == EOS else state.current_completion_snapshot.choices[0]
    [whole] = chat(tools=TOOLS).whole([result]).choices
    assert joined.finish_reason == whole.finish_reason
    assert (joined.message.content or None) == (whole.message.content or None)
    assert getattr(joined.message, "reasoning", "") == getattr(whole.message, "reasoning", "")
    told = [
        (call.id, call.type, call.function.name, call.function.arguments) for call in joined.message.tool_calls or ()
    ]
    assert told == [
        (call.id, call.type, call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()
    ]
    assert [json.loads(arguments) for *_, arguments in told] == [{"x": text} for text in calls]


def delta_of(pieces):
    """As the service joins what comes between two deltas."""
    event = pb.Delta()
    for kind, value in pieces:
        if kind in ("reasoning", "content"):
            setattr(event, kind, getattr(event, kind) + value)
            event.text += value
            continue
        number = value[0] if kind == "arguments" else value
        if not (event.tool_calls and event.tool_calls[-1].index == number):
            event.tool_calls.add(index=number)
        call = event.tool_calls[-1]
        if kind == "begin":
            call.id, call.name = f"call_{number}", "get_weather"
        elif kind == "arguments":
            call.arguments_json += value[1]
        else:
            call.complete = True
    return pb.GenerateResponse(delta=event)
