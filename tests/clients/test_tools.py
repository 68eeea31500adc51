"""Tools, reasoning and content: from options to the contract's fields, and from pieces to calls."""

import pytest
from nanoserve_client import CallPiece, ChatMessage, MadeCall, Tool
from nanoserve_client.requests import chat_request
from nanoserve_client.v1 import generation_pb2 as pb
from pydantic import BaseModel
from scripted_server import delta, finished, started


class Where(BaseModel):
    """Arguments of a tool."""

    city: str


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = Tool("weather", "Of a city", SCHEMA, strict=True)


def chat_of(**options):
    return chat_request("?", options).chat


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER,
        {"name": "weather", "description": "Of a city", "parameters": SCHEMA, "strict": True},
        {"name": "weather", "description": "Of a city", "parameters": SCHEMA | {}, "strict": True},
    ],
)
def test_a_tool_may_be_given_in_several_ways(tool):
    (told,) = chat_of(tools=[tool]).tools
    assert (told.name, told.description, told.strict) == ("weather", "Of a city", True)
    assert told.parameters_json == '{"type": "object", "properties": {"city": {"type": "string"}}}'


def test_parameters_may_be_a_class_of_pydantic():
    (told,) = chat_of(tools=[Tool("weather", parameters=Where)]).tools
    assert '"city"' in told.parameters_json
    assert not told.strict


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("none", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)),
        ("auto", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO)),
        ("required", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)),
        ("weather", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, names=["weather"])),
        (["weather", "time"], pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO, names=["weather", "time"])),
    ],
)
def test_a_choice_is_a_mode_or_names(choice, told):
    assert chat_of(tools=[WEATHER], tool_choice=choice).tool_choice == told


def test_what_is_not_given_is_not_set():
    chat = chat_of(tools=[WEATHER])
    assert not chat.HasField("tool_choice")
    assert not chat.HasField("parallel_tool_calls")
    assert chat_of(tools=[WEATHER], parallel_tool_calls=False).HasField("parallel_tool_calls")


@pytest.mark.parametrize(
    ("options", "is_parsed"),
    [({}, True), ({"parse": False}, False), ({"omit_text": True}, False), ({"keep_special_tokens": True}, False)],
)
def test_parts_of_an_answer_are_asked_for_where_there_can_be_any(options, is_parsed):
    assert chat_request("?", options).output.parse is is_parsed


def test_a_call_that_was_made_serves_as_a_part_of_the_conversation():
    call = MadeCall("call_1", "weather", '{"city": "Rome"}', is_complete=True)
    message = ChatMessage("assistant", tool_calls=[call], reasoning="Rome, then.")
    (told,) = chat_request([message], {}).chat.messages
    assert told.reasoning == "Rome, then."
    assert told.tool_calls[0] == pb.ToolCall(id="call_1", name="weather", arguments_json='{"city": "Rome"}')


def piece(index, arguments="", *, complete=False, **first):
    return pb.ToolCallDelta(index=index, arguments_json=arguments, complete=complete, **first)


async def test_parts_come_as_they_are_told_and_are_joined_in_the_end(face, server):
    def generate(_request, _context):
        yield started()
        yield delta(0, "<think>Hm", (1,), reasoning="H", content="")
        yield delta(0, "m</think>Well.", (1,), reasoning="mm", content="Well.")
        yield delta(0, "", (1,), tool_calls=[piece(0, '{"city"', id="a", name="weather")])
        last = [piece(0, ': "Rome"}', complete=True), piece(1, "{", id="b", name="time")]
        yield delta(0, "...", (1,), finish_reason=pb.FINISH_REASON_LENGTH, tool_calls=last, content="")
        yield finished(4)

    server.script.generate = generate
    result = await face.call(face.connect(server.target).chat("?", tools=[WEATHER]).result)
    assert (result.reasoning, result.content, result.text) == ("Hmm", "Well.", "<think>Hmm</think>Well....")
    assert result.tool_calls == (
        MadeCall("a", "weather", '{"city": "Rome"}', is_complete=True),
        MadeCall("b", "time", "{", is_complete=False),
    )
    assert result.tool_calls[0].parsed == {"city": "Rome"}
    with pytest.raises(ValueError, match="the call of time is cut off"):
        _ = result.tool_calls[1].parsed


async def test_a_piece_says_what_is_new_of_it(face, server):
    def generate(_request, _context):
        yield started()
        yield delta(0, "x", (1,), tool_calls=[piece(0, "{", id="a", name="f")])
        yield delta(0, "y", (1,), finish_reason=pb.FINISH_REASON_EOS, tool_calls=[piece(0, "}", complete=True)])
        yield finished(2)

    server.script.generate = generate
    stream = face.connect(server.target).chat("?", tools=[WEATHER])
    pieces = [each for new in await face.deltas(stream) for each in new.tool_calls]
    assert pieces == [
        CallPiece(0, "a", "f", "{", is_complete=False),
        CallPiece(0, "", "", "}", is_complete=True),
    ]


async def test_without_parse_the_text_is_all_there_is(face, server):
    def generate(_request, _context):
        yield started()
        yield delta(0, "<think>Hm</think>Well.", (1,), finish_reason=pb.FINISH_REASON_EOS)
        yield finished(1)

    server.script.generate = generate
    result = await face.call(face.connect(server.target).chat("?", parse=False).result)
    assert result.content == result.text == "<think>Hm</think>Well."
    assert (result.reasoning, result.tool_calls) == ("", ())
