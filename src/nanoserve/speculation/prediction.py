"""Drafts out of a text that the caller expects: OpenAI's `prediction`, such as the file that is to be edited."""

from bisect import bisect_left
from collections.abc import Sequence

from nanoserve.request import DraftSource
from nanoserve.speculation.drafter import INDEXED_AT_ONCE, MAX_EVIDENCE, Draft

# Where text and prediction went apart, they are together again after so many equal tokens.
MATCH = 2


class PredictionDrafter:
    """Follows the prediction from its beginning, and finds the way back whenever the text goes another one."""

    def __init__(self, predicted: Sequence[int]) -> None:
        self._predicted = list(predicted)
        # Run of MATCH tokens -> the places behind it, in order, for places below num_indexed.
        self._behind: dict[tuple[int, ...], list[int]] = {}
        self._num_indexed = MATCH
        # The next token of the prediction. None = text and prediction are apart.
        self._next: int | None = 0
        # Where they went apart.
        self._left = 0
        self._num_same = 0
        self._last: tuple[int, ...] = ()

    def extend(self, token_ids: Sequence[int]) -> None:
        """A long prediction is indexed with the next steps, so that none of them takes long for it."""
        start = self._num_indexed
        self._num_indexed = max(start, min(len(self._predicted), start + INDEXED_AT_ONCE))
        for place in range(start, self._num_indexed):
            self._behind.setdefault(tuple(self._predicted[place - MATCH : place]), []).append(place)
        for token_id in token_ids:
            self._last = (*self._last, token_id)[-MATCH:]
            if self._next is not None and self._predicted[self._next : self._next + 1] == [token_id]:
                self._next += 1
                self._num_same += 1
                continue
            if self._next is not None:
                self._left, self._next, self._num_same = self._next, None, 0
            if places := self._behind.get(self._last):
                # Rather further on than back: an edit seldom repeats what came before it.
                self._next = places[min(bisect_left(places, self._left), len(places) - 1)]
                self._num_same = MATCH

    def propose(self, count: int) -> Draft | None:
        if self._next is None or not (token_ids := self._predicted[self._next : self._next + count]):
            return None
        return Draft(DraftSource.PREDICTION, token_ids, [min(self._num_same, MAX_EVIDENCE)] * len(token_ids))
