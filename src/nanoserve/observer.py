"""What observers are told of each RPC, request and step: frozen records, at no cost per token.

    rpc    ── call_started, call_ended ──────────────────────▶ ┌───────────┐ ──▶ Observer   traces, metrics, logs, ...
    engine ── request_arrived, request_posted, request_ended ─▶ │ Observers │ ──▶ Observer
    engine ── step_ended (a StepRecord) ─────────────────────▶ └───────────┘ ──▶ ...

The engine and the RPCs keep their own state and make records of it; nothing that they do depends on a record. All times
are time.monotonic(), and everything here runs on the event loop.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from nanoserve.errors import RequestError
from nanoserve.request import DraftSource, DraftTotals, FinishReason, SamplingParams
from nanoserve.step_record import Preemption, StepRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a prompt, or of a preempted sequence, that one step computed."""

    # StepRecord.number.
    step: int
    start_s: float
    end_s: float
    index: int
    # Position of the first token.
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request's way through the engine, up to now or to its end."""

    # The caller's name for it. Not unique.
    label: str
    arrival_s: float
    # The engine's own number for it, unique.
    number: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    # The prompt is a conversation, not a text.
    is_chat: bool = False

    # Known when the prompt is encoded.

    # The number as StepRecord has it. Empty = the prompt is not encoded yet, or the request was refused before.
    id: str = ""
    num_prompt_tokens: int = 0

    # Known as it runs.

    # When it was first scheduled. None = it never was.
    started_s: float | None = None
    # Prompt tokens from the prefix cache.
    num_cached_tokens: int = 0
    # The steps that computed its prompt, and those that computed again what a preemption threw away.
    chunks: tuple[Chunk, ...] = ()
    # (time, what happened); the time is StepRecord.end_s of its step.
    preemptions: tuple[tuple[float, Preemption], ...] = ()
    first_token_s: float | None = None
    last_token_s: float | None = None
    # Of all its sequences.
    num_completion_tokens: int = 0
    # Of the sequences that have come to their end.
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    num_preemptions: int = 0
    # Only sources that guessed.
    drafts: Mapping[DraftSource, DraftTotals] = field(default_factory=dict)
    # What its output must be, such as "json_schema". Empty = anything.
    constraint: str = ""
    # Name of what it is computed with besides the model. Empty = nothing.
    adapter: str = ""
    # Of the adapter, once it runs.
    adapter_revision: str = ""
    # Whether its sequences are that, such as "satisfied", once all have come to their end.
    outcomes: tuple[str, ...] = ()

    # Known at the end.

    end_s: float | None = None
    # Why it failed. None = it did not fail, or its caller stopped waiting for it.
    error: RequestError | None = None

    # Set only if an observer wants content.

    # A text, token ids, or the messages of a conversation.
    prompt: str | list[int] | list[dict[str, Any]] | None = None
    # What each sequence generated.
    texts: tuple[str, ...] | None = None

    @property
    def is_abandoned(self) -> bool:
        """Its caller went away, or its deadline passed, before the engine was done with it."""
        return self.error is None and len(self.finish_reasons) < self.params.n


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One RPC, also one that is refused before it reaches its service."""

    # Such as "nanoserve.v1.GenerationService/Generate".
    method: str
    # The caller's x-request-id, or what the server told the caller; empty if neither spoke of one. Not unique.
    request_id: str
    start_s: float
    # Counts from 1, since the start.
    number: int = 0
    # W3C trace context of the caller; empty = none.
    traceparent: str = ""
    tracestate: str = ""
    # Of the trace that it is part of, 32 hexadecimal digits; empty = none.
    trace_id: str = ""
    # What the engine was asked to generate, as of its end. None = nothing, or it has not ended.
    request: RequestRecord | None = None

    # Known at the end.

    # The status as gRPC names it, such as "DEADLINE_EXCEEDED".
    code: str = ""
    # ErrorInfo.reason of a refusal or failure, such as "OVERLOADED". Empty if it went well.
    reason: str = ""
    end_s: float = 0.0


class Observer:
    """Who watches: derive from it, and write the methods that are needed. Each is called on the event loop and returns
    at once.

    Steps are told from the engine's start on, so an observer is there before.
    """

    # Requests keep what was asked and answered until they end.
    wants_content: bool = False

    def server_ready(self, model: str, after_s: float) -> None:
        """Requests are served; `after_s` since the process began to start."""

    def call_started(self, call: CallRecord) -> None:
        """An RPC has come in."""

    def call_ended(self, call: CallRecord) -> None:
        """It has its status; its caller may still read."""

    def request_arrived(self, now: Callable[[], RequestRecord]) -> None:
        """The engine was asked for a request; its prompt is not encoded yet. `now` gives its record at any time."""

    def request_ended(self, request: RequestRecord) -> None:
        """It is over, however it ended. Of a request that came by an RPC this is told before `call_ended`."""

    def step_ended(self, step: StepRecord) -> None:
        """A step is over; the records of its requests say already what it did."""


# The RPC that this task serves, as far as it has come. Log lines take their ids from it.
current_call: ContextVar[CallRecord | None] = ContextVar("current_call", default=None)


@dataclass(slots=True)
class _History:
    """What steps did for one request. It becomes part of its record."""

    chunks: list[Chunk] = field(default_factory=list)
    preemptions: list[tuple[float, Preemption]] = field(default_factory=list)


class Observers:
    """All observers of one server. It also adds to the record of a request what steps did for it.

    An observer that raises is logged, and serving goes on. Event loop thread.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.wants_content = any(observer.wants_content for observer in observers)
        # Of requests that run, by id.
        self._histories: dict[str, _History] = {}

    @property
    def is_empty(self) -> bool:
        """Nobody watches."""
        return not self._observers

    def server_ready(self, model: str, after_s: float) -> None:
        self._tell(lambda observer: observer.server_ready(model, after_s))

    def call_started(self, call: CallRecord) -> None:
        """This task serves the RPC; what its requests tell is part of it."""
        current_call.set(call)
        self._tell(lambda observer: observer.call_started(call))

    def call_ended(self, *, code: str, reason: str = "", request_id: str = "") -> None:
        """The RPC of this task has its status. request_id: empty = what was known before holds."""
        begun = current_call.get()
        assert begun is not None
        request_id = request_id or begun.request_id
        call = replace(begun, code=code, reason=reason, request_id=request_id, end_s=time.monotonic())
        current_call.set(call)
        self._tell(lambda observer: observer.call_ended(call))

    def request_arrived(self, now: Callable[[], RequestRecord]) -> None:
        """now: the engine's own part of the record; steps give the rest."""
        if (call := current_call.get()) is not None:
            current_call.set(replace(call, request_id=now().label))
        self._tell(lambda observer: observer.request_arrived(lambda: self._with_history(now())))

    def request_posted(self, request_id: str) -> None:
        """The engine has given it this id, and steps may speak of it. No observer is told."""
        self._histories[request_id] = _History()

    def request_ended(self, request: RequestRecord) -> None:
        request = self._with_history(request)
        self._histories.pop(request.id, None)
        if (call := current_call.get()) is not None:
            current_call.set(replace(call, request=request))
        self._tell(lambda observer: observer.request_ended(request))

    def step_ended(self, step: StepRecord) -> None:
        # What has no history was aborted while the step ran.
        for part in step.parts:
            # What a step does for a sequence that just generates is no chunk.
            is_chunk = part.num_tokens > 1 or part.num_prompt_tokens > 0
            if is_chunk and (history := self._histories.get(part.request_id)) is not None:
                when = (step.number, step.start_s, step.end_s)
                history.chunks.append(Chunk(*when, part.sequence_index, part.start, part.num_tokens))
        for preemption in step.preemptions:
            if (history := self._histories.get(preemption.request_id)) is not None:
                history.preemptions.append((step.end_s, preemption))
        self._tell(lambda observer: observer.step_ended(step))

    def _with_history(self, request: RequestRecord) -> RequestRecord:
        history = self._histories.get(request.id)
        if history is None:
            return request
        return replace(request, chunks=tuple(history.chunks), preemptions=tuple(history.preemptions))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                what(observer)
            except Exception:
                logger.exception("%s failed", type(observer).__name__)
