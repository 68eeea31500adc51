"""The grammars of those rows that have one, and the masks of a step, which are made while the model runs.

drafts are chosen ── begin ──▶ a thread fills masks ──┐
                  the model runs ────────────────────┴─ masks ──▶ sampler ── tokens ──▶ keep
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from nanoserve.constraint.matcher import Masks, Matcher, make_masks
from nanoserve.request import Admission


class Grammars:
    """One matcher for each row whose sequence has a constraint. Engine thread only, but for the filling of masks."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._matchers: dict[int, Matcher] = {}
        # One is enough: it works beside the model, and holds no lock of Python's while it does.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanoserve-masks")
        self._filled: Future[dict[int, Masks]] | None = None

    def admit(self, row: int, admission: Admission) -> None:
        """A sequence takes the row. What it has generated before a preemption is read again."""
        self._matchers.pop(row, None)
        if admission.grammar is not None:
            generated = admission.token_ids[admission.num_prompt_tokens :]
            self._matchers[row] = admission.grammar.matcher(generated, admission.params.max_reasoning_tokens)

    def forced(self, row: int) -> list[int]:
        """Tokens that spell what must come next in the row, which has a grammar."""
        return self._matchers[row].forced()

    def cut(self, row: int, draft: list[int]) -> list[int]:
        """The part of a draft that the row's grammar allows."""
        return draft[: self._matchers[row].count_allowed(draft)]

    def begin(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Fill masks for these rows, behind their tokens and behind each of their drafted ones."""
        wanted = {row: draft for row, draft in drafts.items() if row in self._matchers}
        self._filled = self._thread.submit(self._fill, wanted) if wanted else None

    def _fill(self, drafts: Mapping[int, Sequence[int]]) -> dict[int, Masks]:
        filled = {row: make_masks(1 + len(draft), self._vocab_size) for row, draft in drafts.items()}
        for row, masks in filled.items():
            self._matchers[row].fill(masks, drafts[row])
        return filled

    def masks(self) -> dict[int, Masks]:
        """What `begin` asked for: by row, int32 [1 + number of drafted tokens, number of words]."""
        filled, self._filled = self._filled, None
        return {} if filled is None else filled.result()

    def keep(self, row: int, token_ids: list[int]) -> list[int]:
        """These tokens are those of the row, which has a grammar. Returns them up to the one that
        makes the output complete, or takes more than the grammar's limits allow."""
        return token_ids[: self._matchers[row].read(token_ids)]

    def state(self, row: int) -> tuple[bool, bool]:
        """Whether the output of a row that has a grammar may end now, and whether it must."""
        return self._matchers[row].may_end, self._matchers[row].is_complete

    def close(self) -> None:
        self._thread.shutdown()
