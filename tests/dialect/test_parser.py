"""What the parser reads, in whatever pieces it comes, and what it says at which moment."""

import itertools
import json
import random
import sys

import pytest
from dialects import Told, dialect_of, read
from hypothesis import given
from hypothesis import strategies as st
from transcripts import NO_CALLS, TRANSCRIPTS

from nanoserve.dialect.formats import CALLS, Dialect, call_format, reasoning_format
from nanoserve.dialect.parser import Arguments, CallBegun, CallEnded, Content, OutputParser, Reasoning
from nanoserve.dialect.source import MAX_HELD
from nanoserve.dialect.tools import Tool

TOOLS = [
    Tool(
        "get_weather",
        {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    ),
    Tool("get_time"),
    Tool("save", {"type": "object", "properties": {"text": {"type": "string"}, "options": {"type": "object"}}}),
]
HERMES = Dialect(reasoning_format("qwen3"), call_format("hermes"))
CODER = Dialect(reasoning_format("qwen3"), call_format("qwen3_coder"))
PYTHONIC = Dialect(None, call_format("pythonic"))


def told(dialect, text, **asked):
    return Told(read(dialect, text, asked.pop("tools", TOOLS), **asked))


def pushes(dialect, texts, *, is_reasoning=False):
    """What comes out at each piece, and at the end."""
    parser = OutputParser(dialect, TOOLS, is_reasoning=is_reasoning)
    return [*(parser.push(text) for text in texts), parser.finish(is_complete=True)]


# ------------------------------------------------------------------------------------------------- transcripts


@pytest.mark.parametrize(("name", "text", "reasoning", "content", "calls"), TRANSCRIPTS)
def test_each_family_is_read(name, text, reasoning, content, calls):
    found = told(dialect_of(call_format(name)), text)
    assert (found.reasoning, found.content, found.complete) == (reasoning, content, calls)
    assert len(found.calls) == len(calls)


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_last_character(name, text):
    # Without the format's channels, which are no content.
    dialect = Dialect(None, call_format(name))
    assert read(dialect, text, TOOLS, cuts=range(1, len(text))) != []
    found = told(dialect, text)
    assert (found.content, found.calls) == (text, [])


@pytest.mark.parametrize(("name", "text"), [each[:2] for each in TRANSCRIPTS] + NO_CALLS)
def test_no_cut_changes_what_is_read(name, text):
    dialect = dialect_of(call_format(name))
    whole = told(dialect, text)
    assert told(dialect, text, cuts=range(1, len(text))) == whole
    for size, start in itertools.product((2, 3, 5, 8, 13), (0, 1)):
        assert told(dialect, text, cuts=range(start, len(text), size)) == whole
    for at in range(len(text)):
        assert told(dialect, text, cuts=[at]) == whole


@pytest.mark.parametrize(("name", "text"), [each[:2] for each in TRANSCRIPTS])
def test_wherever_it_breaks_off_no_cut_changes_it_and_what_is_complete_was_so_in_the_whole(name, text):
    dialect = dialect_of(call_format(name))
    whole = told(dialect, text)
    for end in range(len(text)):
        part = told(dialect, text[:end], is_complete=False)
        assert part == told(dialect, text[:end], cuts=range(1, end), is_complete=False)
        assert part.complete == whole.complete[: len(part.complete)]
        for (name_, arguments, _), (whole_name, whole_arguments, _) in zip(part.calls, whole.calls, strict=False):
            assert name_ == whole_name
            assert whole_arguments.startswith(arguments)
        format_ = call_format(name)
        is_opened = not format_.is_at_start and any(trigger in text[:end] for trigger in format_.triggers)
        if part.calls or is_opened:
            assert whole.content.startswith(part.content), "the beginning of a call is no content"


PIECES = sorted(
    {
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", "x", '{"name": "get_time"', "}", "{"),
        *('"arguments": ', '{"a": [1, "b', '"]', ", ", "<function=get_time>", "<function=save>", "</function>"),
        *("<parameter=text>", "</parameter>", "<parameter=options>", "'", '"', "[", "get_time(", "save(text=", ")"),
        *("]", "[TOOL_CALLS]", "[ARGS]", "<arg_key>text</arg_key>", "<arg_value>", "</arg_value>", "\\", "1", "True"),
        *("<|channel|>", "commentary", "analysis", "final", "<|message|>", " to=functions.get_time", "<|end|>"),
    }
)


@given(
    st.sampled_from(CALLS),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30).map("".join),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_no_text_fails_and_no_cut_changes_it(calls, text, is_reasoning, is_complete, drawn):
    dialect = dialect_of(calls)
    asked = {"is_reasoning": is_reasoning, "is_complete": is_complete}
    whole = told(dialect, text, **asked)
    cuts = sorted(drawn.choices(range(len(text) + 1), k=5))
    assert told(dialect, text, cuts=cuts, **asked) == whole
    assert told(dialect, text, cuts=range(1, len(text)), **asked) == whole


@given(st.text(alphabet="ab\n <", max_size=40))
def test_content_alone_is_as_it_was_written(text):
    assert told(Dialect(None, call_format("hermes")), text).content == text


# ----------------------------------------------------------------------------------------------- what goes out when


def test_what_may_be_a_marker_is_held_and_all_else_goes_out_at_once():
    assert pushes(HERMES, ["Hi", " <", "b> a\n", "b\n<tool", "_calx", " <tool_call"]) == [
        [Content("Hi")],
        [Content(" ")],
        [Content("<b> a")],
        [Content("\nb")],
        [Content("\n<tool_calx")],
        [Content(" ")],
        [Content("<tool_call")],
    ]


def test_the_name_comes_once_and_first_and_arguments_come_as_they_are_drawn():
    texts = ['<tool_call>\n{"name": "get_', 'weather"', ', "arguments": ', '{"ci', 'ty": "Os', 'lo"', "}", "}"]
    assert pushes(HERMES, texts) == [
        [],
        [CallBegun(0, "get_weather")],
        [],
        [Arguments(0, '{"ci')],
        [Arguments(0, 'ty": "Os')],
        [Arguments(0, 'lo"')],
        [Arguments(0, "}")],
        [CallEnded(0)],
        [],
    ]


def test_a_text_between_tags_comes_as_json_while_it_is_drawn():
    texts = [
        "<tool_call>\n<function=save>\n<parameter=text>\nIt",
        ' is "new"',
        "\n",
        "and\n</",
        "parameter>",
        "\n</function>",
    ]
    assert pushes(CODER, texts) == [
        [CallBegun(0, "save"), Arguments(0, '{"text": "It')],
        [Arguments(0, ' is \\"new\\"')],
        [],
        [Arguments(0, "\\nand")],
        [Arguments(0, '"')],
        [Arguments(0, "}"), CallEnded(0)],
        [],
    ]


def test_an_object_between_tags_comes_while_it_is_drawn():
    texts = ["<tool_call>\n<function=save>\n<parameter=options>\n{'a", "': [1", ",", " True", "]}", "\n</parameter>"]
    assert pushes(CODER, texts)[:-1] == [
        [CallBegun(0, "save"), Arguments(0, '{"options": {"a')],
        [Arguments(0, '": [')],
        [Arguments(0, "1")],
        [Arguments(0, ", ")],
        [Arguments(0, "true]}")],
        [],
    ]


def test_arguments_in_python_come_while_they_are_drawn():
    assert pushes(PYTHONIC, ["[", "save", "(text='It", "'", ", options={", "})", "]"]) == [
        [],
        [],
        [CallBegun(0, "save"), Arguments(0, '{"text": "It')],
        [Arguments(0, '"')],
        [Arguments(0, ', "options": {')],
        [Arguments(0, "}}"), CallEnded(0)],
        [],
        [],
    ]


def test_reasoning_comes_at_once_but_for_whitespace_that_may_be_its_end():
    assert pushes(HERMES, ["\nHm", " a", "\n\n", "b\n</", "think>", "\n", "\nHi"], is_reasoning=True) == [
        [Reasoning("Hm")],
        [Reasoning(" a")],
        [],
        [Reasoning("\n\nb")],
        [],
        [],
        [Content("Hi")],
        [],
    ]


def test_a_name_that_is_no_tool_s_is_told_by_its_first_letter_that_differs():
    assert pushes(HERMES, ['<tool_call>{"name": "get_', "x"])[1] == [Content('<tool_call>{"name": "get_x')]
    assert pushes(PYTHONIC, ["[", "x"])[1] == [Content("[x")]


# ------------------------------------------------------------------------------------------------------ reasoning


@pytest.mark.parametrize(
    ("text", "is_reasoning", "reasoning", "content"),
    [
        ("<think>\n\na\n\n</think>\n\nb", False, "a", "b"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("a\n</think>\n\nb\n", True, "a", "b\n"),
        ("<think>\n\n</think>\n\nb", False, "", "b"),
        # The prompt has opened it, and so does the model: the second marker is a part of it.
        ("<think>a</think>b", True, "<think>a", "b"),
        # Not closed.
        ("<think>\na\n", False, "a", ""),
        ("a", True, "a", ""),
        # Not opened.
        ("a</think>b", False, "", "a</think>b"),
        # Another directly behind the first is reasoning, one behind content is not.
        ("<think>a</think>\n<think>b</think>c", False, "ab", "c"),
        ("<think>a</think>b<think>c</think>d", False, "a", "b<think>c</think>d"),
        ("b<think>c</think>d", False, "", "b<think>c</think>d"),
        # Of a call within, as of all else.
        (
            '<think><tool_call>{"name": "get_time"}</tool_call></think>',
            False,
            '<tool_call>{"name": "get_time"}</tool_call>',
            "",
        ),
        # Whitespace alone.
        ("<think> \n", False, "", ""),
        ("<think>a</think> \n", False, "a", ""),
        (" \n", False, "", " \n"),
        (" \n a", False, "", " \n a"),
    ],
)
def test_where_reasoning_begins_and_ends(text, is_reasoning, reasoning, content):
    for cuts in ((), range(1, len(text))):
        found = told(HERMES, text, is_reasoning=is_reasoning, cuts=cuts)
        assert (found.reasoning, found.content, found.calls) == (reasoning, content, [])


def test_either_half_works_alone():
    text = '<think>a</think>b<tool_call>{"name": "get_time"}</tool_call>'
    only_calls = told(Dialect(None, HERMES.calls), text)
    assert (only_calls.reasoning, only_calls.content, only_calls.complete) == (
        "",
        "<think>a</think>b",
        [("get_time", {})],
    )
    only_reasoning = told(Dialect(HERMES.reasoning, None), text)
    assert (only_reasoning.reasoning, only_reasoning.content) == (
        "a",
        '<tool_call>{"name": "get_time"}</tool_call>'.join(["b", ""]),
    )
    neither = told(Dialect(), text, is_reasoning=True)
    assert (neither.reasoning, neither.content, neither.calls) == ("", text, [])


# ---------------------------------------------------------------------------------------------------------- calls


def test_without_tools_nothing_is_a_call_and_if_they_are_not_known_any_may_be():
    text = '<tool_call>{"name": "launch", "arguments": {}}</tool_call>'
    assert told(HERMES, text, tools=[]).content == text
    assert told(HERMES, text, tools=None).complete == [("launch", {})]
    for name, text in [
        ("pythonic", "[launch(a=1, b=x)]"),
        ("glm45", "<tool_call>launch\n<arg_key>a</arg_key>\n<arg_value>1"),
    ]:
        assert told(Dialect(None, call_format(name)), text, tools=None).calls[0][0] == "launch"


@pytest.mark.parametrize(
    ("dialect", "text", "arguments"),
    [
        (HERMES, '<tool_call>{"name": "save", "arguments": {"text": "a', '{"text": "a'),
        (CODER, "<tool_call>\n<function=save>\n<parameter=text>\na\n</param", '{"text": "a'),
        (CODER, "<tool_call>\n<function=get_weather>\n<parameter=days>\n1", '{"days": '),
        (PYTHONIC, "[save(text='a", '{"text": "a'),
    ],
)
def test_a_call_that_is_cut_off_never_ends(dialect, text, arguments):
    for is_complete in (False, True):
        assert told(dialect, text, is_complete=is_complete).calls == [
            (*told(dialect, text).calls[0][:1], arguments, False)
        ]


@pytest.mark.parametrize("dialect", [HERMES, CODER])
def test_the_beginning_of_another_call_is_no_content_where_it_is_cut_off(dialect):
    before = "Well. <tool_call>\n<function=get_time>\n</function>\n</tool_call>"
    if dialect is HERMES:
        before = 'Well. <tool_call>{"name": "get_time"}</tool_call>'
    for end in range(len("\n<tool_call>\n") + 1):
        found = told(dialect, before + "\n<tool_call>\n"[:end], is_complete=False)
        assert (found.content, found.complete) == ("Well. ", [("get_time", {})])
    # Anything else is, and so is whatever the model ends itself.
    assert told(dialect, f"{before}\n<tools", is_complete=False).content.endswith("<tools")
    assert told(dialect, f"{before}\n<tool", is_complete=True).content.endswith("<tool")
    assert told(dialect, "a <tool", is_complete=False).content == "a <tool"


def test_a_call_whose_arguments_are_whole_ended_unless_something_cut_it_off():
    text = '<tool_call>{"name": "save", "arguments": {"text": "a"}'
    assert told(HERMES, text, is_complete=True).complete == [("save", {"text": "a"})]
    assert told(HERMES, text, is_complete=False).calls == [("save", '{"text": "a"}', False)]


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('{"name": "save", "arguments": {"text": oops}}</tool_call>', '{"text": ', "}}</tool_call>"),
        ('{"name": "save", "arguments": "x"}', "", '"x"}'),
        ('{"name": "save" oops', "", " oops"),
    ],
)
def test_a_call_that_goes_wrong_never_ends_and_the_rest_is_content(text, arguments, content):
    found = told(HERMES, f"<tool_call>{text}")
    assert found.calls == [("save", arguments, False)]
    assert found.content.endswith(content)


def test_calls_after_one_that_went_wrong_are_read():
    text = '<tool_call>{"name": "save", "arguments": 7}\n<tool_call>{"name": "get_time"}</tool_call>'
    found = told(HERMES, text)
    assert [(name, ended) for name, _, ended in found.calls] == [("save", False), ("get_time", True)]
    assert found.content == "7}"


VALUES = [
    ({"type": "string"}, "12", "12"),
    ({"type": "string"}, '"a"', '"a"'),
    ({"type": "string"}, "null", "null"),
    ({"enum": ["a", "b"]}, "a", "a"),
    ({"type": "integer"}, "12", 12),
    ({"type": "integer"}, "+1_2", 12),
    ({"type": "integer"}, "12 Main St", "12 Main St"),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "number"}, "1e400", 1e300),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "false", False),
    ({"type": "boolean"}, "yes", "yes"),
    ({"type": "null"}, "None", None),
    ({"type": "object"}, "{'a': 1,}", {"a": 1}),
    ({"type": "array"}, "(1, '2')", [1, "2"]),
    ({"type": "object"}, "none of it", "none of it"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "{'a'", "{'a'"),
    ({"type": ["string", "integer"]}, "12", 12),
    ({"type": ["string", "integer"]}, "[12]", "[12]"),
    ({"$ref": "#/$defs/text"}, "12", "12"),
    ({}, "12", 12),
    ({}, "[1, {'a': None}]", [1, {"a": None}]),
    ({}, "It's", "It's"),
    ({}, "'tis", "'tis"),
    ({}, "", ""),
]


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "seed_oss", "minimax_m2"])
def test_a_value_between_tags_is_what_the_schema_says(name, schema, text, value):
    calls = call_format(name)
    tool = Tool("f", {"properties": {"x": schema}, "$defs": {"text": {"type": "string"}}})
    begin = "".join([*calls.opens, calls.begin, "f", calls.style.after_name])
    end = "".join([calls.end, *calls.closes])
    whole = f"{begin}{calls.style.key}x{calls.style.value}{text}{calls.style.end}{end}"
    for cuts in ((), range(1, len(whole))):
        assert told(Dialect(None, calls), whole, tools=[tool], cuts=cuts).complete == [("f", {"x": value})]


@pytest.mark.parametrize(("schema", "text", "value"), [each for each in VALUES if each[1] not in ("", "'tis", "{'a'")])
def test_a_value_in_python_is_what_the_schema_says(schema, text, value):
    tool = Tool("f", {"properties": {"x": schema}, "$defs": {"text": {"type": "string"}}})
    expected = text.strip('"') if text == '"a"' else value
    if isinstance(value, str) and text[0] in "[{" and schema != {"type": "string"}:
        expected = json.loads(text)
    assert told(PYTHONIC, f"[f(x={text}, y=2)]", tools=[tool]).complete == [("f", {"x": expected, "y": 2})]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_value_passes_as_json_and_as_python(value):
    for spelled in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1), repr(value)):
        text = f'<tool_call>{{"name": "get_time", "arguments": {{"x": {spelled}}}}}</tool_call>'
        # Python writes some characters in ways that JSON has not.
        assert told(HERMES, text).complete == [("get_time", {"x": value})]
        assert told(PYTHONIC, f"[get_time(x=[{spelled}])]").complete == [("get_time", {"x": [value]})]


def test_json_as_it_should_be_passes_as_it_is():
    arguments = '{ "a" : [ 1.50, -0 , "\\u00e9\\n" ],\n"b":{ } }'
    assert told(HERMES, f'<tool_call>{{"name": "save", "arguments": {arguments}}}').calls == [("save", arguments, True)]


def test_line_breaks_and_backslashes_in_a_string_are_mended():
    text = '<tool_call>{"name": "save", "arguments": {"text": "a\nb\\d"}}</tool_call>'
    assert told(HERMES, text).complete == [("save", {"text": "a\nb\\d"})]


# -------------------------------------------------------------------------------------------------------- how long


@pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
@pytest.mark.parametrize("text", ["<", "{", "[", "\n", "<tool_call>", "<｜", '{"name": ', '{"arguments":', "f(", "a"])
def test_a_long_text_takes_work_in_step_with_its_length(calls, text):
    dialect = dialect_of(calls)

    def num_calls(num_chars):
        """Of functions, to read a text in pieces of 10."""
        whole = text * (num_chars // len(text))
        count = 0

        def note(_frame, event, _arg):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            read(dialect, whole, TOOLS, cuts=range(10, len(whole), 10))
        finally:
            sys.setprofile(None)
        return count

    assert num_calls(8_000) < 5 * num_calls(2_000)


def test_a_megabyte_in_one_piece_is_read():
    random_text = "".join(random.Random(0).choices('<{[tool_call>\n "name', k=1_000_000))
    for text in (random_text, "<" * 1_000_000, "{" * 1_000_000, " " * 1_000_000):
        assert told(HERMES, text).content == text


def test_what_is_held_is_limited():
    early = f'<tool_call>{{"arguments": {{"x": "{"a" * MAX_HELD}"}}, "name": "get_time"}}</tool_call>'
    assert told(HERMES, early).content == told(HERMES, early, cuts=range(0, len(early), 1000)).content == early
    untyped = Tool("f", {"properties": {"x": {}}})
    value = json.dumps(["a" * MAX_HELD])
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>"
    assert told(CODER, text, tools=[untyped]).complete == [("f", {"x": value})]


def test_nesting_is_limited():
    text = '<tool_call>{"name": "save", "arguments": {"x": ' + "[" * 100_000
    assert told(HERMES, text).calls[0][2] is False
