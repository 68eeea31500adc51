"""Decides what each step computes, and books what came out.

There is no prefill and no decode phase. A sequence has `num_computed_tokens`, which chase its `num_tokens`:

    |## from the cache ##|=== computed ===|--- this step ---|.... later ....|
    0                                     ^ num_computed_tokens             ^ num_tokens

A new prompt, a chunk of one, a prefix-cache hit, a preempted sequence that comes back and a sequence that generates
differ only in the size of that gap. When a step closes it, the step samples the next token, and the gap is 1 again.

Counters move when a step is planned, so that the next one can be planned while it runs. Which token it drew is known
only when it is committed; the model side has it already, so a plan that computes it need not name it.
"""

import bisect
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from nanoserve.config import SchedulerConfig
from nanoserve.constraint.compiler import CompiledConstraint, waited_too_long
from nanoserve.engine.adapters import ServedAdapters
from nanoserve.engine.sequence import Sequence
from nanoserve.engine.step_notes import StepNotes
from nanoserve.errors import AdapterNotFound, Rejection
from nanoserve.kv_cache.block_pool import BlockNames, BlockPool
from nanoserve.request import (
    Admission,
    Event,
    Failure,
    FinishReason,
    Request,
    RequestFailed,
    RequestStarted,
    ScheduledSequence,
    SequenceOutput,
    SequenceResult,
    StepPlan,
    StepResult,
)
from nanoserve.step_record import SchedulerStats, WaitReason


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is planned and not committed."""

    plan: StepPlan
    # Aligned with the plan's. Those that have ended since have no row.
    sequences: list[Sequence]
    notes: StepNotes


class Scheduler:
    """Owns every live sequence and the block pool. Engine thread only.

    Each step is one `schedule`, then one `commit` or `fail`, in the same order; several may be planned before the
    first is committed. Invariants: the scheduled tokens fit the budget, each has its place in a block that its sequence
    owns, and a row belongs to one sequence.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        *,
        block_size: int,
        max_context_tokens: int,
        cache_identity: str,
        adapters: ServedAdapters | None = None,
    ) -> None:
        """A sequence of max_context_tokens must fit the pool; cache_identity names model and weights.

        adapters: None = there are none.
        """
        assert max_context_tokens <= pool.num_blocks * block_size
        assert config.max_num_seqs <= config.max_num_batched_tokens
        self.pool = pool
        self.adapters = adapters
        # Each step's events end with its StepRecord.
        self.is_observed = False
        self._config = config
        self._block_size = block_size
        self._max_context_tokens = max_context_tokens
        self.block_names = BlockNames(cache_identity, block_size, pool.keep_cached)
        # Live sequences of each request. Those of index > 0 wait outside of `_waiting` until the first has computed
        # the prompt, and then take its blocks from the pool.
        self._requests: dict[str, list[Sequence]] = {}
        # In order of rank. Those whose adapter has no slot wait in its AdapterState alone.
        self._waiting: list[Sequence] = []
        # Sequences whose constraint is compiled, which they wait for outside of `_waiting`, and until when.
        self._compiling: dict[Sequence, tuple[Future[CompiledConstraint], float]] = {}
        # Sequences without row whose constraint must be compiled anew.
        self._worn: list[Sequence] = []
        self._rows: list[Sequence | None] = [None] * config.max_num_seqs
        # Oldest first.
        self._in_flight: deque[_Step] = deque()
        # Blocks are short, and no step is planned before those in flight are committed: they may end a sequence, and
        # whoever is preempted must have all its tokens.
        self._drains = False
        self._arrivals = itertools.count()
        # What is left of the current step's tokens.
        self._budget = 0
        self._events: list[Event] = []
        self._num_preemptions = 0
        self._num_steps = 0
        self._notes = StepNotes()

    # ------------------------------------------------------------------------------------- from outside

    @property
    def has_work(self) -> bool:
        """There is something to compute."""
        return bool(self._waiting or self._in_flight) or any(self._running())

    @property
    def is_awaiting(self) -> bool:
        """A request waits for its constraint or its adapter, or an adapter for its requests to end."""
        return bool(self._compiling) or (self.adapters is not None and self.adapters.is_awaiting)

    @property
    def has_news(self) -> bool:
        """Something has happened since the last report."""
        return bool(self._events)

    @property
    def num_in_flight(self) -> int:
        """Steps that are planned and not committed."""
        return len(self._in_flight)

    def add(
        self, request: Request, grammar: "Future[CompiledConstraint] | None" = None, compile_until_s: float = 0.0
    ) -> None:
        """Queue a request. Its prompt must leave room for a token in the context, if it wants one.

        grammar: of its constraint. It waits for it, while others pass, until time.monotonic() is compile_until_s.
        """
        assert 0 < len(request.prompt_token_ids) <= self._max_context_tokens - (request.params.max_tokens != 0)
        arrival = next(self._arrivals)
        sequences = [
            Sequence(
                request=request,
                index=index,
                rank=(-request.priority, arrival, index),
                token_ids=list(request.prompt_token_ids),
                block_hashes=list(request.block_hashes),
            )
            for index in range(request.params.n)
        ]
        self._requests[request.id] = sequences
        if request.adapter is not None:
            try:
                self._bind_adapter(request.adapter.name, sequences)
            except AdapterNotFound as error:
                self._fail(request.id, error)
                return
        if grammar is None:
            self._enqueue(sequences[0])
        else:
            self.await_grammar(sequences[0], grammar, compile_until_s)

    def _bind_adapter(self, name: str, sequences: list[Sequence]) -> None:
        if self.adapters is None:
            raise AdapterNotFound(name)
        self.adapters.add(name, sequences)

    def await_grammar(self, sequence: Sequence, grammar: "Future[CompiledConstraint]", until_s: float) -> None:
        """Queue the sequence, which has no row, when its grammar is there."""
        self._compiling[sequence] = grammar, until_s

    def take_worn(self) -> list[Sequence]:
        """Sequences whose grammar is of no use any more: each is to be given a new one."""
        worn, self._worn = self._worn, []
        return worn

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences that has begun to generate, without an event.

        What is not there is ignored: it may just have ended.
        """
        for sequence in list(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._remove(sequence)

    def reset_cache(self) -> int:
        """Forget every cached prefix. Returns how many blocks that freed."""
        freed_block_ids = self.pool.reset_cache()
        if self.is_observed:
            self._notes.cache_was_reset(freed_block_ids)
        return len(freed_block_ids)

    def stats(self) -> SchedulerStats:
        """Current counts."""
        num_live = sum(map(len, self._requests.values()))
        num_running = sum(1 for _ in self._running())
        return SchedulerStats(
            num_running=num_running,
            num_waiting=num_live - num_running,
            num_blocks=self.pool.num_blocks,
            num_owned_blocks=self.pool.num_owned,
            num_cached_blocks=self.pool.num_cached,
            block_size=self._block_size,
            num_preemptions=self._num_preemptions,
            adapters=None if self.adapters is None else self.adapters.counts(),
        )

    # --------------------------------------------------------------------------------------- schedule

    def schedule(self, now: float) -> StepPlan:
        """Choose the tokens of the next step: first of running sequences, then of waiting ones, by rank.

        An empty plan is no step: nothing can be computed before a step in flight is committed, if there is one.
        """
        self.keep_time(now)
        if self._drains and self._in_flight:
            return StepPlan([])
        self._drains = False
        self._budget = self._config.max_num_batched_tokens
        step: dict[Sequence, int] = {}
        batch_is_closed = self._config.batching == "static" and any(self._running())
        # Sequences that generate go first, so that a long prompt takes what they leave and never stalls them.
        for sequence in sorted(self._running(), key=lambda s: (s.gap > 1, s.rank)):
            # An earlier one of this loop may have taken its row.
            if sequence.row is not None and self._budget and self._can_go_on(sequence):
                self._schedule_running(sequence, step)
        wait_reason = WaitReason.BATCH if batch_is_closed else self._admit_waiting(step, now)
        step = dict(sorted(step.items(), key=lambda item: item[1]))
        plan = StepPlan([self._plan_sequence(s, count, self._reserve_drafts(s, count)) for s, count in step.items()])
        if self.is_observed and (step or not self._in_flight):
            self._notes.start_s = now
            self._note_wait(wait_reason, step)
        if step:
            self._in_flight.append(_Step(plan, list(step), self._notes))
            self._notes = StepNotes()
        return plan

    def _note_wait(self, reason: WaitReason, step: dict[Sequence, int]) -> None:
        """Note who waits, of those who are served first. reason: of those whom nothing but others keeps waiting."""
        heads = [(sequence, reason) for sequence in self._waiting[:1]]
        if self.adapters is not None and (sequence := self.adapters.residency.first_waiting()) is not None:
            heads.append((sequence, WaitReason.ADAPTER))
        if not heads and self._compiling:
            heads.append((min(self._compiling, key=lambda s: s.rank), WaitReason.CONSTRAINT))
        if heads:
            self._notes.waits(*min(heads, key=lambda head: head[0].rank), self._running(), step)

    def _can_go_on(self, sequence: Sequence) -> bool:
        """Whether there is something to compute that does not depend on what a step in flight will draw."""
        max_tokens = sequence.request.params.max_tokens
        will_end = sequence.num_unknown_tokens > 0 and (
            sequence.num_tokens >= self._max_context_tokens
            or (max_tokens is not None and sequence.num_completion_tokens >= max_tokens)
        )
        return sequence.gap > 0 and not will_end

    def _schedule_running(self, sequence: Sequence, step: dict[Sequence, int]) -> None:
        count = min(sequence.gap, self._budget)
        while not self._grow(sequence, count):
            if self._in_flight:
                self._drains = True
                return
            victim = max(self._running(), key=lambda s: s.rank)
            self._preempt(victim, sequence, step)
            if victim is sequence:
                return
        step[sequence] = count
        self._budget -= count

    def _admit_waiting(self, step: dict[Sequence, int], now: float) -> WaitReason:
        """Returns why the first of the rest of the queue, if any, waits."""
        # Passed over, because they would compute what this step computes anyway: in the next one they find it cached.
        # Others go first only as far as the rows and blocks of these are not touched.
        num_passed = num_kept_blocks = 0
        obstacle: WaitReason | None = None
        while num_passed < len(self._waiting) and self._budget:
            if num_passed and num_passed >= self._rows.count(None):
                break
            sequence = self._waiting[num_passed]
            if (obstacle := self._admit(sequence, step, num_kept_blocks)) is WaitReason.PREFIX:
                num_passed += 1
                num_kept_blocks += self._num_blocks_for(sequence.num_tokens)
                continue
            if obstacle is not None:
                # Only a higher priority, never an earlier arrival, takes a running sequence's place.
                victim = max(self._running(), key=lambda s: s.rank, default=None)
                if num_passed or victim is None or victim.rank[0] <= sequence.rank[0]:
                    break
                if self._in_flight:
                    self._drains = True
                    break
                self._preempt(victim, sequence, step)
                continue
            self._waiting.pop(num_passed)
            if self.adapters is not None and sequence.adapter is not None:
                self.adapters.residency.begin(sequence.adapter, sequence)
            if not sequence.has_started:
                self._start(sequence, now)
            self._schedule_running(sequence, step)
        return WaitReason.PREFIX if num_passed else obstacle or WaitReason.TOKENS

    def _start(self, sequence: Sequence, now: float) -> None:
        """It is the first of its request that runs."""
        sequence.has_started = True
        request = sequence.request
        relaxed = sequence.grammar.report.relaxed if sequence.grammar is not None else ()
        self._events.append(RequestStarted(request.id, now, sequence.num_computed_tokens, relaxed, request.adapter))

    def _admit(self, sequence: Sequence, step: dict[Sequence, int], num_kept_blocks: int) -> WaitReason | None:
        """Give a waiting sequence a row, and the blocks that the cache has of its tokens; or say what it waits for."""
        if None not in self._rows:
            return WaitReason.ROWS
        hashes = self._hashes_to_match(sequence)
        prefix = self.pool.find(hashes)
        if len(prefix) < len(hashes) and self._is_computed_by(step, hashes[len(prefix)], len(prefix)):
            return WaitReason.PREFIX
        self.pool.hold(prefix)
        # Admitted only if there is room for all its known tokens: else it would soon preempt, or be preempted.
        if self._num_blocks_for(sequence.num_tokens) - len(prefix) > self.pool.num_available - num_kept_blocks:
            self.pool.release(prefix)
            return WaitReason.BLOCKS
        sequence.block_ids = prefix
        sequence.num_computed_tokens = len(prefix) * self._block_size
        sequence.row = self._rows.index(None)
        self._rows[sequence.row] = sequence
        return None

    def _is_computed_by(self, step: dict[Sequence, int], block_hash: bytes, index: int) -> bool:
        """Whether a sequence of this step, or of one in flight, fills a block at this index that has this hash."""
        end = (index + 1) * self._block_size
        spans = [(s, s.num_computed_tokens, count) for s, count in step.items()]
        for flying in self._in_flight:
            parts = zip(flying.sequences, flying.plan.sequences, strict=True)
            spans += [(s, part.start, part.num_known) for s, part in parts if s.row is not None]
        return self._config.batching != "static" and any(
            start < end <= start + count and s.block_hashes[index : index + 1] == [block_hash]
            for s, start, count in spans
        )

    def _hashes_to_match(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks that may be read from the cache: never the last token, whose logits are needed."""
        request = sequence.request
        if sequence.index == 0:
            if request.skip_cache_read and not sequence.num_preemptions:
                return []
            if request.params.prompt_logprobs is not None and not sequence.num_completion_tokens:
                return []
        count = (sequence.num_tokens - 1) // self._block_size
        self.block_names.extend(sequence.block_hashes, request, sequence.token_ids, count)
        return sequence.block_hashes[:count]

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Own the blocks for `count` more tokens; False if the pool has too few."""
        missing = self._num_blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
        new_block_ids = self.pool.allocate(max(0, missing))
        if new_block_ids is None:
            return False
        sequence.block_ids.extend(new_block_ids)
        return True

    def _preempt(self, sequence: Sequence, beneficiary: Sequence, step: dict[Sequence, int]) -> None:
        """Take row and blocks away; the tokens stay, and are computed again when it is this sequence's turn."""
        self._budget += step.pop(sequence, 0)
        self._release(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        if self.is_observed:
            self._notes.preempted(sequence, beneficiary)
        self._enqueue(sequence)

    def _reserve_drafts(self, sequence: Sequence, count: int) -> int:
        """How many drafts the step has places for. They take what nobody else wants: no block that a running sequence
        could need in the next step, or that others wait for, and no place that the sequence could not use."""
        if not sequence.num_drafts or count < sequence.gap:
            return 0
        request = sequence.request
        left = self._max_context_tokens - sequence.num_tokens
        if request.params.max_tokens is not None:
            left = min(left, request.params.max_tokens - sequence.num_completion_tokens)
        # One of the new tokens is drawn behind the drafts.
        num_drafts = min(sequence.num_drafts, self._budget, left - 1)
        num_owned = len(sequence.block_ids) * self._block_size - sequence.num_computed_tokens - count
        num_spare = 0 if self._waiting else self.pool.num_available - sum(1 for _ in self._running())
        num_drafts = max(0, min(num_drafts, num_owned + max(0, num_spare) * self._block_size))
        grown = self._grow(sequence, count + num_drafts)
        assert grown
        self._budget -= num_drafts
        return num_drafts

    def _plan_sequence(self, sequence: Sequence, count: int, num_drafts: int) -> ScheduledSequence:
        request, start = sequence.request, sequence.num_computed_tokens
        admission = None
        if not sequence.num_told_blocks:
            admission = Admission(
                params=request.params,
                seed=((request.params.seed or 0) + sequence.index) % 2**64,
                token_ids=sequence.token_ids,
                num_prompt_tokens=len(request.prompt_token_ids),
                end_token_ids=request.eos_token_ids | request.params.stop_token_ids,
                owner=(request.cache_salt, request.adapter.revision if request.adapter is not None else ""),
                grammar=sequence.grammar,
                adapter_slot=sequence.adapter.slot if sequence.adapter is not None else None,
            )
        if self.adapters is not None and sequence.adapter is not None:
            self.adapters.residency.compute(sequence.adapter, self._num_steps + len(self._in_flight) + 1)
        num_prompt_logprobs = 0
        if request.params.prompt_logprobs is not None and sequence.index == 0:
            num_prompt_logprobs = max(0, min(count, len(request.prompt_token_ids) - 1 - start))
        assert sequence.row is not None
        num_told_blocks, sequence.num_told_blocks = sequence.num_told_blocks, len(sequence.block_ids)
        samples = count == sequence.gap
        sequence.num_computed_tokens += count + num_drafts
        sequence.num_unknown_tokens += samples
        return ScheduledSequence(
            row=sequence.row,
            start=start,
            num_known=count,
            new_block_ids=sequence.block_ids[num_told_blocks:],
            samples=samples,
            admission=admission,
            num_prompt_logprobs=num_prompt_logprobs,
            num_drafts=num_drafts,
        )

    def keep_time(self, now: float) -> None:
        """Do what no step is needed for: end what has run out of time, and queue what need not wait any more."""
        self._expire(now)
        self._enqueue_compiled(now)
        if self.adapters is not None:
            self._tend(self.adapters, now)

    def _tend(self, adapters: ServedAdapters, now: float) -> None:
        """Let adapters come and go, and queue those alone whose adapter is in a slot."""
        changes = adapters.settle(now)
        for sequence in changes.moved:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._enqueue(sequence)
        for request_id, reason in changes.failures:
            if request_id in self._requests:
                self._fail(request_id, reason)
        for state in adapters.advance(now, self._num_steps):
            if state.is_queued:
                for sequence in state.waiting:
                    bisect.insort(self._waiting, sequence, key=lambda s: s.rank)
            else:
                self._waiting = [sequence for sequence in self._waiting if sequence.adapter is not state]
        self._events += adapters.take_events()

    def _enqueue_compiled(self, now: float) -> None:
        """Let those wait with the others whose constraint is compiled, and turn away those whose is wrong."""
        for sequence, (grammar, until_s) in list(self._compiling.items()):
            request = sequence.request
            if grammar.done():
                del self._compiling[sequence]
                if (error := grammar.exception()) is not None:
                    self._fail(request.id, error if isinstance(error, Rejection) else Failure.STEP)
                    continue
                for each in self._requests[request.id]:
                    if each is sequence or each.grammar is None:
                        each.grammar = grammar.result()
                self._enqueue(sequence)
            elif now >= until_s:
                self._fail(request.id, waited_too_long())

    def _expire(self, now: float) -> None:
        for request_id, sequences in list(self._requests.items()):
            request = sequences[0].request
            if request.deadline_s is not None and now >= request.deadline_s:
                self._fail(request_id, Failure.DEADLINE)
            elif request.time_limit_s is not None and now >= request.time_limit_s:
                if not any(s.has_started for s in sequences):
                    self._events.append(RequestStarted(request_id, now, num_cached_tokens=0, adapter=request.adapter))
                for sequence in list(sequences):
                    self._events.append(sequence.output(now, SequenceResult(), FinishReason.TIME_LIMIT))
                    self._remove(sequence)

    # ----------------------------------------------------------------------------------------- commit

    def commit(self, result: StepResult, now: float, *, has_failed: bool = False) -> list[Event]:
        """Book the oldest step in flight. Returns all that happened since the last commit. has_failed: see `fail`."""
        step = self._in_flight.popleft()
        # What ends now belongs to this step; what was noted since it was planned, to the next one to be planned.
        later_notes, self._notes = self._notes, step.notes
        self._notes.num_threads = result.num_threads
        for sequence, scheduled, outcome in zip(step.sequences, step.plan.sequences, result.sequences, strict=True):
            # It may have been aborted; or a sibling failed, and took the whole request with it.
            output = None if sequence.row is None else self._commit_sequence(sequence, scheduled, outcome, now)
            if self.is_observed:
                self._notes.computed(sequence, scheduled, output, self._block_size)
        self._num_steps += 1
        events = self.settle(now, has_failed=has_failed)
        self._notes = later_notes
        return events

    def fail(self, now: float) -> list[Event]:
        """Give up the requests of the oldest step in flight, which raised."""
        outcomes = [SequenceResult(failure=Failure.STEP) for _ in self._in_flight[0].sequences]
        return self.commit(StepResult(outcomes), now, has_failed=True)

    def settle(self, now: float, *, has_failed: bool = False) -> list[Event]:
        """Report all that happened since the last report: at the end of a step, or when none follows."""
        events, self._events = self._events, []
        if self.is_observed:
            events.append(self._notes.record(self._num_steps, now, self.stats(), has_failed=has_failed))
            self._notes = StepNotes()
        return events

    def _commit_sequence(
        self, sequence: Sequence, scheduled: ScheduledSequence, outcome: SequenceResult, now: float
    ) -> SequenceOutput | None:
        """Returns what is told of it, if anything."""
        sequence.num_unknown_tokens -= scheduled.samples
        if outcome.failure is Failure.CONSTRAINT and sequence.num_completion_tokens > sequence.num_worn_tokens:
            # It may be that others have filled what it shares with them.
            sequence.num_worn_tokens = sequence.num_completion_tokens
            self._release(sequence)
            self._worn.append(sequence)
            return None
        if outcome.failure is not None:
            if outcome.failure is Failure.CORRUPT:
                self.pool.forget(sequence.block_ids)
            self._fail(sequence.request.id, outcome.failure)
            return None
        is_first_token = len(sequence.token_ids) == len(sequence.request.prompt_token_ids)
        if outcome.token_ids and sequence.index == 0 and is_first_token:
            # The prompt's blocks are computed: the siblings will find them.
            for sibling in self._requests[sequence.request.id]:
                if sibling is not sequence:
                    sibling.has_started = True
                    self._enqueue(sibling)
        assert len(outcome.token_ids) <= scheduled.num_drafts + 1
        kept, reason = sequence.append(outcome, self._max_context_tokens)
        sequence.satisfies = outcome.satisfies and kept == len(outcome.token_ids)
        # The last token that was drawn is still to be computed; those before it were drafts, and right.
        num_right = max(0, kept - 1)
        sequence.num_computed_tokens -= scheduled.num_drafts - num_right
        sequence.num_drafts = outcome.num_drafts_next
        self._register_full_blocks(sequence, scheduled.start, scheduled.start + scheduled.num_known + num_right)
        output = None
        if kept or reason or outcome.prompt_logprobs:
            output = sequence.output(now, outcome, reason, kept, scheduled.start)
            self._events.append(output)
        if reason:
            self._remove(sequence)
        return output

    def _register_full_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks findable that the tokens from start to end have filled."""
        num_full = end // self._block_size
        self.block_names.extend(sequence.block_hashes, sequence.request, sequence.token_ids, num_full)
        for i in range(start // self._block_size, num_full):
            self.pool.register(sequence.block_ids[i], sequence.block_hashes[i])

    # ------------------------------------------------------------------------------------------ parts

    def _running(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._rows if sequence is not None)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _enqueue(self, sequence: Sequence) -> None:
        if self.adapters is not None and (state := sequence.adapter) is not None:
            self.adapters.residency.wait(state, sequence)
            if not state.is_queued:
                return
        bisect.insort(self._waiting, sequence, key=lambda s: s.rank)

    def _fail(self, request_id: str, reason: Failure | Rejection) -> None:
        self._events.append(RequestFailed(request_id, reason))
        self.abort(request_id)

    def _remove(self, sequence: Sequence) -> None:
        """Forget a live sequence, wherever it is, and its request with the last one."""
        if sequence.row is not None:
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._worn:
            self._worn.remove(sequence)
        self._compiling.pop(sequence, None)
        if self.adapters is not None and sequence.adapter is not None:
            self.adapters.remove(sequence)
        siblings = self._requests[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.id]

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        freed_block_ids = self.pool.release(sequence.block_ids)
        if self.is_observed:
            last = (step.notes for step in reversed(self._in_flight) if sequence in step.sequences)
            next(last, self._notes).released(sequence, freed_block_ids)
        sequence.block_ids = []
        sequence.num_told_blocks = sequence.num_computed_tokens = 0
        sequence.num_drafts = sequence.num_unknown_tokens = 0
        self._rows[sequence.row] = None
        sequence.row = None
        if self.adapters is not None and sequence.adapter is not None:
            self.adapters.residency.end(sequence.adapter)

    def check_invariants(self) -> None:
        """Raise AssertionError if blocks, rows and sequences do not agree. For tests, between steps."""
        self.pool.check_invariants()
        live = [sequence for sequences in self._requests.values() for sequence in sequences]
        running = list(self._running())
        assert all(self._rows[s.row] is s for s in running if s.row is not None)
        assert {id(s) for s in running} | {id(s) for s in self._waiting} <= {id(s) for s in live}
        assert self._waiting == sorted(self._waiting, key=lambda s: s.rank)
        owned = {block_id for s in running for block_id in s.block_ids}
        assert len(owned) == self.pool.num_owned, "a block is owned by no sequence"
        for s in running:
            assert s.num_computed_tokens < s.num_tokens <= self._max_context_tokens or self._in_flight
            parts = [p for step in self._in_flight for p in zip(step.sequences, step.plan.sequences, strict=True)]
            assert s.num_unknown_tokens == sum(part.samples for owner, part in parts if owner is s)
            assert len(s.block_ids) >= self._num_blocks_for(s.num_computed_tokens)
        assert all(not s.block_ids and not s.num_computed_tokens for s in self._waiting)
