"""Finds the grammar of a constraint, or what of it cannot be enforced."""

import functools
import re
import time
from dataclasses import dataclass, replace

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nanoserve.constraint.grammar import check_form, grammar_of, grammar_of_schema, joined, refusal
from nanoserve.constraint.outcome import Validator
from nanoserve.constraint.schema import Schema
from nanoserve.constraint.subschemas import SchemaError
from nanoserve.constraint.vocabulary import Vocabulary
from nanoserve.errors import ConstraintInvalid, ConstraintProblem
from nanoserve.request import Constraint, ConstraintKind, ConstraintReport, KeywordUse

# What else the compiler refuses, a relaxed schema may lose.
MAX_DROPS = 16

# Numbers of llguidance's own units. The first two bound compiling, the others each mask.
LIMITS = LLParserLimits(
    max_grammar_size=500_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)


def make_parser(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """At its start. Needs a deep stack for definitions that refer to each other; does not hold the interpreter."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


@dataclass(frozen=True, slots=True)
class CheckedConstraint:
    """A constraint that can be enforced. Picklable."""

    # As llguidance takes it.
    grammar: str
    report: ConstraintReport
    # Of Constraint.closing_text.
    closing_grammar: str = ""


class ConstraintChecker:
    """Tries constraints with llguidance, for one model. One thread, whose stack is deep.

    It takes as long as a caller makes it take, and much of that in Python: see check_process.py.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = vocabulary.tokenizer()

    def check(self, constraint: Constraint) -> CheckedConstraint:
        """Its grammar. Raises ConstraintInvalid."""
        start_s = time.perf_counter()
        check_form(constraint)
        uses: list[KeywordUse] = []
        closing_grammar = ""
        if constraint.kind is ConstraintKind.JSON_SCHEMA:
            schema, grammar, parser = self._check_schema(constraint)
            uses = [replace(use, field=constraint.path) for use in schema.uses]
        else:
            if constraint.kind is ConstraintKind.DIALECT:
                parts = {name: self.check(part) for name, part in constraint.parts}
                uses = [use for part in parts.values() for use in part.report.keywords]
                grammars = {name: part.grammar for name, part in parts.items()}
                grammar = joined(constraint.text, grammars)
                if constraint.closing_text:
                    closing_grammar = joined(constraint.closing_text, grammars)
            else:
                grammar = grammar_of(constraint)
            parser = self._parser(grammar)
            if error := parser.get_error():
                raise refusal(constraint, _first_lines(error))
        compile_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        first = parser.deep_copy()
        mask = np.frombuffer(first.compute_bitmask(), dtype=np.int32)[: -(-self._vocabulary.size // 32)]
        if (error := first.get_error()) or not mask.any():
            too_much = "" if error.startswith("NoExtension") else _first_lines(error)
            raise refusal(constraint, too_much or "allows no output: no token can be the first")
        first_mask_s = time.perf_counter() - start_s
        report = ConstraintReport(tuple(uses), len(grammar), compile_s, first_mask_s)
        if report.relaxed and constraint.kind is ConstraintKind.JSON_SCHEMA:
            _check_validator(constraint)
        return CheckedConstraint(grammar, report, closing_grammar)

    def _check_schema(self, constraint: Constraint) -> tuple[Schema, str, LLMatcher]:
        try:
            schema = Schema(constraint.text)
        except SchemaError as wrong:
            raise refusal(constraint, str(wrong), pointer=wrong.pointer, keyword=wrong.keyword) from None
        if refused := schema.refused():
            if not constraint.is_relaxed:
                raise _refusal_of(constraint, refused)
            schema.relax()
        for _ in range(MAX_DROPS):
            grammar = grammar_of_schema(schema.text)
            parser = self._parser(grammar)
            error = parser.get_error()
            if "coerce_one_of" in error and constraint.is_relaxed:
                self._note_one_ofs(schema)
                grammar = grammar_of_schema(schema.text, one_of_as_any_of=True)
                parser = self._parser(grammar)
                error = parser.get_error()
            if not error:
                return schema, grammar, parser
            # The compiler's own asserts are about sizes, and come as errors.
            if "too large" in error or error.startswith("panic"):
                raise refusal(constraint, "takes a grammar that is too large; make it simpler")
            pointer, keyword = schema.locate(error, functools.partial(self._error_of, is_relaxed=constraint.is_relaxed))
            why = _in_plain_words(error)
            # What nothing satisfies, or what would have to be fetched, cannot be left out and checked in the end.
            is_final = "Unsatisfiable" in error or "Default retriever" in error
            if not constraint.is_relaxed or not keyword or is_final:
                raise refusal(constraint, why, pointer=pointer, keyword=keyword)
            schema.drop(pointer, keyword, why)
        raise refusal(constraint, f"more than {MAX_DROPS} keywords cannot be enforced")

    def _note_one_ofs(self, schema: Schema) -> None:
        """Find those oneOf in which two branches may match one value."""
        for pointer in schema.places_of("oneOf"):
            error = self._error_of(schema.alone(pointer), is_relaxed=False)
            if "coerce_one_of" in error:
                schema.note(pointer, "oneOf", _in_plain_words(error))

    def _error_of(self, schema: str, *, is_relaxed: bool) -> str:
        return self._parser(grammar_of_schema(schema, one_of_as_any_of=is_relaxed)).get_error()

    def _parser(self, grammar: str) -> LLMatcher:
        return make_parser(self._tokenizer, grammar)


def _check_validator(constraint: Constraint) -> None:
    """Raise ConstraintInvalid if outputs could not be checked at their end."""
    try:
        Validator(constraint.text)
    except ValueError as error:
        raise refusal(constraint, f"cannot be checked: {_first_lines(str(error))}") from None


def _refusal_of(constraint: Constraint, refused: list[KeywordUse]) -> ConstraintInvalid:
    problems = [ConstraintProblem(use.pointer, use.keyword, use.why) for use in refused]
    return ConstraintInvalid(constraint.path, problems)


def _in_plain_words(error: str) -> str:
    """What llguidance says of a schema, less its advice on options that callers do not have."""
    if "coerce_one_of" in error:
        return "two of its branches may match one value, which cannot be enforced"
    if "Unable to determine" in error:
        return "brings patterns together that take too long to compare"
    if "Default retriever" in error:
        return "leads out of the schema, and nothing is fetched"
    return _first_lines(error)


def _first_lines(error: str) -> str:
    """Without the parser's state and the drawing of the place."""
    told = re.split(r"<non-verbose/>|\n +\d+ \|", error.partition("(in regex): ")[2] or error)[0]
    return " ".join(told.split())[:500]
