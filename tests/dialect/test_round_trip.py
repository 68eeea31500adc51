"""Whatever a grammar lets through, the parser reads as what it was meant to be: drawn at random."""

import functools
import random

import jsonschema_rs
import pytest
from dialects import Told, Vocabulary, dialect_of, grammar_of, read, render

from nanoserve.dialect.formats import CALLS
from nanoserve.dialect.tools import Choosing, Tool

TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "exact": {"type": "boolean"},
            },
            "required": ["city", "exact"],
            "additionalProperties": False,
        },
        is_strict=True,
    ),
    Tool("get", None, is_strict=True),
    Tool(
        "save",
        {
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}}},
                    "required": ["x"],
                    "additionalProperties": False,
                }
            },
            "type": "object",
            "properties": {
                "place": {"$ref": "#/$defs/place"},
                "code": {"type": "string", "minLength": 2, "maxLength": 6},
                "any": {},
                "mixed": {"anyOf": [{"type": "integer"}, {"type": "string", "minLength": 2}]},
                "kind": {"type": ["boolean", "null", "array"]},
            },
            "required": ["place"],
        },
        is_strict=True,
    ),
]
VALIDATORS = {
    tool.name: jsonschema_rs.validator_for(tool.parameters or {"type": "object", "maxProperties": 0}) for tool in TOOLS
}
MAX_TOKENS = 500


@functools.cache
def vocabulary(has_special):
    return Vocabulary(has_special=has_special)


def check(calls, seed, *, has_special, **asked):
    words = vocabulary(has_special)
    dialect = dialect_of(calls)
    made = grammar_of(dialect, TOOLS, words, **asked)
    is_reasoning = asked.get("is_reasoning", False)
    begin = ""
    if asked["choosing"] is Choosing.AUTO and seed % 4 > 1 and not is_reasoning:
        # Else one would hardly ever come, where it is not to stand behind a text.
        call = render(calls, [("get_weather", {"city": "Oslo", "exact": True})])
        begin = ("" if calls.is_at_start else "Well.\n") + call
    text, is_whole = words.draw(words.matcher(made), seed, MAX_TOKENS, begin)
    told = Told(read(dialect, text, TOOLS, is_reasoning=is_reasoning, is_complete=is_whole))
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=len(text) // 3))
    assert Told(read(dialect, text, TOOLS, cuts=cuts, is_reasoning=is_reasoning, is_complete=is_whole)) == told
    for name, arguments in told.complete:
        assert VALIDATORS[name].is_valid(arguments), (text, name, arguments)
    if is_whole:
        assert all(ended for *_, ended in told.calls), (text, told)
        if asked["choosing"] is Choosing.REQUIRED:
            assert told.calls, (text, told)
            assert not told.content, (text, told)
    if not asked["parallel"]:
        assert len(told.calls) <= 1
    return is_whole, told


def asked_of(seed):
    return {
        "parallel": seed % 3 > 0,
        "is_reasoning": seed % 5 == 1,
        "may_reason": seed % 5 == 2,
        "has_special": seed % 2 == 0,
    }


def check_all(calls, choosing, seeds):
    """Returns how many outputs came to their end, and how many had calls."""
    num_whole = num_called = 0
    for seed in seeds:
        is_whole, told = check(calls, seed, choosing=choosing, **asked_of(seed))
        num_whole += is_whole
        num_called += bool(told.complete)
    return num_whole, num_called


@pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
def test_calls_that_are_required_are_read_as_calls_with_valid_arguments(calls):
    num_whole, num_called = check_all(calls, Choosing.REQUIRED, range(40))
    assert num_whole > 10
    assert num_called > 20


@pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
def test_what_is_left_to_the_model_is_read_as_text_and_as_calls(calls):
    num_whole, _ = check_all(calls, Choosing.AUTO, range(20))
    assert num_whole > 3


@pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
def test_what_may_not_be_a_call_is_none(calls):
    for seed in range(10):
        _, told = check(calls, seed, choosing=Choosing.NONE, **asked_of(seed))
        assert not told.calls


@pytest.mark.soak
@pytest.mark.parametrize("choosing", Choosing, ids=lambda each: each.value)
@pytest.mark.parametrize("calls", CALLS, ids=lambda each: each.names[0])
def test_many_outputs_are_read_as_what_they_were_meant_to_be(calls, choosing):
    check_all(calls, choosing, range(1000, 2000))
