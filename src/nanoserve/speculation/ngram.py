"""Drafts out of the text itself: what followed its last tokens where they stood before.

Known as prompt lookup decoding: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from collections.abc import Sequence
from itertools import cycle, islice

from nanoserve.request import DraftSource
from nanoserve.speculation.drafter import INDEXED_AT_ONCE, MAX_EVIDENCE, Draft

# Tokens that must be the same.
MATCH = 3
# A run of MATCH tokens is one integer, in which each has so many bits. Ids that need more may be mistaken for others,
# until the text is looked at.
_BITS = 21
_MASK = (1 << _BITS * MATCH) - 1


def _run_of(token_ids: Sequence[int]) -> int:
    run = 0
    for token_id in token_ids:
        run = (run << _BITS | token_id) & _MASK
    return run


class NgramDrafter:
    """The latest place of each run of three tokens; one entry more for each token."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        # Run -> the place behind it, for places below num_indexed; and the run before that.
        self._behind: dict[int, int] = {}
        self._num_indexed = 0
        self._run = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """A long text is indexed with the next steps, so that none of them takes long for it."""
        self._token_ids.extend(token_ids)
        run, behind, start = self._run, self._behind, self._num_indexed
        self._num_indexed = min(len(self._token_ids), start + INDEXED_AT_ONCE)
        for place in range(start, self._num_indexed):
            if place >= MATCH:
                behind[run] = place
            run = (run << _BITS | self._token_ids[place]) & _MASK
        self._run = run

    def propose(self, count: int) -> Draft | None:
        """A draft that reaches the end of the text goes on with its own beginning."""
        if (place := self._behind.get(_run_of(self._token_ids[-MATCH:]))) is None:
            return None
        length = self._num_same(place)
        if length < MATCH:
            return None
        repeated = self._token_ids[place : place + count]
        return Draft(DraftSource.NGRAM, list(islice(cycle(repeated), count)), [length] * count)

    def _num_same(self, place: int) -> int:
        """How many tokens before this place are those at the end; at most MAX_EVIDENCE."""
        token_ids = self._token_ids
        longest = min(MAX_EVIDENCE, place)
        for length in range(longest):
            if token_ids[place - 1 - length] != token_ids[-1 - length]:
                return length
        return longest
