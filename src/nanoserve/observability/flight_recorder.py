"""The flight recorder: the last steps and requests of the engine, for whoever asks what happened.

    step_ended, request_ended, ... ──▶ rings of records ──▶ snapshot(): what runs now, and the last steps
       as they come, unread                            └──▶ explain():  one request's timeline

It is always on, so it keeps what comes as it is, and makes sense of it only when somebody asks.
"""

import enum
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanoserve.observability.conventions import GENERATE
from nanoserve.observability.kv_map import KvMap, SequenceKey
from nanoserve.observability.timeline import (
    Absence,
    Memory,
    QueueSpan,
    Timeline,
    timeline_of,
    timeline_of_refusal,
)
from nanoserve.observer import CallRecord, Observer, RequestRecord
from nanoserve.request import SamplingParams
from nanoserve.step_record import StepPart, StepRecord, Wait

MAX_STEPS = 512
# Each of requests that ended, and of calls that were refused before they became one.
MAX_REQUESTS = 1024
# A request in a full queue has about one a request before it, and few need more than a few.
MAX_QUEUE_SPANS = 8192
MAX_ABSENCES = 4096
# In a snapshot.
MAX_SEQUENCES = 512
MAX_STEPS_A_SNAPSHOT = 256
# In the first snapshot, whose reader has seen none.
NUM_FIRST_STEPS = 64
# Of requests with one label.
MAX_TIMELINES = 16


class SequencePhase(enum.Enum):
    """What a sequence is doing."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A sequence as of the last step."""

    request: RequestRecord
    index: int
    phase: SequencePhase
    # With keys and values in the cache; of one that ended, when it last ran.
    num_computed_tokens: int
    num_completion_tokens: int
    # Not empty only if it holds blocks.
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine as of the last step, and what it did since an earlier snapshot."""

    time_s: float
    # Those that run or wait, oldest request first; then those that ended, and are in `steps` or hold blocks still.
    sequences: list[SequenceState]
    cached_block_ids: list[int]
    steps: list[StepRecord]
    num_lost_steps: int
    # For the next one.
    position: int


class FlightRecorder(Observer):
    """Event loop thread. Its memory is bounded, but for requests that run or wait, which the engine bounds."""

    def __init__(self) -> None:
        self._kv = KvMap()
        self._steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        # Steps so far, those that the ring has lost too.
        self._num_steps = 0
        # In order of arrival.
        self._live: dict[RequestRecord, None] = {}
        # Over, but for their RPC's status.
        self._ending: dict[RequestRecord, None] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=MAX_REQUESTS)
        self._refused: deque[CallRecord] = deque(maxlen=MAX_REQUESTS)
        self._queue_spans: deque[QueueSpan] = deque(maxlen=MAX_QUEUE_SPANS)
        self._absences: deque[Absence] = deque(maxlen=MAX_ABSENCES)
        # Those that are not over.
        self._absent: dict[SequenceKey, Absence] = {}
        # Of live sequences, as of the last snapshot, which had read so many steps.
        self._last_parts: dict[SequenceKey, StepPart] = {}
        self._num_read = 0

    # ------------------------------------------------------------------------------------------- what comes

    def request_arrived(self, request: RequestRecord) -> None:
        self._live[request] = None

    def request_ended(self, request: RequestRecord) -> None:
        self._live.pop(request, None)
        if request.call is None:
            self._ended.append(_trimmed(request))
        else:
            self._ending[request] = None
        for key in [key for key in self._absent if key[0] == request.id]:
            del self._absent[key]

    def call_ended(self, call: CallRecord) -> None:
        if call.request is not None:
            self._ending.pop(call.request, None)
            self._ended.append(_trimmed(call.request))
        elif call.method == GENERATE:
            self._refused.append(call)

    def step_ended(self, step: StepRecord) -> None:
        self._kv.take(step)
        if step.parts or step.preemptions or step.has_failed:
            self._steps.append(step)
            self._num_steps += 1
        if step.wait is not None:
            self._note_wait(step, step.wait)
        for preemption in step.preemptions:
            absence = Absence(preemption.request_id, preemption.index, preemption.for_request_id, step.start_s)
            self._absences.append(absence)
            self._absent[preemption.request_id, preemption.index] = absence
        if self._absent:
            for part in step.parts:
                if (over := self._absent.pop((part.request_id, part.sequence_index), None)) is not None:
                    over.end_s = step.start_s

    def _note_wait(self, step: StepRecord, wait: Wait) -> None:
        last = self._queue_spans[-1] if self._queue_spans else None
        if last is not None and last.wait == wait and last.last_step + 1 >= step.number:
            last.end_s, last.last_step = step.end_s, step.number
        else:
            self._queue_spans.append(QueueSpan(wait, step.start_s, step.end_s, step.number))

    # ------------------------------------------------------------------------------------------- what is asked

    def snapshot(self, position: int | None) -> Snapshot:
        """The engine now, and the steps since the snapshot with this position; None = there was none before."""
        first = max(0, self._num_steps - NUM_FIRST_STEPS) if position is None else position
        steps = self._last_steps(min(self._num_steps - first, MAX_STEPS_A_SNAPSHOT))
        lost = 0 if position is None else self._num_steps - first - len(steps)
        sequences = self._sequences(steps)
        return Snapshot(time.monotonic(), sequences, self._kv.cached_block_ids(), steps, lost, self._num_steps)

    def _last_steps(self, count: int) -> list[StepRecord]:
        return list(self._steps)[max(0, len(self._steps) - count) :]

    def _sequences(self, steps: list[StepRecord]) -> list[SequenceState]:
        self._read_parts()
        live = itertools.islice(self._live_sequences(), MAX_SEQUENCES)
        return [*live, *self._ended_sequences(steps)]

    def _live_sequences(self) -> Iterator[SequenceState]:
        for request in self._live:
            for index in range(request.params.n):
                if (phase := self._phase(request, index)) is not None:
                    yield self._state(request, index, phase, self._last_parts.get((request.id, index)))

    def _phase(self, request: RequestRecord, index: int) -> SequencePhase | None:
        """None = it is over, or has not begun: the others of a request wait for the first one's prompt."""
        key = (request.id, index)
        if key in self._kv.tables:
            if index in request.finish_reasons:
                return SequencePhase.ENDED
            part = self._last_parts.get(key)
            return SequencePhase.DECODE if part is not None and part.samples else SequencePhase.PREFILL
        if index in request.finish_reasons:
            return None
        if key in self._absent:
            return SequencePhase.PREEMPTED
        return SequencePhase.WAITING if index == 0 or request.first_token_s is not None else None

    def _state(self, request: RequestRecord, index: int, phase: SequencePhase, last: StepPart | None) -> SequenceState:
        num_computed = last.start + last.num_tokens if last else 0
        num_tokens = num_computed + last.samples if last else 0
        return SequenceState(
            request,
            index,
            phase,
            num_computed_tokens=0 if phase in (SequencePhase.WAITING, SequencePhase.PREEMPTED) else num_computed,
            num_completion_tokens=max(0, num_tokens - request.num_prompt_tokens),
            block_ids=list(self._kv.tables.get((request.id, index), ())),
        )

    def _ended_sequences(self, steps: list[StepRecord]) -> Iterator[SequenceState]:
        live = {request.id for request in self._live}
        ended = {request.id: request for request in (*self._ended, *self._ending)}
        parts: dict[SequenceKey, StepPart | None] = dict.fromkeys(self._kv.tables)
        for step in steps:
            for part in step.parts:
                parts[part.request_id, part.sequence_index] = part
        for (id, index), last in parts.items():
            if id not in live and (request := ended.get(id)) is not None:
                yield self._state(request, index, SequencePhase.ENDED, last)

    def _read_parts(self) -> None:
        """Note the last part of each sequence of a live request, from the steps that came since the last time."""
        for step in self._last_steps(self._num_steps - self._num_read):
            for part in step.parts:
                self._last_parts[part.request_id, part.sequence_index] = part
        self._num_read = self._num_steps
        live = {request.id for request in self._live}
        self._last_parts = {key: part for key, part in self._last_parts.items() if key[0] in live}

    def explain(self, label: str) -> list[Timeline]:
        """The timelines of all requests that bear the label, newest first; empty = none is known."""
        now = time.monotonic()
        known = [*self._ended, *self._ending, *self._live]
        labels = {request.id: request.label for request in known}
        memory = Memory(list(self._queue_spans), list(self._absences), labels)
        # A caller may give all its requests one label: no more of them are looked into than are told.
        asked = sorted((request for request in known if request.label == label), key=lambda request: request.arrival_s)
        refused = [call for call in self._refused if call.request_id == label]
        timelines = [timeline_of(request, memory, now) for request in asked[-MAX_TIMELINES:]]
        timelines += map(timeline_of_refusal, refused[-MAX_TIMELINES:])
        return sorted(timelines, key=lambda timeline: timeline.arrival_s, reverse=True)[:MAX_TIMELINES]


def _trimmed(request: RequestRecord) -> RequestRecord:
    """A copy that may be kept for long: without what was asked and answered, and what may be large."""
    call = None if request.call is None else replace(request.call, request=None)
    params = SamplingParams(n=request.params.n, max_tokens=request.params.max_tokens)
    return replace(request, call=call, params=params, prompt=None, texts=None)
