"""What a caller may ask for, and the grammar that enforces it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from nanoserve.errors import ConstraintInvalid, ConstraintProblem
from nanoserve.request import Constraint, ConstraintKind

# Of a schema, a regex, a grammar, or all choices together. Compiling takes time that grows faster than the text.
MAX_TEXT_BYTES = 256 * 1024
MAX_CHOICES = 10_000
# White space that may stand at one place of a JSON text. Models that are unsure of the next value write it for ever.
MAX_WHITESPACE = 16
# Of a regex: these mean what they do in the patterns of JSON Schema, and not any digit of any script.
_ASCII_CLASSES = "dw"
# JSON's escapes but for \uXXXX: with it a key could be spelled in two ways, and so be given twice.
_ESCAPES = 'bfnrt"\\'
# What a Lark grammar may not have: schemas in it would not be checked, and options are the server's.
_FORBIDDEN_IN_LARK = re.compile(r"%json\b|%llguidance\b")


def check_form(constraint: Constraint) -> None:
    """Raise ConstraintInvalid if it is too long to look at, or wrong in a way that needs no compiler to see."""
    if (size := len(constraint.text.encode("utf-8", "replace"))) > MAX_TEXT_BYTES:
        raise refusal(constraint, f"has {size} bytes; at most {MAX_TEXT_BYTES} are allowed")
    match constraint.kind:
        case ConstraintKind.REGEX | ConstraintKind.GRAMMAR if not constraint.text.strip():
            raise refusal(constraint, "must not be empty")
        case ConstraintKind.GRAMMAR if found := _FORBIDDEN_IN_LARK.search(constraint.text):
            hint = "; a schema is given as json_schema" if found[0] == "%json" else ""
            raise refusal(constraint, f"{found[0]} is not allowed in a grammar{hint}", keyword=found[0])
        case ConstraintKind.CHOICES:
            _check_choices(constraint)


def _check_choices(constraint: Constraint) -> None:
    choices: list[str] = json.loads(constraint.text)
    if not choices:
        raise refusal(constraint, "at least one is required")
    if len(choices) > MAX_CHOICES:
        raise refusal(constraint, f"has {len(choices)} entries; at most {MAX_CHOICES} are allowed")
    seen: dict[str, int] = {}
    for i, choice in enumerate(choices):
        if not choice:
            raise refusal(constraint, "must not be empty", pointer=f"/{i}")
        if choice in seen:
            raise refusal(constraint, f"is the same as choice {seen[choice]}", pointer=f"/{i}")
        seen[choice] = i


def refusal(constraint: Constraint, description: str, *, pointer: str = "", keyword: str = "") -> ConstraintInvalid:
    """An error about a constraint that has only one thing wrong."""
    return ConstraintInvalid(constraint.path, [ConstraintProblem(pointer, keyword, description)])


def grammar_of(constraint: Constraint) -> str:
    """The grammar of what refers to no schema, in llguidance's own form."""
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return grammar_of_schema('{"type": "object"}')
        case ConstraintKind.REGEX:
            return str(LLMatcher.grammar_from_regex(regex_to_lark(constraint.text, _ASCII_CLASSES)))
        case ConstraintKind.GRAMMAR:
            return str(LLMatcher.grammar_from_lark(constraint.text))
        case ConstraintKind.CHOICES:
            texts = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.text))
            return str(LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(texts)))
    raise ValueError(constraint.kind)


def joined(lark: str, parts: Mapping[str, str]) -> str:
    """One grammar that refers to others by their names."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    for name, grammar in parts.items():
        # That of a schema is JSON, any other Lark.
        is_schema = grammar.startswith('{"grammars"')
        (only,) = json.loads(grammar)["grammars"] if is_schema else [{"lark_grammar": grammar}]
        grammars.append({**only, "name": name})
    return json.dumps({"grammars": grammars})


def grammar_of_schema(schema: str, *, one_of_as_any_of: bool = False) -> str:
    """The grammar of a JSON Schema, which may yet prove wrong when it is compiled.

    one_of_as_any_of: where two branches of a oneOf might match one value, both are allowed to. Otherwise such a oneOf
    is an error of the compiler.
    """
    options: Any = {
        "whitespace_flexible": True,
        "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_WHITESPACE}}}",
        "item_separator": ",",
        "key_separator": ":",
        "coerce_one_of": one_of_as_any_of,
        "lenient": False,
        "json_allowed_escapes": _ESCAPES,
        "json_allow_general_unicode_escapes": False,
    }
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=options))
