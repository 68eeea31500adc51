"""What a reply may be, and what is read out of it: over simulated KV memory, with the tokens of bytes.

The fake model writes at random what its grammar allows; where a test says what it writes, a regex forces it.
"""

import json
from dataclasses import replace

import pytest
from engine_bench import running

from nanoserve.constraint.outcome import Outcome
from nanoserve.dialect.formats import Dialect, call_format, reasoning_format
from nanoserve.dialect.tools import Choosing, Tool, ToolChoice, ToolUse
from nanoserve.engine.chat_template import Chat
from nanoserve.engine.engine import Engine
from nanoserve.engine.reply import CallPiece, Parts, Reader, Reply, Wanted, plan_reply
from nanoserve.engine.stream import Delta
from nanoserve.errors import ConstraintInvalid, InvalidRequest
from nanoserve.request import Constraint, ConstraintKind

QWEN = Dialect(reasoning_format("qwen3"), call_format("hermes"))
CODER = Dialect(None, call_format("qwen3_coder"))
WEATHER = Tool(
    "weather",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
STRICT = Tool(WEATHER.name, WEATHER.parameters, is_strict=True)
TIME = Tool("time")
YES_OR_NO = Constraint.of_choices(["yes", "no"])
ASKED = "<|im_start|>assistant\n"
OPEN = ASKED + "<think>\n"


def plan(tool_use=None, *, prompt=ASKED, dialect=QWEN, begins=True, most=None, **wanted):
    return plan_reply(
        Wanted(**wanted),
        tool_use or ToolUse(),
        dialect,
        prompt,
        begins_message=begins,
        max_reasoning_tokens=most,
        special_id=lambda _: None,
    )


REQUIRED = ToolChoice(Choosing.REQUIRED)


@pytest.mark.parametrize(
    "tool_use",
    [
        ToolUse(),
        ToolUse((WEATHER,)),
        ToolUse((STRICT,), ToolChoice(Choosing.NONE)),
        ToolUse((WEATHER, STRICT), ToolChoice(Choosing.NONE), parallel=False),
    ],
)
def test_what_is_left_to_the_model_has_no_grammar(tool_use):
    for prompt in (ASKED, OPEN):
        assert plan(tool_use, prompt=prompt).constraint is None


@pytest.mark.parametrize(
    "tool_use",
    [
        ToolUse((STRICT,)),
        ToolUse((WEATHER,), REQUIRED),
        ToolUse((WEATHER,), parallel=False),
        ToolUse((WEATHER, TIME), ToolChoice(names=frozenset(["time"]))),
    ],
)
def test_what_a_caller_asks_of_calls_is_held_to(tool_use):
    constraint = plan(tool_use).constraint
    assert constraint.kind is ConstraintKind.DIALECT
    assert all(part.field == f"chat.tools[{name[5]}].parameters_json" for name, part in constraint.parts)
    assert all(part.is_relaxed is not tool_use.tools[int(name[5])].is_strict for name, part in constraint.parts)


def test_a_constraint_holds_for_the_answer_or_for_all_from_the_start():
    assert plan(constraint=YES_OR_NO, dialect=Dialect()).constraint == YES_OR_NO
    assert plan(constraint=YES_OR_NO, is_from_start=True, prompt=OPEN).constraint == YES_OR_NO
    # The model may not reason any more.
    closed = plan(constraint=YES_OR_NO, prompt=OPEN + "\n</think>\n\n")
    assert closed.constraint == YES_OR_NO
    for reply in (plan(constraint=YES_OR_NO), plan(constraint=YES_OR_NO, prompt=OPEN)):
        assert reply.constraint.kind is ConstraintKind.DIALECT
        assert dict(reply.constraint.parts)["answer"].text == YES_OR_NO.text
        assert reply.constraint.path == "constraint.choices"
    # What goes on in the middle of a message does not begin with reasoning.
    assert plan(constraint=YES_OR_NO, begins=False).constraint == YES_OR_NO


def test_a_budget_of_reasoning_needs_a_grammar_where_there_may_be_reasoning():
    assert plan(most=5).constraint.closing_text
    assert plan(most=5, prompt=OPEN).constraint.is_reasoning
    assert plan(most=5, prompt=OPEN + "\n</think>\n\n").constraint is None
    with pytest.raises(InvalidRequest, match="--reasoning-parser"):
        plan(most=5, dialect=Dialect())


def test_calls_that_cannot_be_written_are_refused_only_where_they_are_held_to():
    assert plan(ToolUse((WEATHER,)), dialect=Dialect()).constraint is None
    with pytest.raises(InvalidRequest, match="--tool-call-parser"):
        plan(ToolUse((WEATHER,), REQUIRED), dialect=Dialect())


def test_what_a_format_cannot_enforce_is_refused_of_a_strict_tool_and_checked_of_another():
    schema = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]+$"}}, "required": ["code"]}
    with pytest.raises(ConstraintInvalid) as caught:
        plan(ToolUse((Tool("f", schema, is_strict=True),), REQUIRED), dialect=CODER)
    assert caught.value.field == "chat.tools[0].parameters_json"
    assert caught.value.facts["keyword"] == "pattern"
    loose = plan(ToolUse((Tool("f", schema),), REQUIRED), dialect=CODER)
    assert [(use.field, use.keyword) for use in loose.relaxed] == [("chat.tools[0].parameters_json", "pattern")]
    for code, outcome in (("ABC", Outcome.RELAXED_OK), ("abc", Outcome.RELAXED_VIOLATED)):
        reader = loose.reader()
        text = f"<tool_call>\n<function=f>\n<parameter=code>\n{code}\n</parameter>\n</function>\n</tool_call>"
        reader.push(text, num_tokens=1)
        reader.finish(is_complete=True)
        assert reader.outcome(loose.relaxed) is outcome


def test_parts_of_one_call_are_joined_and_others_are_not():
    parts = Parts()
    for piece in (CallPiece(0, "a", "f", "{"), CallPiece(0, arguments="}", is_complete=True), CallPiece(1, "b", "g")):
        parts.add(Parts(content="x", calls=[piece]))
    assert parts.content == "xxx"
    assert parts.calls == [CallPiece(0, "a", "f", "{}", is_complete=True), CallPiece(1, "b", "g")]


def test_tokens_of_reasoning_are_counted_with_what_ends_it():
    reader = Reader(Reply(Wanted(parse=True), ToolUse(), QWEN, is_reasoning=False, constraint=None))
    for token in ("<think>", "Hm", "m.", "</think>", "Yes", "."):
        reader.push(token, num_tokens=1)
    reader.finish(is_complete=True)
    assert (reader.parts.reasoning, reader.parts.content, reader.num_reasoning_tokens) == ("Hmm.", "Yes.", 3)


# --------------------------------------------------------------------------------------- through the engine


def joined(events, index=0):
    parts, text = Parts(), ""
    for delta in (e for e in events if isinstance(e, Delta) and e.index == index):
        text += delta.text
        if delta.parts is not None:
            parts.add(delta.parts)
    return parts, text


def writes(text):
    """The model writes just this."""
    return Constraint(ConstraintKind.REGEX, "".join(f"\\x{{{ord(char):x}}}" for char in text))


@pytest.fixture
def told(monkeypatch):
    """What is told of a reply that is a certain text."""

    async def tokenize(_self, prompt, **_):
        # The byte tokenizer has no template.
        text = prompt.messages[0]["content"]
        return list(text.encode())[-20:], text

    monkeypatch.setattr(Engine, "tokenize", tokenize)

    async def tell(text, tool_use=None, *, prompt=ASKED, min_delta_tokens=0, **params):
        def planned(*args, **options):
            return replace(plan_reply(*args, **options), constraint=writes(text))

        monkeypatch.setattr("nanoserve.engine.engine.plan_reply", planned)
        request = {"wanted": Wanted(parse=True), "min_delta_tokens": min_delta_tokens}
        async with running() as bench:
            chat = Chat([{"role": "user", "content": prompt}], tool_use=tool_use or ToolUse())
            return await bench.collect(chat, request=request, **{"max_tokens": 108, **params})

    return tell


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize("min_delta_tokens", [0, 3, 1000])
async def test_what_a_model_writes_is_told_apart_and_the_text_is_raw(told, min_delta_tokens):
    text = f"<think>\nHm.\n</think>\n\nWell.\n{CALL}"
    events = await told(text, ToolUse((WEATHER,)), min_delta_tokens=min_delta_tokens)
    parts, raw = joined(events)
    assert raw == text
    assert (parts.reasoning, parts.content) == ("Hm.", "Well.")
    (made,) = parts.calls
    assert (made.name, json.loads(made.arguments), made.is_complete) == ("weather", {"city": "Rome"}, True)
    assert made.id.startswith("call_")
    assert events[-1].reasoning_tokens == len("\nHm.\n</think>")


def in_order(events):
    """What deltas tell, as the model wrote it: reasoning, content or a call's index, and its text."""
    found = []
    for parts in (e.parts for e in events if isinstance(e, Delta) and e.parts is not None):
        pieces = [("reasoning", parts.reasoning), ("content", parts.content)]
        pieces += [
            (call.index, f"{call.name}{call.arguments}{'.' if call.is_complete else ''}") for call in parts.calls
        ]
        for kind, text in filter(lambda piece: piece[1], pieces):
            if found and found[-1][0] == kind:
                found[-1][1] += text
            else:
                found.append([kind, text])
    return found


@pytest.mark.parametrize("min_delta_tokens", [0, 3, 1000])
async def test_deltas_keep_the_order_in_which_the_model_writes(told, min_delta_tokens):
    """However much of it a caller reads at once."""
    call = '<tool_call>{"name": "f"}</tool_call>'
    text = f"<think>Hm</think>One{call}Two{call}3"
    events = await told(text, ToolUse((Tool("f", {}),)), min_delta_tokens=min_delta_tokens)
    made = "f{}."
    assert in_order(events) == [
        ["reasoning", "Hm"],
        ["content", "One"],
        [0, made],
        ["content", "Two"],
        [1, made],
        ["content", "3"],
    ]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(delta.text for delta in deltas) == text
    assert bytes(token_id for delta in deltas for token_id in delta.token_ids).decode() == text
    if min_delta_tokens == 1000:
        assert len(deltas) == 3


async def test_a_call_that_is_cut_off_is_not_complete(told):
    for cut in (45, len(CALL) - 16):
        parts, _ = joined(await told(CALL, ToolUse((WEATHER,)), max_tokens=cut))
        assert [(call.name, call.is_complete) for call in parts.calls] == [("weather", False)]


async def test_a_stop_string_cuts_the_parts_where_it_cuts_the_text(told):
    events = await told(f"<think>Hm.</think>Well, {CALL}", ToolUse((WEATHER,)), stop=("l,",))
    parts, raw = joined(events)
    assert (parts.reasoning, parts.content, parts.calls) == ("Hm.", "Wel", [])
    assert raw == "<think>Hm.</think>Wel"


async def test_without_tools_a_call_is_content_and_the_prompt_may_have_begun_the_reasoning(told):
    parts, _ = joined(await told(f"Hm.</think>{CALL}", prompt=OPEN))
    assert (parts.reasoning, parts.content, parts.calls) == ("Hm.", CALL, [])


async def test_each_of_several_replies_is_read_by_itself(told):
    events = await told("<think>A</think>b", n=3)
    for index in range(3):
        parts, _ = joined(events, index)
        assert (parts.reasoning, parts.content) == ("A", "b")


@pytest.mark.parametrize("params", [{}, {"detokenize": False}, {"skip_special_tokens": False}])
async def test_calls_are_checked_in_the_end_whatever_is_shown_of_the_text(monkeypatch, params):
    """Tools that are not strict, where a call is required: what of a schema has no grammar is checked."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    use = ToolUse((Tool("f", schema),), REQUIRED, parallel=False)
    # The model may not reason.
    closed = OPEN + "\n</think>\n\n"

    async def tokenize(_self, prompt, **_):
        return [1, 2, 3], prompt.messages[0]["content"]

    monkeypatch.setattr(Engine, "tokenize", tokenize)
    seen = set()
    async with running() as bench:
        for seed in range(12):
            chat = Chat([{"role": "user", "content": closed}], tool_use=use)
            events = await bench.collect(chat, seed=seed, max_tokens=120, **params)
            text = bytes(t for e in events if isinstance(e, Delta) for t in e.token_ids).decode()
            if events[-1].outcomes != [Outcome.TRUNCATED]:
                is_unique = len({*json.loads(text[text.index("[") : text.index("]") + 1])}) == 2
                assert events[-1].outcomes == [Outcome.RELAXED_OK if is_unique else Outcome.RELAXED_VIOLATED]
                seen.add(is_unique)
    assert seen == {True, False}
