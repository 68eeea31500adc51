"""What drafters have in common. Each guesses how one text goes on; none of them can make the text another one.

token drawn ─▶ extend ─▶ propose ─▶ the step computes the draft's tokens too ─▶ as many are kept as would be drawn
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoserve.request import DraftSource


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, at least one."""

    source: DraftSource
    token_ids: list[int]
    # Of each token, how much speaks for it, in steps of the source's own scale, 0 to MAX_EVIDENCE. Tokens of one source
    # with the same evidence are expected to be right as often, if those before them are.
    evidence: list[int]


MAX_EVIDENCE = 16
# Tokens of a long text that a drafter reads in one step: it takes them a millisecond or two.
INDEXED_AT_ONCE = 2048


class Drafter(Protocol):
    """Follows one sequence. It sees each token once, and what it does for one is not in proportion to the text."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The text goes on with these."""

    def propose(self, count: int) -> Draft | None:
        """What may follow the text: at most `count` tokens. None = no idea."""


class Guide(Protocol):
    """Knows of some rows what their text must be like: the grammars of constrained rows."""

    def forced(self, row: int) -> list[int]:
        """Tokens that spell what must come next."""

    def cut(self, row: int, draft: list[int]) -> list[int]:
        """The part of a draft that is allowed."""


class ModelDrafter(Protocol):
    """Guesses for many rows at once, a token of each in a pass, which takes time: another model.

    A head that guesses from the hidden states of the served model, such as EAGLE's, would be one too. What the last
    step computed of a row's last token lies in ModelRunner._draw, which would hand it over as it hands over tokens.
    """

    def room(self, row: int) -> int:
        """How many tokens it can guess for the row at most."""

    def guess(self, drafts: Mapping[int, Sequence[int]]) -> tuple[dict[int, tuple[int, int]], int]:
        """A pass: row -> what it has guessed in this step so far. Returns row -> the next token, and its evidence; and
        how many tokens the pass has computed.

        Rows that it knows nothing more of, or not yet, are left out.
        """
