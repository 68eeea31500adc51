"""What the grammars allow and what they do not, by hand."""

import functools
import json

import pytest
from dialects import Vocabulary, dialect_of, grammar_of, read, render
from transcripts import TRANSCRIPTS

from nanoserve.dialect.formats import CALLS, Dialect, call_format, reasoning_format
from nanoserve.dialect.grammar import Unenforced
from nanoserve.dialect.parser import CallBegun
from nanoserve.dialect.tools import Choosing, Tool, ToolChoice
from nanoserve.errors import ConstraintInvalid

TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        is_strict=True,
    ),
    Tool("get_time", is_strict=True),
]
WEATHER = ("get_weather", {"city": "Oslo", "days": 3})
TIME = ("get_time", {})
AUTO, REQUIRED, NONE = Choosing.AUTO, Choosing.REQUIRED, Choosing.NONE
each_format = pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
both_spellings = pytest.mark.parametrize("has_special", [False, True], ids=["as text", "as special tokens"])


@functools.cache
def vocabulary(has_special):
    return Vocabulary(has_special=has_special)


def accepts(dialect, text, choosing, *, has_special=False, tools=TOOLS, answer=None, **asked):
    words = vocabulary(has_special)
    made = grammar_of(dialect, tools, words, choosing, answer=answer is not None, **asked)
    return words.accepts(words.matcher(made, answer), text)


def only_calls(calls):
    return Dialect(None, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", TRANSCRIPTS[0][1].partition("One moment.\n")[2]),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]get_time[ARGS]{}'),
        *((each[0], each[1].partition("\n\n")[2]) for each in TRANSCRIPTS if each[0] == "minimax_m2"),
        *(
            (each[0], each[1])
            for each in TRANSCRIPTS
            if each[0] in ("nemotron_json", "llama3_json") and "; " in each[1]
        ),
    ],
)
def test_the_tests_write_calls_as_models_do(name, text):
    assert render(call_format(name), [WEATHER, TIME]) == text


@each_format
@both_spellings
def test_calls_that_are_required(calls, has_special):
    dialect = only_calls(calls)
    one, two = render(calls, [WEATHER]), render(calls, [WEATHER, TIME])
    ask = functools.partial(accepts, dialect, choosing=REQUIRED, has_special=has_special)
    assert ask(one)
    assert ask(f"\n{one}")
    assert ask(two) == (calls.between is not None)
    assert not ask(two, parallel=False)
    assert ask(one, parallel=False)
    wrong = [
        render(calls, [("get_whether", WEATHER[1])]),
        render(calls, [("get_weather", {"city": "Oslo"})]),
        render(calls, [("get_weather", {"city": "Oslo", "days": "x"})]),
        render(calls, [("get_weather", {"city": "Oslo", "days": 0})]),
        render(calls, [("get_weather", {"city": "Oslo", "days": 3, "more": 1})]),
        f"Well. {one}",
        f"{one} Well.",
        "Well.",
        "",
        one[: len(one) // 2],
        " " * 17 + one,
    ]
    assert [text for text in wrong if ask(text)] == []


@each_format
@both_spellings
def test_calls_that_are_left_to_the_model(calls, has_special):
    dialect = only_calls(calls)
    one = render(calls, [WEATHER])
    ask = functools.partial(accepts, dialect, choosing=AUTO, has_special=has_special)
    assert [text for text in ("", "Well.\n", "a <b> [c] {d} ", one) if not ask(text)] == []
    # Where a call is only at the start, this is a text, also for the parser.
    assert ask(f"Well.\n{one}") != (has_special and calls.names[0] == "openai")
    assert (CallBegun(0, "get_weather") in read(dialect, f"Well.\n{one}", TOOLS)) != calls.is_at_start
    assert not ask(f"{one} Well.")
    # A list that is no call of a tool is a text, too.
    assert ask(render(calls, [("get_whether", {})])) == (calls.triggers[0] == "[")
    assert not ask(render(calls, [("get_weather", {})]))
    # Nor may a text have the beginning of a call.
    assert ask(calls.triggers[0]) == (calls.triggers[0] == "[")


@each_format
def test_only_tools_that_are_allowed(calls):
    ask = functools.partial(accepts, only_calls(calls), names=["get_time"])
    assert [
        ask(render(calls, [each]), choosing=choosing) for choosing in (AUTO, REQUIRED) for each in (TIME, WEATHER)
    ] == [
        True,
        False,
        True,
        False,
    ]


@each_format
@both_spellings
def test_no_call_at_all(calls, has_special):
    ask = functools.partial(accepts, only_calls(calls), choosing=NONE, has_special=has_special)
    assert ask("Well.")
    assert not ask(render(calls, [TIME]))


@each_format
@both_spellings
def test_reasoning_comes_first_and_is_closed(calls, has_special):
    dialect = dialect_of(calls)
    reasoning = dialect.reasoning
    call = render(calls, [TIME])
    rest = f"First{reasoning.end}{reasoning.turn}{call}"
    for choosing in (AUTO, REQUIRED):
        ask = functools.partial(accepts, dialect, choosing=choosing, has_special=has_special)
        assert ask(rest, is_reasoning=True)
        assert not ask(call, is_reasoning=True)
        assert ask(reasoning.start + rest, may_reason=True)
        assert ask(call, may_reason=True)
        # Whitespace may stand before and between, as some models write it.
        assert ask(f"\n{call}", may_reason=True)
        assert ask(f"\n{reasoning.start}\nFirst\n{reasoning.end}{reasoning.turn}\n\n{call}", may_reason=True)
        assert not ask(reasoning.start + rest)
        assert not ask(f"First{call}", is_reasoning=True)
        assert not ask(f"{call}{reasoning.start}{rest}", may_reason=True)


@both_spellings
def test_reasoning_without_tools(has_special):
    for name in ("qwen3", "mistral", "seed_oss", "openai_gptoss", "granite"):
        reasoning = reasoning_format(name)
        ask = functools.partial(accepts, Dialect(reasoning, None), choosing=AUTO, has_special=has_special)
        after = f"{reasoning.turn}{reasoning.answer}"
        assert ask(f"a{reasoning.end}{after}b", is_reasoning=True)
        assert ask(f"{reasoning.start}a{reasoning.end}{after}b", may_reason=True)
        assert ask(f"{reasoning.answer}b", may_reason=True)
        assert not ask("a", is_reasoning=True)


@each_format
@both_spellings
def test_an_answer_with_a_grammar_of_its_own(calls, has_special):
    answer = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    dialect = dialect_of(calls)
    reasoning = dialect.reasoning
    text = f'{reasoning.answer}{{"x": 1}}'
    ask = functools.partial(accepts, dialect, answer=answer, has_special=has_special)
    assert ask(text, AUTO)
    assert ask(f"{reasoning.start}a{reasoning.end}{reasoning.turn}{text}", AUTO, may_reason=True)
    assert ask(render(calls, [WEATHER]), AUTO)
    assert not ask(f"{reasoning.answer}Well.", AUTO)
    assert not ask(f"{reasoning.answer}{{}}", AUTO)
    assert ask(text, NONE)
    assert not ask(render(calls, [WEATHER]), NONE)
    assert not ask(text, REQUIRED)


@each_format
def test_a_tool_that_is_not_strict_takes_any_arguments_if_the_choice_is_the_model_s(calls):
    loose = [Tool(tool.name, tool.parameters) for tool in TOOLS]
    odd = render(calls, [("get_weather", {"days": "x"})])
    assert accepts(only_calls(calls), odd, AUTO, tools=loose)
    assert not accepts(only_calls(calls), odd, REQUIRED, tools=loose)
    assert not accepts(only_calls(calls), odd, AUTO)


@each_format
def test_schemas_with_references(calls):
    schema = {
        "$ref": "#/$defs/call",
        "$defs": {
            "call": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}},
                "required": ["at"],
            },
            "place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
    }
    ask = functools.partial(accepts, only_calls(calls), choosing=REQUIRED, tools=[Tool("go", schema)])
    assert ask(render(calls, [("go", {"at": {"x": 1}, "to": {"x": 2}})]))
    assert ask(render(calls, [("go", {"at": {"x": 1}})]))
    assert not ask(render(calls, [("go", {"at": {"x": "1"}})]))
    assert not ask(render(calls, [("go", {"to": {"x": 1}})]))


@each_format
def test_arguments_are_an_object_even_if_the_schema_does_not_say_so(calls):
    dialect = only_calls(calls)
    for schema in ({}, {"title": "Anything"}, {"type": ["object", "null"]}):
        tools = [Tool("go", schema)]
        assert accepts(dialect, render(calls, [("go", {})]), REQUIRED, tools=tools)
        made = grammar_of(dialect, tools, vocabulary(False))
        words = vocabulary(False)
        for seed in range(5):
            text, is_whole = words.draw(words.matcher(made), seed, 100)
            assert not is_whole or CallBegun(0, "go") in read(dialect, text, tools)


@both_spellings
def test_values_between_tags(has_special):
    """A text is as it is, and of the right length; a choice is one of them; all else is JSON."""
    properties = {
        "text": {"type": "string", "minLength": 2, "maxLength": 4},
        "kind": {"enum": ["a", "b c"]},
        "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]},
        "list": {"type": "array", "items": {"type": "integer"}},
    }
    tools = [Tool("f", {"type": "object", "properties": properties})]
    for name in ("qwen3_coder", "glm45", "seed_oss", "minimax_m2"):
        calls = call_format(name)
        ask = functools.partial(accepts, only_calls(calls), choosing=REQUIRED, has_special=has_special, tools=tools)
        good = [
            ("text", "<b>"),
            ("text", "\n\n"),
            ("kind", "b c"),
            ("flag", "True"),
            ("flag", "false"),
            ("maybe", "null"),
        ]
        good += [("maybe", '"'), ("list", "[1, 2]")]
        bad = [("text", "a"), ("text", "abcde"), ("kind", "c"), ("flag", "yes"), ("list", "1"), ("none", "1")]
        end = calls.style.end.strip()
        bad += [("text", f"a{end}"), ("maybe", f"a{end}b")]
        assert [each for each in good if not ask(render(calls, [("f", dict([each]))]))] == []
        assert [each for each in bad if ask(render(calls, [("f", dict([each]))]))] == []
        # In the schema's order, each once.
        assert ask(render(calls, [("f", {"text": "ab", "maybe": "x"})]))
        assert not ask(render(calls, [("f", {"maybe": "x", "text": "ab"})]))


def test_what_cannot_be_enforced_is_told():
    schema = {
        "type": "object",
        "properties": {
            "date": {"type": "string", "format": "date", "pattern": "^2"},
            "number": {"type": "integer", "minimum": 1},
        },
        "minProperties": 1,
        "additionalProperties": False,
    }
    tools = [Tool("f", schema, is_strict=True)]
    whole = Unenforced("f", "", "minProperties")
    texts = [Unenforced("f", "/properties/date", keyword) for keyword in ("format", "pattern")]
    for calls in CALLS:
        made = grammar_of(only_calls(calls), tools, vocabulary(False), AUTO)
        by_style = {"TaggedArguments": (whole, *texts), "KeywordArguments": (whole,)}
        assert made.unenforced == by_style.get(type(calls.style).__name__, ())


@pytest.mark.parametrize(
    ("dialect", "tools", "choice", "told"),
    [
        (Dialect(), TOOLS, ToolChoice(REQUIRED), "tool_choice: how the model writes calls of tools is not known"),
        (only_calls(CALLS[0]), TOOLS, ToolChoice(REQUIRED, frozenset(["x"])), "tool_choice: no tool may be called"),
        (only_calls(CALLS[0]), [], ToolChoice(REQUIRED), "tool_choice: no tool may be called"),
        (
            only_calls(call_format("pythonic")),
            [Tool("f", {"properties": {"a-b": {}}, "required": ["a-b"]})],
            ToolChoice(REQUIRED),
            "tools[0].parameters: /properties/a-b is required, and cannot be written in the format",
        ),
        (
            only_calls(call_format("glm45")),
            [Tool("f", {"properties": {"a": {"const": "</arg_value>"}}, "required": ["a"]})],
            ToolChoice(REQUIRED),
            "tools[0].parameters: /properties/a is required, and cannot be written in the format",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(dialect, tools, choice, told):
    with pytest.raises(ConstraintInvalid) as caught:
        grammar_of(dialect, tools, vocabulary(False), choice.choosing, names=choice.names)
    assert str(caught.value).startswith(told)


def test_a_tool_s_name_is_checked():
    with pytest.raises(ValueError, match="tool 'a b': a name has 1 to 128 letters"):
        Tool("a b")


@each_format
def test_a_grammar_can_go_back(calls):
    """Drafts that were wrong are rolled back."""
    words = vocabulary(True)
    matcher = words.matcher(grammar_of(dialect_of(calls), TOOLS, words, AUTO, may_reason=True))
    token_ids = words.encode(render(calls, [WEATHER]))
    assert matcher.read(token_ids) == len(token_ids)
    assert matcher._parser.rollback(len(token_ids))
    assert matcher.read(token_ids) == len(token_ids)


def test_schemas_are_told_apart_by_name():
    made = grammar_of(only_calls(call_format("hermes")), TOOLS, vocabulary(False))
    assert {name: json.loads(text) for name, text in made.schemas.items()} == {
        "tool_0": TOOLS[0].parameters,
        "tool_1": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def test_a_text_has_no_call_however_much_whitespace_is_in_it():
    dialect = only_calls(call_format("pythonic"))
    text = f"[{' ' * 20}get_time{' ' * 20}()]"
    assert CallBegun(0, "get_time") in read(dialect, text, TOOLS)
    assert not accepts(dialect, text, AUTO)
