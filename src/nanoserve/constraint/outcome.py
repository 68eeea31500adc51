"""What became of an output under its constraint, and the validator that says so of a relaxed one."""

import enum
import json

import jsonschema_rs

from nanoserve.request import Constraint

# Steps of one pattern before it counts as not matched: patterns that go back may take for ever.
MAX_BACKTRACKS = 100_000


class Outcome(enum.Enum):
    """Of one sequence."""

    SATISFIED = "satisfied"  # all of the constraint was enforced, to the end
    TRUNCATED = "truncated"  # it ended before the grammar allowed it to
    RELAXED_OK = "relaxed ok"  # a part was not enforced, and the whole holds
    RELAXED_VIOLATED = "relaxed violated"  # a part was not enforced, and does not hold


class Validator:
    """Checks texts against a JSON Schema, formats too. Any thread. Fetches nothing."""

    def __init__(self, schema: str) -> None:
        """Raises ValueError if the validator cannot use the schema."""
        options = jsonschema_rs.FancyRegexOptions(backtrack_limit=MAX_BACKTRACKS)
        self._validator = jsonschema_rs.validator_for(
            json.loads(schema), validate_formats=True, offline=True, pattern_options=options
        )

    def accepts(self, text: str) -> bool:
        """Whether the text is JSON that the schema allows."""
        try:
            return self._validator.is_valid(json.loads(text))
        except (ValueError, RecursionError):
            return False


def outcome_of(constraint: Constraint, text: str, *, satisfies: bool, is_relaxed: bool) -> Outcome:
    """What became of one sequence. Takes long for a long text if is_relaxed: off the loop.

    satisfies: its grammar lets it end where it did. is_relaxed: of the schema something was left out of the grammar.
    """
    if not satisfies:
        return Outcome.TRUNCATED
    if not is_relaxed:
        return Outcome.SATISFIED
    return Outcome.RELAXED_OK if Validator(constraint.text).accepts(text) else Outcome.RELAXED_VIOLATED
