"""A smaller model of the same vocabulary, which guesses what the served one will say.

It has its own keys and values in the same blocks, and chases the same text with a counter of its own:

    |######## computed by both ########|== by the served model alone ==|  guesses
    0                                  ^ num_computed                  ^ num_tokens

What it has not computed, it computes when it is asked to guess. So a prompt's chunk, a block from the prefix cache and
a sequence that comes back after a preemption are one case here too, and where guesses do not pay it costs nothing.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.loader import LoadedModel
from nanoserve.model.paged_model import PagedModel
from nanoserve.model.rows import Rows
from nanoserve.model.sampler import Place, Sampler
from nanoserve.model.threads import ComputeThreads
from nanoserve.request import ScheduledSequence
from nanoserve.speculation.drafter import MAX_EVIDENCE

# Tokens of a pass, so that a long text that it must catch up with holds no step up for long.
MAX_PASS_TOKENS = 256

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Row:
    """How far the draft model is with the sequence in a row."""

    # That are known.
    num_tokens: int
    # Keys and values of so many are in its blocks; beyond num_tokens they are those of guesses.
    num_computed: int
    # Blocks that were found or marked as filled.
    num_filled: int


class DraftModel:
    """Guesses the next token of many rows in a pass. Implements ModelDrafter. Engine thread only.

    It draws as the served model would: with the row's own parameters, and the noise of the same position. Where both
    find the same tokens likely they draw the same one, greedy or not: a coupling by common random numbers.
    Whether a guess is right is decided elsewhere, so nothing here can change a text.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedKVCache,
        rows: Rows,
        sampler: Sampler,
        vocab_size: int,
        max_context_tokens: int,
        *,
        threads: ComputeThreads | None,
    ) -> None:
        """vocab_size: of the served model's logits, which may have more places than there are tokens, or fewer."""
        # A text that is longer than its own context goes on without it.
        self._max_tokens = min(max_context_tokens, model.facts.max_position)
        self.model = PagedModel(
            model, cache, rows, max_num_tokens=MAX_PASS_TOKENS, max_context_tokens=self._max_tokens, threads=threads
        )
        self._table = rows
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        # Block -> it has computed all tokens that are in it.
        self._is_filled = bytearray(len(cache.layers[0].keys))
        self._has_failed = False

    # ------------------------------------------------------------------------------------------------ the text

    def take(self, sequences: list[ScheduledSequence]) -> None:
        """Blocks that are given to rows have nothing in them, but for those that the prefix cache had."""
        for s in sequences:
            num_cached = s.start // self.model.cache.block_size if s.admission is not None else 0
            for block in s.new_block_ids[num_cached:]:
                self._is_filled[block] = False

    def admit(self, row: int, num_tokens: int, *, num_cached_tokens: int) -> None:
        """A sequence has taken the row, and its blocks; so many of its tokens were in the prefix cache."""
        block_size = self.model.cache.block_size
        cached = self._table.block_ids[row][: num_cached_tokens // block_size]
        num_filled = next((i for i, block in enumerate(cached) if not self._is_filled[block]), len(cached))
        self._rows[row] = _Row(num_tokens, num_filled * block_size, num_filled)

    def extend(self, row: int, token_ids: Sequence[int]) -> None:
        """These were drawn, at least one; those before the last were guessed."""
        if (state := self._rows.get(row)) is None:
            return
        state.num_computed = min(state.num_computed, state.num_tokens + len(token_ids) - 1)
        state.num_tokens += len(token_ids)
        num_filled = state.num_computed // self.model.cache.block_size
        for block in self._table.block_ids[row][state.num_filled : num_filled]:
            self._is_filled[block] = True
        state.num_filled = num_filled

    # --------------------------------------------------------------------------------------------- the guesses

    def room(self, row: int) -> int:
        state = self._rows.get(row)
        return 0 if state is None or self._has_failed else max(0, self._max_tokens - state.num_tokens)

    def guess(self, drafts: Mapping[int, Sequence[int]]) -> tuple[dict[int, tuple[int, int]], int]:
        try:
            return self._guess(drafts)
        except Exception:
            # Some layers have written, perhaps NaN, into blocks that others get next.
            self.model.cache.clear(self.model.facts.slots)
            self._has_failed = True
            logger.exception("the draft model failed; serving goes on without it")
            return {}, 0

    def _guess(self, drafts: Mapping[int, Sequence[int]]) -> tuple[dict[int, tuple[int, int]], int]:
        ends = {row: self._rows[row].num_tokens + len(draft) for row, draft in drafts.items()}
        self._table.write((row, ends[row] - 1, [draft[-1]]) for row, draft in drafts.items() if draft)
        counts = self._counts(ends)
        hidden = self.model.run(list(counts), [self._rows[row].num_computed for row in counts], list(counts.values()))
        last = torch.tensor(list(counts.values())).cumsum(0) - 1  # [num_rows]: each one's last token
        lost = self._clear_corrupt(hidden)
        for row in lost:
            del self._rows[row]
        for row in counts.keys() - lost:
            self._rows[row].num_computed += counts[row]
        lines = {
            row: line
            for row, line in zip(counts, last.tolist(), strict=True)
            if row not in lost and self._rows[row].num_computed == ends[row]
        }
        if not lines:
            return {}, len(hidden)
        logits = self._as_wide(self.model.logits(hidden[list(lines.values())], list(lines)))
        places = [Place(row, ends[row], tuple(drafts[row])) for row in lines]
        token_ids = self._sampler.draw(places, logits)
        evidence = (_shares(logits, token_ids) * MAX_EVIDENCE).round().int().tolist()
        guesses = zip(lines, token_ids, evidence, strict=True)
        return {row: (token_id, share) for row, token_id, share in guesses if token_id >= 0}, len(hidden)

    def _counts(self, ends: Mapping[int, int]) -> dict[int, int]:
        """How many tokens of each row a pass computes, fewer first. Rows that need the fewest get theirs."""
        missing = {row: end - self._rows[row].num_computed for row, end in ends.items()}
        counts, left = {}, MAX_PASS_TOKENS
        for row in sorted(missing, key=missing.__getitem__):
            counts[row] = min(left, missing[row])
            left -= counts[row]
        return {row: counts[row] for row in sorted(counts, key=counts.__getitem__) if counts[row]}

    def _clear_corrupt(self, hidden: Tensor) -> set[int]:
        """Rows for which it computed NaN or infinity, and no longer guesses. hidden: [num_tokens, hidden_size]"""
        bad = ~hidden.isfinite().all(-1)  # [num_tokens]
        if not bad.any():
            return set()
        facts = self.model.facts
        self.model.cache.clear(facts.slots[bad])
        for slot in facts.slots[bad].tolist():
            self._is_filled[slot // self.model.cache.block_size] = False
        return set(facts.rows[facts.sequence_of[bad]].tolist())

    def _as_wide(self, logits: Tensor) -> Tensor:
        """As wide as the served model's: what lies beyond the tokens that both have is no token of either."""
        return functional.pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf)


def _shares(logits: Tensor, token_ids: list[int]) -> Tensor:
    """The probability of one token of each row of logits [n, vocab]: [n]."""
    index = torch.tensor(token_ids, device=logits.device).clamp(min=0)[:, None]  # [n, 1]
    logits = logits.float()
    return (logits.gather(1, index).squeeze(1) - logits.logsumexp(1)).exp()
