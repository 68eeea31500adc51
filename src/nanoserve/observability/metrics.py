"""Counters, gauges and histograms, through OpenTelemetry: the same instruments reach Prometheus and an OTLP collector.

No label takes a value that a caller chooses, so their number is bounded: of adapters, which operators name, only the
first so many have one of their own. docs/observability.md has a table of them.
"""

import time
from collections import Counter
from collections.abc import Iterable
from functools import partial

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from nanoserve.errors import Rejection
from nanoserve.observability import conventions as names
from nanoserve.observer import CallRecord, Observer, RequestRecord
from nanoserve.request import DraftSource, DraftTotals
from nanoserve.step_record import AdapterCounts, StepRecord

# Adapters that get a label of their own, in order of their first requests; all later ones share OTHER.
MAX_ADAPTERS = 100
# OpenTelemetry's word.
OTHER = "_OTHER"
# What turns a call away.
REJECTIONS = frozenset(kind.reason for kind in Rejection.__subclasses__())
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# With a point, which the values of Prometheus' label `le` must have.
STEP_TOKEN_BUCKETS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)


# Name, unit, buckets, description.
HISTOGRAMS = (
    ("rpc.server.call.duration", "s", names.RPC_BUCKETS, "Time from an RPC's begin to its status."),
    ("gen_ai.server.request.duration", "s", names.REQUEST_BUCKETS, "Time from a request's begin to its end."),
    (
        "gen_ai.server.time_to_first_token",
        "s",
        names.FIRST_TOKEN_BUCKETS,
        "Time from a request's begin to its first token, of requests that went well.",
    ),
    (
        "gen_ai.server.time_per_output_token",
        "s",
        names.OUTPUT_TOKEN_BUCKETS,
        "Time per token after the first, of requests that went well.",
    ),
    ("nanoserve.queue.wait", "s", QUEUE_BUCKETS, "Time from a request's begin to its first step."),
    ("nanoserve.step.duration", "s", STEP_BUCKETS, "Time that a step took."),
    (
        "nanoserve.step.tokens",
        "{token}",
        STEP_TOKEN_BUCKETS,
        "Tokens that a step computed, by their kind; guesses are not among them.",
    ),
)
# Name, unit, description.
COUNTERS = (
    ("nanoserve.prompt.tokens", "{token}", "Prompt tokens of requests that began to run."),
    ("nanoserve.prompt.cached_tokens", "{token}", "Those of them that the prefix cache had."),
    ("nanoserve.completion.tokens", "{token}", "Tokens that were generated for callers."),
    ("nanoserve.adapter.completion_tokens", "{token}", "Those of them that an adapter had a part in, by adapter."),
    ("nanoserve.adapter.loads", "{load}", "Times that the weights of an adapter were read."),
    ("nanoserve.adapter.evictions", "{eviction}", "Times that an adapter lost its slot to another."),
    ("nanoserve.spec_decode.num_drafts", "{draft}", "Drafts that were checked: each guesses one or several tokens."),
    ("nanoserve.spec_decode.num_draft_tokens", "{token}", "Tokens of these drafts."),
    ("nanoserve.spec_decode.num_accepted_tokens", "{token}", "Those of them that were right."),
    ("nanoserve.spec_decode.num_accepted_tokens_per_pos", "{token}", "The same, by their place in the draft, from 0."),
    ("nanoserve.preemptions", "{preemption}", "Times that a sequence lost its blocks to another."),
    ("nanoserve.calls.rejected", "{call}", "RPCs that were turned away, by reason."),
    ("nanoserve.requests.cancelled", "{request}", "Requests that their caller, or an operator, ended."),
    ("nanoserve.requests.deadline_missed", "{request}", "Requests whose deadline passed, by what they did then."),
    ("nanoserve.sequences.finished", "{sequence}", "Sequences that came to their end, by reason."),
    ("nanoserve.sequences.constrained", "{sequence}", "Those of them that had a constraint, by what became of it."),
)
THREADS = "CPU threads that computed the last step: fewer than usual while other processes want the CPUs."


class Metrics(Observer):
    """Event loop thread, but for the gauges, which any thread may read: they show the last step's record."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter(names.NANOSERVE)
        self._model = ""
        self._startup_s: float | None = None
        self._last_step: StepRecord | None = None
        self._num_threads: int | None = None
        # Those that have a label of their own.
        self._adapters: set[str] = set()
        # Sequences by the label of their adapter and what they do; and what AdapterCounts said last.
        self._adapter_sequences: Counter[tuple[str, str]] = Counter()
        self._adapter_counts: AdapterCounts | None = None
        self._adapter_counts_s = 0.0
        self._histograms = {
            name: meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=buckets)
            for name, unit, buckets, description in HISTOGRAMS
        }
        self._counters = {name: meter.create_counter(name, unit, what) for name, unit, what in COUNTERS}
        for name, unit, description in (
            ("nanoserve.queue.length", "{sequence}", "Sequences that wait for a step."),
            ("nanoserve.sequences.running", "{sequence}", "Sequences that hold KV blocks."),
            ("nanoserve.kv.blocks", "{block}", "Blocks of the KV cache, by state."),
            ("nanoserve.adapter.sequences", "{sequence}", "Sequences of each adapter, by what they do."),
            ("nanoserve.lora_requests_info", "", "When it was last so that these adapters ran and waited."),
            ("nanoserve.step.threads", "{thread}", THREADS),
            ("nanoserve.startup.duration", "s", "Time from the begin of the start to ready."),
        ):
            meter.create_observable_gauge(name, [partial(self._observe, name)], unit, description)

    def _observe(self, name: str, _options: CallbackOptions) -> Iterable[Observation]:
        """What a gauge shows; nothing before it is known."""
        step = self._last_step
        match name:
            case "nanoserve.startup.duration" if self._startup_s is not None:
                return [Observation(self._startup_s)]
            case "nanoserve.step.threads" if self._num_threads is not None:
                return [Observation(self._num_threads)]
            case "nanoserve.queue.length" if step is not None:
                return [Observation(step.num_waiting)]
            case "nanoserve.sequences.running" if step is not None:
                return [Observation(step.num_running)]
            case "nanoserve.kv.blocks" if step is not None:
                counts = (step.num_free_blocks, step.num_cached_blocks, step.num_owned_blocks)
                states = zip(("free", "cached", "owned"), counts, strict=True)
                return [Observation(count, {"nanoserve.kv.block.state": state}) for state, count in states]
            case "nanoserve.adapter.sequences":
                return [
                    Observation(count, {names.ADAPTER: adapter, names.PHASE: phase})
                    for (adapter, phase), count in self._adapter_sequences.items()
                ]
            case "nanoserve.lora_requests_info" if self._adapter_counts is not None:
                return [Observation(self._adapter_counts_s, _lora_requests_info(self._adapter_counts))]
        return []

    # ---------------------------------------------------------------------------------------- what happens

    def server_ready(self, model: str, after_s: float) -> None:
        self._model, self._startup_s = model, after_s

    def step_ended(self, step: StepRecord) -> None:
        self._last_step = step
        self._num_threads = step.num_threads or self._num_threads
        if step.parts:
            self._histograms["nanoserve.step.duration"].record(step.end_s - step.start_s)
            tokens = self._histograms["nanoserve.step.tokens"]
            tokens.record(step.num_prompt_tokens, {"gen_ai.token.type": "input"})
            tokens.record(step.num_completion_tokens, {"gen_ai.token.type": "output"})
        if step.adapters is not None:
            self._adapters_changed(step.adapters)
        if step.preemptions:
            self._counters["nanoserve.preemptions"].add(len(step.preemptions))

    def _adapters_changed(self, counts: AdapterCounts) -> None:
        before = self._adapter_counts
        self._adapter_counts, self._adapter_counts_s = counts, time.time()
        if before is None or counts.num_loads > before.num_loads:
            self._counters["nanoserve.adapter.loads"].add(counts.num_loads - (before.num_loads if before else 0))
        if before is None or counts.num_evictions > before.num_evictions:
            num_before = before.num_evictions if before else 0
            self._counters["nanoserve.adapter.evictions"].add(counts.num_evictions - num_before)
        # What had sequences and has none any more is 0, and not gone.
        sequences: Counter[tuple[str, str]] = Counter(dict.fromkeys(self._adapter_sequences, 0))
        for use in counts.uses:
            label = self._adapter_label(use.name, is_served=True)
            sequences[label, "running"] += use.num_running
            sequences[label, "waiting"] += use.num_waiting
        self._adapter_sequences = sequences

    def request_ended(self, request: RequestRecord) -> None:
        if request.started_s is not None:
            self._histograms["nanoserve.queue.wait"].record(request.started_s - request.arrival_s)
            self._counters["nanoserve.prompt.tokens"].add(request.num_prompt_tokens)
            self._counters["nanoserve.prompt.cached_tokens"].add(request.num_cached_tokens)
            self._counters["nanoserve.completion.tokens"].add(request.num_completion_tokens)
            if request.adapter:
                attributes = {names.ADAPTER: self._adapter_label(request.adapter, is_served=True)}
                self._counters["nanoserve.adapter.completion_tokens"].add(request.num_completion_tokens, attributes)
        for source, totals in request.drafts.items():
            self._count_drafts(source, totals)
        for reason in request.finish_reasons.values():
            self._counters["nanoserve.sequences.finished"].add(1, {"nanoserve.finish_reason": reason.value})
        for outcome in request.outcomes:
            attributes = {names.CONSTRAINT: request.constraint, names.CONSTRAINT_OUTCOME: outcome}
            self._counters["nanoserve.sequences.constrained"].add(1, attributes)

    def _adapter_label(self, name: str, *, is_served: bool) -> str:
        """is_served: else a caller may have made the name up."""
        if is_served and len(self._adapters) < MAX_ADAPTERS:
            self._adapters.add(name)
        return name if name in self._adapters else OTHER

    def _count_drafts(self, source: DraftSource, totals: DraftTotals) -> None:
        attributes = {names.DRAFT_SOURCE: source.value}
        self._counters["nanoserve.spec_decode.num_drafts"].add(totals.num_drafts, attributes)
        self._counters["nanoserve.spec_decode.num_draft_tokens"].add(totals.num_tokens, attributes)
        self._counters["nanoserve.spec_decode.num_accepted_tokens"].add(totals.num_accepted, attributes)
        # At most 64: a draft has no more tokens.
        for position, count in enumerate(totals.accepted_per_position):
            self._counters["nanoserve.spec_decode.num_accepted_tokens_per_pos"].add(
                count, attributes | {"nanoserve.spec_decode.position": f"{position}"}
            )

    def call_ended(self, call: CallRecord) -> None:
        attributes = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: call.method, names.RPC_STATUS: call.code}
        error = {} if call.code == "OK" else {names.ERROR_TYPE: call.code}
        self._histograms["rpc.server.call.duration"].record(call.end_s - call.start_s, attributes | error)
        if call.reason in REJECTIONS:
            self._counters["nanoserve.calls.rejected"].add(1, {names.ERROR_REASON: call.reason})
        if call.method == names.GENERATE:
            self._generation_ended(call)

    def _generation_ended(self, call: CallRecord) -> None:
        request = call.request
        if call.code == "DEADLINE_EXCEEDED":
            is_waiting = request is None or request.started_s is None
            self._counters["nanoserve.requests.deadline_missed"].add(
                1, {names.PHASE: "waiting" if is_waiting else "running"}
            )
        elif call.code in ("CANCELLED", "ABORTED"):
            self._counters["nanoserve.requests.cancelled"].add(1, {names.RPC_STATUS: call.code})
        if request is None:
            return
        model = self._model
        if request.adapter:
            model = self._adapter_label(request.adapter, is_served=request.started_s is not None)
        attributes = names.of_generation(model, is_chat=request.is_chat)
        if call.code != "OK":
            attributes[names.ERROR_TYPE] = call.reason or call.code
        self._histograms["gen_ai.server.request.duration"].record(call.end_s - call.start_s, attributes)
        if call.code == "OK" and request.first_token_s is not None and request.last_token_s is not None:
            self._histograms["gen_ai.server.time_to_first_token"].record(
                request.first_token_s - call.start_s, attributes
            )
            # Sequences of one request generate side by side.
            num_later_tokens = request.num_completion_tokens / request.params.n - 1
            if num_later_tokens > 0:
                seconds = (request.last_token_s - request.first_token_s) / num_later_tokens
                self._histograms["gen_ai.server.time_per_output_token"].record(seconds, attributes)


def _lora_requests_info(counts: AdapterCounts) -> dict[str, str]:
    """As vLLM's metric of this name has it, by which routers find a server that has an adapter in a slot."""
    running = dict.fromkeys(use.name for use in counts.uses if use.num_running)
    waiting = dict.fromkeys(use.name for use in counts.uses if use.num_waiting)
    return {
        "max_lora": str(counts.num_slots),
        "running_lora_adapters": ",".join(running),
        "waiting_lora_adapters": ",".join(waiting),
    }
