"""A span for each RPC, and for a generation what it did when:

    caller's span
    └─ nanoserve.v1.GenerationService/Generate   SERVER
       ├─ queue      the call's begin to its first step: checked, encoded, waiting
       ├─ prefill    to the first token; an event for each chunk of the prompt
       └─ decode     to the end of the call; events for preemptions, what was computed again, and guesses

The three tile their parent, so that their durations add up to its own. A request that ends early ends in the phase it
was in. They are made when the call is over, from times that were noted anyway, so a token costs nothing.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoserve.observability import conventions as names
from nanoserve.observer import CallRecord, Observer, RequestRecord, current_call

# Parameters that OpenTelemetry calls gen_ai.request.NAME, NAME being ours, and the value that is not told: it is off.
UNTOLD = {"temperature": None, "top_p": None, "top_k": 0, "frequency_penalty": 0, "presence_penalty": 0}


class Tracing(Observer):
    """Event loop thread."""

    def __init__(self, provider: TracerProvider, *, wants_content: bool = False) -> None:
        """wants_content: prompts and answers become attributes."""
        self.wants_content = wants_content
        self._tracer: Tracer = provider.get_tracer(names.NANOSERVE)
        self._propagator = TraceContextTextMapPropagator()
        # Of calls in progress, by number: the span, and what turns their monotonic times into Unix time.
        self._calls: dict[int, tuple[Span, int]] = {}
        self._model = ""

    def server_ready(self, model: str, after_s: float) -> None:  # noqa: ARG002
        self._model = model

    def call_started(self, call: CallRecord) -> None:
        carrier = {"traceparent": call.traceparent, "tracestate": call.tracestate}
        unix_offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            call.method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={names.RPC_SYSTEM: "grpc", names.RPC_METHOD: call.method},
            start_time=_ns(call.start_s, unix_offset_ns),
        )
        # So that log lines, and the other observers at the end, can name the trace.
        current_call.set(replace(call, trace_id=trace.format_trace_id(span.get_span_context().trace_id)))
        self._calls[call.number] = (span, unix_offset_ns)

    def call_ended(self, call: CallRecord) -> None:
        span, unix_offset_ns = self._calls.pop(call.number)
        if span.is_recording():
            span.set_attributes(dict(_call_attributes(call)))
            if call.code in names.SERVER_ERRORS:
                span.set_status(Status(StatusCode.ERROR, call.reason or None))
            if call.request is not None:
                span.set_attributes(dict(_request_attributes(call.request, self._model)))
                self._trace_phases(span, unix_offset_ns, call, call.request)
        span.end(_ns(call.end_s, unix_offset_ns))

    def _trace_phases(self, parent: Span, unix_offset_ns: int, call: CallRecord, request: RequestRecord) -> None:
        context = trace.set_span_in_context(parent)
        for phase, start_s, end_s in _phases(call, request):
            span = self._tracer.start_span(phase, context=context, start_time=_ns(start_s, unix_offset_ns))
            for time_s, event, attributes in _events(request):
                if start_s < time_s <= end_s:
                    span.add_event(event, attributes, _ns(time_s, unix_offset_ns))
            span.end(_ns(end_s, unix_offset_ns))


def _phases(call: CallRecord, request: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end)"""
    begins = [call.start_s, request.started_s, request.first_token_s]
    reached = [begin_s for begin_s in begins if begin_s is not None]
    # What a step reports after the call was cut off is later than the call's end.
    ends = [min(end_s, call.end_s) for end_s in [*reached[1:], call.end_s]]
    for name, begin_s, end_s in zip(("queue", "prefill", "decode"), reached, ends, strict=False):
        yield name, min(begin_s, call.end_s), end_s


def _events(request: RequestRecord) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """(time, name, attributes)"""
    for chunk in request.chunks:
        told = {"nanoserve.step": chunk.step, "nanoserve.sequence": chunk.index, "nanoserve.tokens": chunk.num_tokens}
        yield chunk.end_s, "chunk", told
    for time_s, preemption in request.preemptions:
        # The request that it made place for.
        for_whom = preemption.for_request_id
        yield time_s, "preemption", {"nanoserve.sequence": preemption.index, "nanoserve.preempted_for": for_whom}
    if request.last_token_s is not None:
        for source, totals in request.drafts.items():
            yield (
                request.last_token_s,
                "guesses",
                {
                    names.DRAFT_SOURCE: source.value,
                    "nanoserve.drafts": totals.num_drafts,
                    "nanoserve.draft_tokens": totals.num_tokens,
                    "nanoserve.accepted_draft_tokens": totals.num_accepted,
                },
            )
        # What follows is delivery.
        yield request.last_token_s, "last token", {"nanoserve.tokens": request.num_completion_tokens}


def _call_attributes(call: CallRecord) -> Iterator[tuple[str, str]]:
    yield names.RPC_STATUS, call.code
    yield "nanoserve.request.id", call.request_id
    if call.code != "OK":
        yield names.ERROR_TYPE, call.code
    if call.reason:
        yield names.ERROR_REASON, call.reason


def _request_attributes(request: RequestRecord, model: str) -> Iterator[tuple[str, Any]]:
    params = request.params
    yield from names.of_generation(request.adapter or model, is_chat=request.is_chat).items()
    yield "gen_ai.response.model", model
    for name, untold in UNTOLD.items():
        if (value := getattr(params, name)) != untold:
            yield f"gen_ai.request.{name}", value
    if request.priority:
        yield "nanoserve.request.priority", request.priority
    if params.n != 1:
        yield "gen_ai.request.choice.count", params.n
    if params.max_tokens is not None:
        yield "gen_ai.request.max_tokens", params.max_tokens
    if request.id:
        yield "gen_ai.response.id", request.id
        if params.seed is not None and params.seed < 2**63:  # OpenTelemetry has no larger integers
            yield "gen_ai.request.seed", params.seed
        yield "gen_ai.usage.input_tokens", request.num_prompt_tokens
        yield "gen_ai.usage.cache_read.input_tokens", request.num_cached_tokens
        yield "gen_ai.usage.output_tokens", request.num_completion_tokens
        yield names.PHASE, "waiting" if request.started_s is None else "running"
    if request.finish_reasons:
        yield "gen_ai.response.finish_reasons", [reason.value for _, reason in sorted(request.finish_reasons.items())]
    yield from _adapter_attributes(request)
    yield from _constraint_attributes(request)
    # Opt-in: they hold what callers wrote and read.
    if request.prompt is not None:
        yield "gen_ai.input.messages", json.dumps(_input_messages(request.prompt), ensure_ascii=False)
    if request.texts is not None:
        yield "gen_ai.output.messages", json.dumps(list(_output_messages(request)), ensure_ascii=False)


def _adapter_attributes(request: RequestRecord) -> Iterator[tuple[str, Any]]:
    if request.adapter:
        yield names.ADAPTER, request.adapter
    if request.adapter_revision:
        yield names.ADAPTER_REVISION, request.adapter_revision


def _constraint_attributes(request: RequestRecord) -> Iterator[tuple[str, Any]]:
    if request.constraint:
        yield names.CONSTRAINT, request.constraint
    if request.outcomes:
        yield names.CONSTRAINT_OUTCOME, list(request.outcomes)


def _input_messages(prompt: str | list[int] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [_message("user", prompt)]
    return [_message(each["role"], each.get("content") or "") for each in prompt if isinstance(each, Mapping)]


def _output_messages(request: RequestRecord) -> Iterator[dict[str, Any]]:
    for index, text in enumerate(request.texts or ()):
        reason = request.finish_reasons.get(index)
        yield _message("assistant", text) | {"finish_reason": reason.value if reason else "error"}


def _message(role: str, content: str | list[str]) -> dict[str, Any]:
    parts = [content] if isinstance(content, str) else content
    return {"role": role, "parts": [{"type": "text", "content": part} for part in parts]}


def _ns(monotonic_s: float, unix_offset_ns: int) -> int:
    return unix_offset_ns + round(monotonic_s * 1e9)
