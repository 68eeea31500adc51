"""The scheduler's accounts: of one completion, and of one adapter that completions are computed with."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from nanoserve.adapter.vocabulary import AdapterInfo
from nanoserve.request import DraftCounts, FinishReason, Grammar, Request, SequenceOutput, SequenceResult


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n completions. Only the scheduler and its ServedAdapters change it."""

    request: Request
    index: int
    # Order of service, the smallest first: priority, then arrival, then index.
    rank: tuple[int, int, int]
    # Prompt, then completion.
    token_ids: list[int]
    # Tokens behind these that planned steps draw, and whose names are not known yet.
    num_unknown_tokens: int = 0
    # Keys and values of so many tokens are in the blocks of block_ids, once the planned steps are computed.
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    # Of these blocks, those that the model side knows of; 0 = it does not know yet that the row is this sequence's.
    num_told_blocks: int = 0
    # Of the full blocks, as far as they were needed.
    block_hashes: list[bytes] = field(default_factory=list)
    # The place on the model side; None = not running.
    row: int | None = None
    # The start of its request was reported.
    has_started: bool = False
    num_preemptions: int = 0
    # Places that the model side would fill with guesses.
    num_drafts: int = 0
    # What it is computed with besides the model. None = nothing.
    adapter: "AdapterState | None" = None
    # What its completion must be; None = anything, or it is still compiled.
    grammar: Grammar | None = None
    # Tokens that the completion had when its grammar was worn; -1 = it never was.
    num_worn_tokens: int = -1
    # The completion so far satisfies its constraint.
    satisfies: bool = False
    # Of the prompt's tokens, the first included, which has none.
    num_prompt_logprobs: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_completion_tokens(self) -> int:
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def gap(self) -> int:
        """Tokens to compute. Not above 0 while drafts are computed: how many were right is not known."""
        return self.num_tokens - self.num_computed_tokens

    def append(self, outcome: SequenceResult, max_context_tokens: int) -> tuple[int, FinishReason | None]:
        """Add sampled tokens up to the one that ends it; returns how many, and why it ended."""
        request, token_ids = self.request, outcome.token_ids
        if request.params.max_tokens == 0 and token_ids:
            return 0, FinishReason.LENGTH
        for kept, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            if token_id in request.eos_token_ids:
                return kept, FinishReason.EOS
            if token_id in request.params.stop_token_ids:
                return kept, FinishReason.STOP
            if outcome.is_over and kept == len(token_ids):
                return kept, FinishReason.COMPLETE
            if len(self.token_ids) - len(request.prompt_token_ids) == request.params.max_tokens:
                return kept, FinishReason.LENGTH
            if len(self.token_ids) == max_context_tokens:
                return kept, FinishReason.CONTEXT
        return len(token_ids), None

    def output(
        self, now: float, outcome: SequenceResult, reason: FinishReason | None, kept: int = 0, start: int = 0
    ) -> SequenceOutput:
        """What is told of a step that began at position `start`, and of whose tokens it `kept` so many."""
        # A prompt that was preempted is computed again; what was reported of it is not reported again.
        num_known = max(0, self.num_prompt_logprobs - (start + 1))
        prompt_logprobs = outcome.prompt_logprobs[num_known:]
        self.num_prompt_logprobs += len(prompt_logprobs)
        ended_by_token = reason in (FinishReason.EOS, FinishReason.STOP)
        draft = None
        if outcome.draft_source is not None:
            num_accepted = min(kept, len(outcome.token_ids) - 1)
            draft = DraftCounts(outcome.draft_source, outcome.num_drafted, num_accepted)
        return SequenceOutput(
            request_id=self.request.id,
            index=self.index,
            time_s=now,
            token_ids=outcome.token_ids[:kept],
            logprobs=outcome.logprobs[:kept],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=self.token_ids[-1] if ended_by_token else None,
            num_preemptions=self.num_preemptions,
            draft=draft,
            satisfies=self.satisfies,
        )


@dataclass(slots=True, eq=False)
class AdapterState:
    """One content of an adapter: who uses it, and where it is. Only Residency and ServedAdapters change it."""

    name: str
    # None = not known before it is read.
    folder: Path | None = None
    info: AdapterInfo | None = None
    # New requests of its name get it.
    is_served: bool = True
    # Sequences that are not over, in order of arrival.
    live: dict[Sequence, None] = field(default_factory=dict)
    # Those that wait for a row, or for this adapter, in order of rank.
    waiting: list[Sequence] = field(default_factory=list)
    num_running: int = 0
    slot: int | None = None
    # It is in its slot.
    is_written: bool = False
    # None of its sequences may begin, so that its slot becomes free.
    is_closed: bool = False
    # Those that wait are in the scheduler's queue.
    is_queued: bool = False
    # When it began to wait for a slot. None = it does not.
    wants_slot_since_s: float | None = None
    # Order of the last use, and of the claims of slots.
    last_use: int = 0
    last_claim: int = 0

    @property
    def is_open(self) -> bool:
        """Its sequences may run."""
        return self.is_written and not self.is_closed

    @property
    def is_pinned(self) -> bool:
        """It does not leave its slot."""
        return self.is_served and self.info is not None and self.info.is_pinned

    @property
    def turn(self) -> tuple[float, ...]:
        """Who gets a slot first, the smallest: a pinned adapter, then as the first of its sequences is served."""
        return self.waiting[0].rank if self.waiting and not self.is_pinned else (-math.inf,)
