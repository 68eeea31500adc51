"""The flight recorder keeps the last steps and requests of the engine, for whoever asks what happened.

    step_ended, request_ended, ... ──▶ rings of records ──▶ snapshot(): what runs now, and the last steps
       as they come, unread                            └──▶ explain():  one request's timeline

It is always on, so it keeps what comes as it is, and makes sense of it only when somebody asks. Its answers are in the
messages of the contract.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from nanoserve_client.v1 import admin_pb2

from nanoserve.flight_recorder.timeline import (
    WAIT_REASONS,
    WANTED,
    Absence,
    Memory,
    QueueSpan,
    timeline_of,
    timeline_of_refusal,
)
from nanoserve.observability.conventions import GENERATE
from nanoserve.observer import CallRecord, Observer, RequestRecord
from nanoserve.request import SamplingParams
from nanoserve.rpc.messages import duration
from nanoserve.step_record import Release, StepPart, StepRecord, Wait

MAX_STEPS = 512
# Of requests that ended, and also of calls that were refused before they became a request.
MAX_REQUESTS = 1024
# In a full queue there is about one span for each request, and few need more than a few.
MAX_QUEUE_SPANS = 8192
MAX_ABSENCES = 4096
# In a snapshot.
MAX_SEQUENCES = 512
MAX_STEPS_A_SNAPSHOT = 256
# In the first snapshot, whose reader has seen none.
NUM_FIRST_STEPS = 64
# Of requests with one label.
MAX_TIMELINES = 16


# (StepPart.request_id, StepPart.sequence_index).
SequenceKey = tuple[str, int]


class FlightRecorder(Observer):
    """Event loop thread. Its memory is bounded, but for requests that run or wait, which the engine bounds."""

    def __init__(self) -> None:
        self._kv = KvMap()
        self._steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        # Steps so far, those that the ring has lost too.
        self._num_steps = 0
        # By number, in order of arrival: what gives the record of a request that is not over.
        self._live: dict[int, Callable[[], RequestRecord]] = {}
        # By number: those that are over, and the status of the RPC that each came by, once it is known.
        self._ended: dict[int, tuple[RequestRecord, str]] = {}
        self._refused: deque[CallRecord] = deque(maxlen=MAX_REQUESTS)
        self._queue_spans: deque[QueueSpan] = deque(maxlen=MAX_QUEUE_SPANS)
        self._absences: deque[Absence] = deque(maxlen=MAX_ABSENCES)
        # Those that are not over.
        self._absent: dict[SequenceKey, Absence] = {}
        # By number of a request that is known, and sequence: tokens that were guessed, and those that were right.
        self._drafts: dict[int, dict[int, tuple[int, int]]] = {}
        # Of live sequences, as of the last snapshot, which had read so many steps.
        self._last_parts: dict[SequenceKey, StepPart] = {}
        self._num_read = 0

    # ------------------------------------------------------------------------------------------- what comes

    def request_arrived(self, now: Callable[[], RequestRecord]) -> None:
        number = now().number
        self._live[number], self._drafts[number] = now, {}

    def request_ended(self, request: RequestRecord) -> None:
        self._live.pop(request.number, None)
        # Without what was asked and answered, and what may be large: it may be kept for long.
        params = SamplingParams(n=request.params.n, max_tokens=request.params.max_tokens)
        self._ended[request.number] = (replace(request, params=params, prompt=None, texts=None), "")
        if len(self._ended) > MAX_REQUESTS:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self._drafts[oldest]
        for key in [key for key in self._absent if key[0] == request.id]:
            del self._absent[key]

    def call_ended(self, call: CallRecord) -> None:
        if call.request is None:
            if call.method == GENERATE:
                self._refused.append(call)
        elif (ended := self._ended.get(call.request.number)) is not None:
            self._ended[call.request.number] = (ended[0], call.code)

    def step_ended(self, step: StepRecord) -> None:
        self._kv.take(step)
        if step.parts or step.preemptions or step.has_failed:
            self._steps.append(step)
            self._num_steps += 1
        for part in step.parts:
            if part.num_drafted:
                self._note_draft(part)
        if step.wait is not None:
            self._note_wait(step, step.wait)
        for preemption in step.preemptions:
            absence = Absence(preemption, step.start_s)
            self._absences.append(absence)
            self._absent[preemption.request_id, preemption.index] = absence
        if self._absent:
            for part in step.parts:
                if (over := self._absent.pop((part.request_id, part.sequence_index), None)) is not None:
                    over.end_s = step.start_s

    def _note_draft(self, part: StepPart) -> None:
        # A request may have been aborted while the step ran, and be forgotten by now.
        if (drafts := self._drafts.get(_number(part.request_id))) is not None:
            num_drafted, num_accepted = drafts.get(part.sequence_index, (0, 0))
            drafts[part.sequence_index] = num_drafted + part.num_drafted, num_accepted + part.num_accepted

    def _note_wait(self, step: StepRecord, wait: Wait) -> None:
        last = self._queue_spans[-1] if self._queue_spans else None
        if last is not None and last.wait == wait and last.last_step + 1 >= step.number:
            last.end_s, last.last_step = step.end_s, step.number
        else:
            self._queue_spans.append(QueueSpan(wait, step.start_s, step.end_s, step.number))

    # ------------------------------------------------------------------------------------------- snapshots

    def snapshot(self, position: int | None) -> tuple[admin_pb2.WatchEngineResponse, int]:
        """As rpc/admin.py::Recorder says. The engine is told as of the last step."""
        first = max(0, self._num_steps - NUM_FIRST_STEPS) if position is None else position
        steps = self._last_steps(min(self._num_steps - first, MAX_STEPS_A_SNAPSHOT))
        self._read_parts()
        live = itertools.islice(self._live_sequences(), MAX_SEQUENCES)
        sequences = [*live, *self._ended_sequences(steps)]
        labels = {sequence.request_number: sequence.request_id for sequence in sequences}
        message = admin_pb2.WatchEngineResponse(
            sequences=sequences,
            cached_block_ids=self._kv.cached_block_ids(),
            steps=[_step(step, labels) for step in steps],
            lost_steps=0 if position is None else self._num_steps - first - len(steps),
        )
        return message, self._num_steps

    def _last_steps(self, count: int) -> list[StepRecord]:
        return list(self._steps)[max(0, len(self._steps) - count) :]

    def _read_parts(self) -> None:
        """Note the last part of each sequence of a live request, from the steps that came since the last time."""
        for step in self._last_steps(self._num_steps - self._num_read):
            for part in step.parts:
                self._last_parts[part.request_id, part.sequence_index] = part
        self._num_read = self._num_steps
        self._last_parts = {key: part for key, part in self._last_parts.items() if int(key[0]) in self._live}

    def _live_sequences(self) -> Iterator[admin_pb2.SequenceSnapshot]:
        """Of a request that runs or waits; oldest request first."""
        for now in self._live.values():
            request = now()
            for index in range(request.params.n):
                if phase := self._phase(request, index):
                    yield self._sequence(request, index, phase, self._last_parts.get((request.id, index)))

    def _phase(self, request: RequestRecord, index: int) -> admin_pb2.SequencePhase.ValueType:
        """UNSPECIFIED = it is over, or has not begun: the others of a request wait for the first one's prompt."""
        key = (request.id, index)
        has_blocks = key in self._kv.tables
        if index in request.finish_reasons:
            return admin_pb2.SEQUENCE_PHASE_ENDED if has_blocks else admin_pb2.SEQUENCE_PHASE_UNSPECIFIED
        if has_blocks:
            part = self._last_parts.get(key)
            generates = part is not None and part.num_new_tokens > 0
            return admin_pb2.SEQUENCE_PHASE_DECODE if generates else admin_pb2.SEQUENCE_PHASE_PREFILL
        if key in self._absent:
            return admin_pb2.SEQUENCE_PHASE_PREEMPTED
        waits = index == 0 or request.first_token_s is not None
        return admin_pb2.SEQUENCE_PHASE_WAITING if waits else admin_pb2.SEQUENCE_PHASE_UNSPECIFIED

    def _ended_sequences(self, steps: list[StepRecord]) -> Iterator[admin_pb2.SequenceSnapshot]:
        """Of requests that are over, and that are in these steps or hold blocks still."""
        parts: dict[SequenceKey, StepPart | None] = dict.fromkeys(self._kv.tables)
        for step in steps:
            for part in step.parts:
                parts[part.request_id, part.sequence_index] = part
        for (id, index), last in parts.items():
            if (ended := self._ended.get(int(id))) is not None:
                yield self._sequence(ended[0], index, admin_pb2.SEQUENCE_PHASE_ENDED, last)

    def _sequence(
        self, request: RequestRecord, index: int, phase: admin_pb2.SequencePhase.ValueType, last: StepPart | None
    ) -> admin_pb2.SequenceSnapshot:
        """last: the part of the last step that computed something of it."""
        num_known = last.start + last.num_tokens if last else 0
        num_new = last.num_new_tokens if last else 0
        # The last new token is still to be computed; those before it were guesses.
        num_computed = num_known + max(0, num_new - 1)
        num_drafted, num_accepted = self._drafts[request.number].get(index, (0, 0))
        has_no_blocks = phase in (admin_pb2.SEQUENCE_PHASE_WAITING, admin_pb2.SEQUENCE_PHASE_PREEMPTED)
        return admin_pb2.SequenceSnapshot(
            request_number=_number(request.id),
            request_id=request.label,
            index=index,
            phase=phase,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.num_cached_tokens,
            computed_tokens=0 if has_no_blocks else num_computed,
            completion_tokens=max(0, num_known + num_new - request.num_prompt_tokens),
            max_completion_tokens=request.params.max_tokens or 0,
            block_ids=self._kv.tables.get((request.id, index), ()),
            age=duration(time.monotonic() - request.arrival_s),
            preemptions=sum(preemption.index == index for _, preemption in request.preemptions),
            draft_tokens=num_drafted,
            accepted_draft_tokens=num_accepted,
            adapter=request.adapter,
        )

    def explain(self, request_id: str) -> list[admin_pb2.RequestTimeline]:
        """The timelines of all requests with this label, newest first; empty = none is known."""
        now_s = time.monotonic()
        known = [*self._ended.values(), *((now(), "") for now in self._live.values())]
        labels = {request.id: request.label for request, _ in known}
        memory = Memory(list(self._queue_spans), list(self._absences), labels)
        # A caller may give all its requests one label: no more of them are looked into than are told.
        asked = sorted((each for each in known if each[0].label == request_id), key=lambda each: each[0].arrival_s)
        refused = [call for call in self._refused if call.request_id == request_id]
        found = [(each[0].arrival_s, timeline_of(*each, memory, now_s)) for each in asked[-MAX_TIMELINES:]]
        found += [(call.start_s, timeline_of_refusal(call)) for call in refused[-MAX_TIMELINES:]]
        newest_first = sorted(found, key=lambda each: each[0], reverse=True)
        return [timeline for _, timeline in newest_first[:MAX_TIMELINES]]


class KvMap:
    """Which KV block is whose, from the records of steps: the block pool itself is in another process.

    Every block is free, cached, or owned: free + cached + owned = all. Event loop thread.
    """

    def __init__(self) -> None:
        # The block table of each sequence that owns blocks. A block may be in several.
        self.tables: dict[SequenceKey, list[int]] = {}
        # 1 for each block that is owned or cached. Empty until the first step, when all are free.
        self._is_used = bytearray()

    def take(self, step: StepRecord) -> None:
        """Bring the map to the end of this step, the next after the one before."""
        if not self._is_used:
            self._is_used = bytearray(step.num_free_blocks + step.num_cached_blocks + step.num_owned_blocks)
        self._take_back(step.early_releases)
        for part in step.parts:
            if part.new_block_ids:
                self.tables.setdefault((part.request_id, part.sequence_index), []).extend(part.new_block_ids)
                for block_id in part.new_block_ids:
                    self._is_used[block_id] = 1
        self._take_back(step.late_releases)

    def _take_back(self, releases: list[Release]) -> None:
        for release in releases:
            self.tables.pop((release.request_id, release.index), None)
            for block_id in release.freed_block_ids:
                self._is_used[block_id] = 0

    def cached_block_ids(self) -> list[int]:
        """Blocks that are kept for their prefix, and that nobody owns."""
        is_cached = bytearray(self._is_used)
        for table in self.tables.values():
            for block_id in table:
                is_cached[block_id] = 0
        return list(itertools.compress(range(len(is_cached)), is_cached))


def _step(step: StepRecord, labels: Mapping[int, str]) -> admin_pb2.StepSnapshot:
    """labels: the callers' ids, by the engine's number."""
    releases = (*step.early_releases, *step.late_releases)
    return admin_pb2.StepSnapshot(
        number=step.number,
        duration=duration(step.end_s - step.start_s),
        parts=[
            admin_pb2.StepPart(
                request_number=_number(part.request_id),
                index=part.sequence_index,
                start=part.start,
                tokens=part.num_tokens,
                prompt_tokens=part.num_prompt_tokens,
                sampled=part.num_new_tokens > 0,
                draft_tokens=part.num_drafted,
                accepted_draft_tokens=part.num_accepted,
            )
            for part in step.parts
        ],
        preemptions=[
            admin_pb2.StepPreemption(
                request_number=_number(each.request_id),
                index=each.index,
                for_request_number=_number(each.for_request_id),
            )
            for each in step.preemptions
        ],
        wait=None if step.wait is None else _wait(step.wait, labels),
        waiting=step.num_waiting,
        running=step.num_running,
        taken_blocks=sum(len(part.new_block_ids) for part in step.parts),
        freed_blocks=sum(len(release.freed_block_ids) for release in releases),
        failed=step.has_failed,
    )


def _wait(wait: Wait, labels: Mapping[int, str]) -> admin_pb2.QueueWait:
    behind_number = _number(wait.behind_request_id)
    behind = labels.get(behind_number) if behind_number else None
    return admin_pb2.QueueWait(
        request_number=_number(wait.request_id),
        index=wait.index,
        reason=WAIT_REASONS[wait.reason],
        behind_request_number=behind_number,
        text=WANTED[wait.reason] + (f" behind request {behind}" if behind else ""),
    )


def _number(engine_id: str) -> int:
    return int(engine_id or 0)
