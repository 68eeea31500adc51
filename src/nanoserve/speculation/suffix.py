"""Drafts out of what the model has said before, to the same owner: the token that most often followed the last ones.

A simple form of suffix decoding, https://arxiv.org/abs/2411.04975, with contexts of a few lengths in one table in place
of a tree.
"""

from collections.abc import Hashable, Sequence

from nanoserve.request import DraftSource
from nanoserve.speculation.drafter import MAX_EVIDENCE, Draft

# Tokens of a context, longest first: the longest that is known counts.
CONTEXTS = (8, 5, 3)
# Contexts that are kept, of all owners; the oldest make room.
MAX_CONTEXTS = 1 << 17
# A draft ends where it is less likely than this to be right, as far as counts can say.
MIN_PROBABILITY = 0.3


class SuffixCounts:
    """What followed which context, and how often. One table for all owners, who see nothing of each other's."""

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self._max_contexts = max_contexts
        # (owner, context) -> next token -> count.
        self._followers: dict[tuple[Hashable, tuple[int, ...]], dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._followers)

    def add(self, owner: Hashable, context: tuple[int, ...], token_id: int) -> None:
        key = owner, context
        if (counts := self._followers.get(key)) is None:
            if len(self._followers) >= self._max_contexts:
                del self._followers[next(iter(self._followers))]
            counts = self._followers[key] = {}
        counts[token_id] = counts.get(token_id, 0) + 1

    def best(self, owner: Hashable, context: tuple[int, ...]) -> tuple[int, float] | None:
        """The token that followed most often, and its share of all that did."""
        if (counts := self._followers.get((owner, context))) is None:
            return None
        if len(counts) == 1:  # as mostly
            return next(iter(counts)), 1.0
        token_id = max(counts, key=counts.__getitem__)
        return token_id, counts[token_id] / sum(counts.values())


class SuffixDrafter:
    """Reads and writes the counts of one owner."""

    def __init__(self, counts: SuffixCounts, owner: Hashable, token_ids: Sequence[int]) -> None:
        """token_ids: the text so far, which the model has not said and is not counted."""
        self._counts = counts
        self._owner = owner
        self._last = tuple(token_ids[-CONTEXTS[0] :])

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            for length in CONTEXTS:
                if len(self._last) >= length:
                    self._counts.add(self._owner, self._last[-length:], token_id)
            self._last = (*self._last, token_id)[-CONTEXTS[0] :]

    def propose(self, count: int) -> Draft | None:
        text, probability = list(self._last), 1.0
        token_ids: list[int] = []
        evidence: list[int] = []
        while len(token_ids) < count and (found := self._best(text)) is not None:
            token_id, share = found
            probability *= share
            if probability < MIN_PROBABILITY:
                break
            token_ids.append(token_id)
            evidence.append(round(share * MAX_EVIDENCE))
            text.append(token_id)
        return Draft(DraftSource.SUFFIX, token_ids, evidence) if token_ids else None

    def _best(self, text: list[int]) -> tuple[int, float] | None:
        for length in CONTEXTS:
            if len(text) >= length and (found := self._counts.best(self._owner, tuple(text[-length:]))) is not None:
                return found
        return None
