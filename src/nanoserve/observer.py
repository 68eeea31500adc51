"""What those who watch the server are told: of each RPC, request and step, in plain records, with no cost per token.

    rpc    ── call_started, call_ended ────────▶ ┌───────────┐ ──▶ Observer   traces, metrics, logs, ...
    engine ── request_arrived, request_ended ──▶ │ Observers │ ──▶ Observer
    engine ── step_ended (a StepRecord) ───────▶ └───────────┘ ──▶ ...

A record is made when its subject begins, filled in as things happen, and complete when its end is told. All times are
time.monotonic(), and all is on the event loop.
"""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from nanoserve.request import FinishReason, RequestError, SamplingParams
from nanoserve.step_record import Preemption, StepPart, StepRecord

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class CallRecord:
    """One RPC, also one that is refused before it reaches its service."""

    # Such as "nanoserve.v1.GenerationService/Generate".
    method: str
    # The caller's x-request-id, or what the server told the caller; empty if neither spoke of one. Not unique.
    request_id: str
    start_s: float
    # W3C trace context of the caller; empty = none.
    traceparent: str = ""
    tracestate: str = ""
    # Of the trace that it is part of, 32 hexadecimal digits; empty = none.
    trace_id: str = ""
    # What the engine was asked to generate; None = nothing.
    request: "RequestRecord | None" = None
    # The status as gRPC names it, such as "DEADLINE_EXCEEDED". Set at the end, as are the next two.
    code: str = ""
    # ErrorInfo.reason of a refusal or failure, such as "OVERLOADED". Empty if it went well.
    reason: str = ""
    end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a prompt, or of a preempted sequence, that one step computed."""

    # StepRecord.number.
    step: int
    start_s: float
    end_s: float
    index: int
    # Position of the first.
    start: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request's way through the engine."""

    # The caller's name for it. Not unique.
    label: str
    arrival_s: float
    # The RPC that it came by.
    call: CallRecord | None = None

    # Set when the prompt is encoded.

    # The engine's own, unique, as in StepRecord. Empty = refused before.
    id: str = ""
    num_prompt_tokens: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    # The prompt is a conversation, not a text.
    is_chat: bool = False

    # Set as it runs.

    # When it was first scheduled. None = it never was.
    started_s: float | None = None
    # Prompt tokens from the prefix cache.
    num_cached_tokens: int = 0
    # What computed its prompt, and what was computed again after a preemption.
    chunks: list[Chunk] = field(default_factory=list)
    # (time, what happened): StepRecord.end_s of its step.
    preemptions: list[tuple[float, Preemption]] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    # Of all its sequences.
    num_completion_tokens: int = 0
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    # Of the sequences that have come to their end.
    num_preemptions: int = 0

    # Set at the end.

    end_s: float | None = None
    # Why it failed. None = it did not, or nobody waits for it any more.
    error: RequestError | None = None

    # Set if an observer wants content.

    # A text, token ids, or the messages of a conversation.
    prompt: str | list[int] | list[dict[str, Any]] | None = None
    # What was generated, by sequence.
    texts: dict[int, str] | None = None

    @property
    def is_abandoned(self) -> bool:
        """Its caller went away, or its deadline passed, before the engine was done with it."""
        return self.error is None and len(self.finish_reasons) < self.params.n


class Observer:
    """Who watches: derive from it, and write the methods that are needed. Each is called on the event loop and returns
    at once.

    What is told of an engine begins with its start, so whoever watches is there before.
    """

    # Steps are recorded, so that `step_ended` is told, and requests have chunks and preemptions.
    wants_steps: bool = True
    # Requests keep what was asked and answered until they end.
    wants_content: bool = False

    def server_ready(self, model: str, after_s: float) -> None:
        """Requests are served; `after_s` since the process began to start."""

    def call_started(self, call: CallRecord) -> None:
        """An RPC has come in."""

    def call_ended(self, call: CallRecord) -> None:
        """It has its status; its caller may still read."""

    def request_arrived(self, request: RequestRecord) -> None:
        """The engine was asked for it; its prompt is not encoded yet."""

    def request_ended(self, request: RequestRecord) -> None:
        """It is over, however it ended. Of a request that came by an RPC this is told before `call_ended`."""

    def step_ended(self, step: StepRecord) -> None:
        """A step is over; the records of its requests say already what it did."""


# The RPC that this task serves.
current_call: ContextVar[CallRecord | None] = ContextVar("current_call", default=None)


class Observers(Observer):
    """All who watch one server, as one. It also sorts what a step did into the records of its requests.

    An observer that raises is logged, and serving goes on. Event loop thread.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)
        self.wants_steps = any(observer.wants_steps for observer in observers)
        self.wants_content = any(observer.wants_content for observer in observers)
        # By id: requests that run.
        self._requests: dict[str, RequestRecord] = {}

    @property
    def is_empty(self) -> bool:
        """Nobody watches."""
        return not self._observers

    def server_ready(self, model: str, after_s: float) -> None:
        self._tell(lambda observer: observer.server_ready(model, after_s))

    def call_started(self, call: CallRecord) -> None:
        current_call.set(call)
        self._tell(lambda observer: observer.call_started(call))

    def call_ended(self, call: CallRecord) -> None:
        self._tell(lambda observer: observer.call_ended(call))

    def request_arrived(self, request: RequestRecord) -> None:
        if (call := current_call.get()) is not None:
            request.call, call.request, call.request_id = call, request, request.label
        self._tell(lambda observer: observer.request_arrived(request))

    def request_posted(self, request: RequestRecord) -> None:
        """The engine has given it an id, and steps may speak of it. No observer is told."""
        self._requests[request.id] = request

    def request_ended(self, request: RequestRecord) -> None:
        self._requests.pop(request.id, None)
        self._tell(lambda observer: observer.request_ended(request))

    def step_ended(self, step: StepRecord) -> None:
        for part in step.parts:
            # What a step does for a sequence that just generates is no chunk.
            if part.num_tokens > 1 or part.num_prompt_tokens:
                self._note_chunk(step, part)
        for preemption in step.preemptions:
            if (request := self._requests.get(preemption.request_id)) is not None:
                request.preemptions.append((step.end_s, preemption))
        self._tell(lambda observer: observer.step_ended(step))

    def _note_chunk(self, step: StepRecord, part: StepPart) -> None:
        # What is not there was aborted while the step ran.
        if (request := self._requests.get(part.request_id)) is not None:
            chunk = Chunk(step.number, step.start_s, step.end_s, part.sequence_index, part.start, part.num_tokens)
            request.chunks.append(chunk)

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                what(observer)
            except Exception:
                logger.exception("%s failed", type(observer).__name__)
