"""How far one sequence has come in its grammar, and which tokens may be next."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher

# A mask has a bit for each token: bit i % 32 of word i // 32, 1 = allowed.
Masks = np.ndarray[tuple[int, int], np.dtype[np.int32]]


def make_masks(num_rows: int, vocab_size: int) -> Masks:
    """Masks that allow every token: int32 [num_rows, ceil(vocab_size / 32)]."""
    return np.full((num_rows, (vocab_size + 31) // 32), -1, dtype=np.int32)


class Matcher:
    """Reads the tokens of one sequence, and says what may follow. One thread at a time.

        tokens consumed: │ { │ "a │ ": │        fill: which tokens may stand here

    A token that the grammar does not allow is never consumed, so that what was consumed is always the beginning of some
    output that satisfies the constraint. EOS is consumed like any other token, where the grammar lets the output end.
    """

    def __init__(self, parser: LLMatcher) -> None:
        """parser: at its start, and owned by the matcher from now on."""
        self._parser = parser

    def fill(self, masks: Masks, row: int) -> None:
        """Write into a row of `masks` which tokens may be next; of a complete output, EOS alone."""
        # A tokenizer may have more tokens than the model.
        words = np.frombuffer(self._parser.compute_bitmask(), dtype=np.int32)
        masks[row] = words[: masks.shape[1]]

    def consume(self, token_ids: Sequence[int]) -> int:
        """Read tokens until one is not allowed. Returns how many were."""
        return self._parser.try_consume_tokens(list(token_ids))

    @property
    def may_end(self) -> bool:
        """What was consumed satisfies the constraint, though more may follow."""
        return self._parser.is_accepting()

    @property
    def is_complete(self) -> bool:
        """What was consumed satisfies the constraint, and nothing but EOS may follow."""
        return self._parser.is_stopped() and self._parser.is_accepting() and not self._parser.is_error()
