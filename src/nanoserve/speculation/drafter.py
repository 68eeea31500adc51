"""What drafters have in common. Each guesses how one text goes on; none of them can make the text another one.

token drawn ─▶ extend ─▶ propose ─▶ the step computes the draft's tokens too ─▶ as many are kept as would be drawn
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoserve.request import DraftSource


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, at least one."""

    source: DraftSource
    token_ids: list[int]
    # How much speaks for it, in steps of the source's own scale, 0 to MAX_EVIDENCE. Drafts of one source with the same
    # evidence are expected to be right as often.
    evidence: int


MAX_EVIDENCE = 16
# Tokens of a long text that a drafter reads in one step: it takes them a millisecond or two.
INDEXED_AT_ONCE = 2048


class Drafter(Protocol):
    """Follows one sequence. It sees each token once, and what it does for one is not in proportion to the text."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The text goes on with these."""

    def propose(self, count: int) -> Draft | None:
        """What may follow the text: at most `count` tokens. None = no idea."""
