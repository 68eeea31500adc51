"""A model side without a model: it keeps what each KV slot holds, and refuses to compute over a wrong one.

The "logits" of a position are a hash of all tokens up to it, so any mistake of the scheduler (a stale block, a skipped
token, a block shared by accident) either raises here or changes the tokens.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanoserve.constraint.matcher import make_masks
from nanoserve.request import (
    Admission,
    DraftSource,
    Failure,
    ScheduledSequence,
    SequenceResult,
    StepPlan,
    StepResult,
    TokenLogprob,
)


def num_tokens(plan: StepPlan) -> int:
    """That a step computes."""
    return sum(s.num_known + s.num_drafts for s in plan.sequences)


def next_token(token_ids: Sequence[int], seed: int, vocab_size: int, revision: str = "") -> int:
    """What the fake model says after these tokens, with the adapter of this revision."""
    digest = hashlib.sha256((repr((list(token_ids), seed)) + revision).encode()).digest()
    return int.from_bytes(digest[:4], "little") % vocab_size


def expected_completion(prompt: Sequence[int], seed: int, count: int, vocab_size: int, revision: str = "") -> list[int]:
    """The completion that any correct schedule gives."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, seed, vocab_size, revision))
    return token_ids[len(prompt) :]


def right_drafts(token_ids: Sequence[int], seed: int, count: int = 4, vocab_size: int = 1000) -> list[int]:
    """What the fake model will say next."""
    return expected_completion(token_ids, seed, count, vocab_size)


def wrong_drafts(_token_ids: Sequence[int], _seed: int) -> list[int]:
    return [1000, 1001, 1002]  # no tokens of its vocabulary


def random_drafts(token_ids: Sequence[int], seed: int) -> list[int]:
    """Between none and five, some of which are right."""
    chance = random.Random(repr((list(token_ids), seed)))
    return [t if chance.random() < 0.7 else 1000 for t in right_drafts(token_ids, seed, chance.randrange(6))]


def endless_drafts(token_ids: Sequence[int], seed: int) -> list[int]:
    """Right, and beyond whatever ends the text."""
    return right_drafts(token_ids, seed, 40)


class FakeSlots:
    """Implements Slots: what is in a slot is its revision."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.revisions: list[str | None] = [None] * num_slots
        # Raises if nobody may write a slot now.
        self.check: Callable[[int], None] = lambda _: None
        self.num_writes = 0

    def write(self, slot: int, weights: Any) -> None:
        self.check(slot)
        self.revisions[slot] = weights.revision
        self.num_writes += 1


class FakeExecutor:
    """Implements Executor over simulated KV memory."""

    def __init__(
        self,
        block_size: int,
        vocab_size: int = 1000,
        max_num_batched_tokens: int = 10**9,
        draft: Callable[[list[int], int], list[int]] | None = None,
        depth: int = 1,
        slots: FakeSlots | None = None,
    ) -> None:
        """draft: guesses what follows some tokens, given the seed; as many as it likes. None = nothing."""
        self.depth = depth
        self._submitted: deque[StepPlan] = deque()
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_num_batched_tokens = max_num_batched_tokens
        # (block, offset) -> (token, position, revision of the adapter).
        self.slots: dict[tuple[int, int], tuple[int, int, str]] = {}
        self.adapter_slots = slots
        # Row -> revision of the adapter that was in its slot when it was admitted.
        self.revisions: dict[int, str] = {}
        self.block_tables: dict[int, list[int]] = {}
        self.admissions: dict[int, Admission] = {}
        # Row -> its tokens: those of the admission, and those that were drawn.
        self.tokens: dict[int, list[int]] = {}
        # Computed tokens over all steps.
        self.num_computed_tokens = 0
        self.plans: list[StepPlan] = []
        self._draft = draft
        self.num_accepted_drafts = 0

    def check_slot_is_unused(self, slot: int) -> None:
        """No step that was submitted computes with this slot of adapters."""
        admissions = dict(self.admissions)
        for plan in self._submitted:
            for s in plan.sequences:
                admissions[s.row] = s.admission or admissions[s.row]
                assert admissions[s.row].adapter_slot != slot, f"slot {slot} is written while a step computes with it"

    def _revision(self, row: int) -> str:
        """In the slot of the row's adapter."""
        slot = self.admissions[row].adapter_slot
        if slot is None:
            return ""
        assert self.adapter_slots is not None
        revision = self.adapter_slots.revisions[slot]
        assert revision is not None, "nothing was written into this slot"
        return revision

    def submit(self, plan: StepPlan) -> None:
        assert len(self._submitted) < self.depth
        self._submitted.append(plan)

    def collect(self) -> StepResult:
        return self.execute(self._submitted.popleft())

    def close(self) -> None:
        self.is_closed = True

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.sequences
        assert num_tokens(plan) <= self.max_num_batched_tokens
        assert len({s.row for s in plan.sequences}) == len(plan.sequences)
        counts = [s.num_known for s in plan.sequences]
        assert counts == sorted(counts), "few tokens come first"
        self.plans.append(plan)
        self.num_computed_tokens += num_tokens(plan)
        for s in plan.sequences:
            if s.admission is not None:
                self.admissions[s.row] = s.admission
                self.block_tables[s.row] = []
                self.tokens[s.row] = list(s.admission.token_ids)
                self.revisions[s.row] = self._revision(s.row)
            assert self._revision(s.row) == self.revisions[s.row], f"row {s.row} has lost its adapter"
            self.block_tables[s.row].extend(s.new_block_ids)
            assert s.num_known > 0
            for position in range(s.start, s.start + s.num_known):
                self.slots[self._slot(s.row, position)] = (
                    self.tokens[s.row][position],
                    position,
                    self.revisions[s.row],
                )
        results = [self._result(s.row, s.start + s.num_known, s) for s in plan.sequences]
        return StepResult(results, num_threads=2)

    def _next(self, row: int, context: list[int]) -> int | None:
        """What the fake model says, of the tokens that the sequence's grammar allows; None if it allows none."""
        admission = self.admissions[row]
        if admission.grammar is None:
            return next_token(context, admission.seed, self.vocab_size, self.revisions[row])
        masks = make_masks(1, self.vocab_size)
        admission.grammar.matcher(context[admission.num_prompt_tokens :]).fill(masks)
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
        return int(allowed[next_token(context, admission.seed, len(allowed))]) if len(allowed) else None

    def _guess(self, row: int, context: list[int]) -> list[int]:
        return [] if self._draft is None else self._draft(context, self.admissions[row].seed)

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        return self.block_tables[row][position // self.block_size], position % self.block_size

    def _result(self, row: int, length: int, s: ScheduledSequence) -> SequenceResult:
        assert len(self.block_tables[row]) >= -(-(length + s.num_drafts) // self.block_size)
        assert len(set(self.block_tables[row])) == len(self.block_tables[row]), "a block was told of twice"
        assert s.samples or not s.num_drafts
        context = []
        for position in range(length):
            token, written_at, revision = self.slots[self._slot(row, position)]
            assert written_at == position, f"row {row} reads position {written_at} as {position}"
            assert revision == self.revisions[row], f"row {row} reads what another adapter has computed"
            context.append(token)
        admission = self.admissions[row]
        known = admission.token_ids[:length]
        assert context[: len(known)] == known, f"row {row} reads the KV of other tokens"
        first = s.start + 1
        prompt_logprobs = [
            TokenLogprob(self.tokens[row][i], -float(i), 1) for i in range(first, first + s.num_prompt_logprobs)
        ]
        if not s.samples:
            return SequenceResult(prompt_logprobs=prompt_logprobs)
        # Keys and values of all drafts are written; those of wrong ones must be written over before they are read.
        drafts = self._guess(row, context)[: s.num_drafts]
        drafts += [-1] * (s.num_drafts - len(drafts))
        for position, token in enumerate(drafts, start=length):
            self.slots[self._slot(row, position)] = (token, position, self.revisions[row])
        first = self._next(row, context)
        if first is None:
            return SequenceResult(failure=Failure.CONSTRAINT)
        token_ids = [first]
        for draft in drafts:
            if draft != token_ids[-1]:
                break
            context.append(draft)
            following = self._next(row, context)
            if following is None:  # complete
                context.pop()
                break
            token_ids.append(following)
        assert len(self.tokens[row]) == length
        self.tokens[row] += token_ids
        self.num_accepted_drafts += len(token_ids) - 1
        logprobs = [TokenLogprob(t, -0.5, 1) for t in token_ids] if admission.params.logprobs is not None else []
        num_drafts_next = len(self._guess(row, [*context, token_ids[-1]]))
        generated = [*context, token_ids[-1]][admission.num_prompt_tokens :]
        matcher = None if admission.grammar is None else admission.grammar.matcher(generated)
        return SequenceResult(
            token_ids,
            logprobs,
            prompt_logprobs,
            satisfies=matcher is not None and matcher.may_end,
            is_over=matcher is not None and matcher.is_complete,
            num_drafted=s.num_drafts,
            draft_source=DraftSource.NGRAM if s.num_drafts else None,
            num_drafts_next=num_drafts_next,
        )
