"""How far one completion has come in its grammar, and the masks that tell which tokens may be next."""

from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

# A mask has a bit for each token: bit i % 32 of word i // 32, 1 = allowed.
Masks = np.ndarray[tuple[int, int], np.dtype[np.int32]]


class Matcher:
    """Reads the tokens of one completion, and says what may follow. One thread at a time.

        tokens read: │ { │ "a │ ": │        fill: which tokens may stand here

    A token that the grammar does not allow is never read, so that what was read is always the beginning of some output
    that satisfies the constraint. EOS is read like any other token, where the grammar lets the output end.

    A matcher whose parser ran into its limits is of no use any more: it allows nothing, and reads nothing.
    """

    def __init__(self, parser: LLMatcher, wear_out: Callable[[], None], token_ids: Sequence[int] = ()) -> None:
        """parser: at its start; it is copied, and shares its lexer with the copy. wear_out: called when that is full of
        states. token_ids: what is read already.
        """
        self._parser = parser.deep_copy()
        self._wear_out = wear_out
        self.read(token_ids)

    def fill(self, masks: Masks, drafted: Sequence[int] = ()) -> None:
        """Write which tokens may be next: into the first of `masks` after what was read, and into the following ones
        after each token of `drafted` besides. masks: int32 [1 + len(drafted), number of words].

        Of a complete output EOS alone may be next; behind a drafted token that is not allowed, nothing.
        """
        masks[:] = 0
        num_read = 0
        for mask, token_id in zip(masks, [*drafted, None], strict=True):
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
        num_read = self._parser.try_consume_tokens(list(token_ids))
        self._is_worn()
        return num_read

    def _is_worn(self) -> bool:
        """The parser ran into its limits."""
        if self._parser.is_error():
            self._wear_out()
        return self._parser.is_error()

    def count_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        return self._parser.validate_tokens(list(token_ids))

    def forced(self) -> list[int]:
        """The tokens that spell what must follow, as the tokenizer would. Others may spell the same."""
        return self._parser.compute_ff_tokens()

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
