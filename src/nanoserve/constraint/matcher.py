"""How far one completion has come in its grammar, and the masks that tell which tokens may be next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher

from nanoserve.request import BEGUN, REASONED

# A mask has a bit for each token: bit i % 32 of word i // 32, 1 = allowed.
Masks = np.ndarray[tuple[int, int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Closing:
    """How the reasoning of a grammar is cut short."""

    # At the start of the same grammar, where an open block is to be closed at once.
    parser: LLMatcher
    # The prompt has opened the block.
    is_open: bool


class Matcher:
    """Reads the tokens of one completion, and says what may follow. One thread at a time.

        tokens read: │ { │ "a │ ": │        fill: which tokens may stand here

    A token that the grammar does not allow is never read, so that what was read is always the beginning of some output
    that satisfies the constraint. EOS is read like any other token, where the grammar lets the output end.

    A matcher whose parser ran into its limits is of no use any more: it allows nothing, and reads nothing.
    """

    def __init__(
        self,
        parser: LLMatcher,
        wear_out: Callable[[], None],
        token_ids: Sequence[int] = (),
        limit: tuple[int, Closing] | None = None,
    ) -> None:
        """parser: at its start; it is copied, and shares its lexer with the copy. wear_out: called when that is full of
        states. token_ids: what is read already. limit: after so many tokens the reasoning is closed.
        """
        self._parser = parser.deep_copy()
        self._wear_out = wear_out
        # Tokens until the reasoning is closed; None = there is no limit, or it was reached.
        self._num_left: int | None = None
        self._closing: Closing | None = None
        if limit is not None:
            self._num_left, self._closing = limit
            self._close_reasoning_in_time()
        self.read(token_ids)

    def fill(self, masks: Masks, drafted: Sequence[int] = ()) -> None:
        """Write which tokens may be next: into the first of `masks` after what was read, and into the following ones
        after each token of `drafted` besides. masks: int32 [1 + len(drafted), number of words].

        Of a complete output EOS alone may be next; behind a drafted token that is not allowed, nothing.
        """
        masks[:] = 0
        num_read = 0
        # Where the reasoning is closed, another grammar goes on.
        drafted = drafted[: self._most_drafted(len(drafted))]
        for mask, token_id in zip(masks, [*drafted, None], strict=False):
            # A tokenizer may have more tokens than the model.
            words = np.frombuffer(self._parser.compute_bitmask(), dtype=np.int32)
            if self._is_worn():
                # What is in such a mask means nothing.
                return
            mask[:] = words[: len(mask)]
            if token_id is None or not self._parser.try_consume_tokens([token_id]):
                break
            num_read += 1
        if num_read and not self._is_worn():
            self._parser.rollback(num_read)

    def read(self, token_ids: Sequence[int]) -> int:
        """Read tokens until one is not allowed; behind a complete output none is. Returns how many were."""
        num_read = 0
        if self._num_left is not None:
            before = list(token_ids[: self._num_left])
            num_read = self._parser.try_consume_tokens(before)
            self._num_left -= num_read
            self._close_reasoning_in_time()
            if num_read < len(before) or self._is_worn():
                return num_read
        num_read += self._parser.try_consume_tokens(list(token_ids[num_read:]))
        self._is_worn()
        return num_read

    def _close_reasoning_in_time(self) -> None:
        if self._num_left != 0 or self._closing is None:
            return
        has_begun = self._closing.is_open or self._parser.get_capture(BEGUN) is not None
        if has_begun and self._parser.get_capture(REASONED) is None:
            self._parser = self._closing.parser.deep_copy()
        self._num_left = self._closing = None

    def _most_drafted(self, count: int) -> int:
        return count if self._num_left is None else min(count, self._num_left - 1)

    def _is_worn(self) -> bool:
        """The parser ran into its limits."""
        if self._parser.is_error():
            self._wear_out()
        return self._parser.is_error()

    def count_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        return self._parser.validate_tokens(list(token_ids[: self._most_drafted(len(token_ids))]))

    def forced(self) -> list[int]:
        """The tokens that spell what must follow, as the tokenizer would. Others may spell the same."""
        forced = self._parser.compute_ff_tokens()
        return forced[: self._most_drafted(len(forced))]

    @property
    def may_end(self) -> bool:
        """What was read satisfies the constraint, though more may follow."""
        return self._parser.is_accepting()

    @property
    def is_complete(self) -> bool:
        """What was read satisfies the constraint, and nothing but EOS may follow."""
        return self._parser.is_stopped() and self._parser.is_accepting() and not self._parser.is_error()


def make_masks(num_rows: int, vocab_size: int) -> Masks:
    """int32 [num_rows, ceil(vocab_size / 32)]; every token is forbidden."""
    return np.zeros((num_rows, (vocab_size + 31) // 32), dtype=np.int32)
