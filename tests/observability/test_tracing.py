"""Spans as a collector gets them, over OTLP/gRPC, for each way in which a request can go."""

import asyncio
import json
import secrets
from collections import Counter

import httpx
import pytest
from engine_bench import PROMPT, two_right_drafts
from nanoserve_client import NanoserveError
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from otlp_collector import attributes, collecting
from serve_process import free_port, serving
from watched_server import miss_deadline, until, watched

from nanoserve.observability.tracing import Tracing
from nanoserve.observer import Observer

GENERATE = "nanoserve.v1.GenerationService/Generate"
PARENT = "00f067aa0ba902b7"
PHASES = ["queue", "prefill", "decode"]
MS = 1_000_000


@pytest.fixture(scope="module")
def collector():
    with collecting() as collector:
        yield collector


@pytest.fixture
def provider(collector):
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint)))
    yield provider
    provider.shutdown()


class Noted(Observer):
    """Keeps the calls that are over."""

    def __init__(self):
        self.calls = []

    def call_ended(self, call):
        self.calls.append(call)


class Trace:
    """One trace, whose caller's span is PARENT."""

    def __init__(self):
        self.id = secrets.token_hex(16)
        self.traceparent = f"00-{self.id}-{PARENT}-01"

    async def fetch(self, provider, collector, count):
        """Wait for its spans, check how they hang together, and keep the server's as `call`."""
        await asyncio.to_thread(provider.force_flush)
        spans = collector.spans(self.id, count)
        assert len(spans) == count
        self.check(spans)
        return self

    def check(self, spans):
        [self.call] = [span for span in spans if span.name == GENERATE and span.kind == Span.SPAN_KIND_SERVER]
        self.phases = {span.name: span for span in spans if span.parent_span_id == self.call.span_id}
        self.names = [span.name for span in sorted(self.phases.values(), key=lambda s: s.start_time_unix_nano)]
        # They tile the call.
        edges = [self.call.start_time_unix_nano]
        for name in self.names:
            span = self.phases[name]
            assert span.kind == Span.SPAN_KIND_INTERNAL
            assert span.start_time_unix_nano == edges[-1]
            edges.append(span.end_time_unix_nano)
            assert all(edges[-2] <= event.time_unix_nano <= edges[-1] for event in span.events)
        assert edges == sorted(edges)
        assert not self.names or edges[-1] == self.call.end_time_unix_nano
        durations = [span.end_time_unix_nano - span.start_time_unix_nano for span in self.phases.values()]
        if self.names:
            assert abs(sum(durations) - (edges[-1] - edges[0])) < MS
        self.attributes = attributes(self.call)

    def events(self, phase):
        return [(event.name, attributes(event)) for event in self.phases[phase].events]


async def test_a_request_that_goes_well(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (_, client):
        await client.generate(PROMPT, max_tokens=3, seed=5, temperature=0.5, traceparent=trace.traceparent).result()
        await client.generate(
            PROMPT, max_tokens=3, seed=5, temperature=0.5, traceparent=Trace().traceparent, request_id="mine"
        ).result()
    await trace.fetch(provider, collector, 4)
    assert trace.call.parent_span_id.hex() == PARENT
    assert trace.call.status.code == Status.STATUS_CODE_UNSET
    assert trace.names == PHASES
    assert {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nanoserve",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }.items() <= trace.attributes.items()
    assert not {"error.type", "gen_ai.input.messages", "gen_ai.output.messages"} & trace.attributes.keys()
    assert trace.events("prefill") == [("chunk", {"nanoserve.step": 1, "nanoserve.sequence": 0, "nanoserve.tokens": 9})]
    assert [name for name, _ in trace.events("decode")] == ["last token"]


async def test_a_long_prompt_has_an_event_for_each_chunk(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (_, client):
        await client.generate(list(range(1, 101)), max_tokens=2, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 4)
    assert [attributes["nanoserve.tokens"] for _, attributes in trace.events("prefill")] == [64, 36]


async def test_several_sequences(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (_, client):
        await client.generate(PROMPT, n=3, max_tokens=4, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 4)
    assert trace.attributes["gen_ai.request.choice.count"] == 3
    assert trace.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    assert trace.attributes["gen_ai.usage.output_tokens"] == 12
    # The prompt's last, unshared tokens are computed for each of them.
    chunks = [event["nanoserve.sequence"] for name, event in trace.events("decode") if name == "chunk"]
    assert chunks == [1, 2]


async def test_guesses_are_an_event_for_each_source(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (bench, client):
        bench.executor._draft = two_right_drafts
        await client.generate(PROMPT, max_tokens=6, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 4)
    told = {
        "nanoserve.draft_source": "ngram",
        "nanoserve.drafts": 2,
        "nanoserve.draft_tokens": 4,
        "nanoserve.accepted_draft_tokens": 3,
    }
    assert trace.events("decode") == [("guesses", told), ("last token", {"nanoserve.tokens": 6})]
    guesses, last = trace.phases["decode"].events
    assert guesses.time_unix_nano == last.time_unix_nano


async def test_a_preempted_request(provider, collector):
    old, young = Trace(), Trace()
    async with watched(Tracing(provider), num_blocks=32) as (bench, client):
        bench.executor.gate.clear()
        streams = [
            client.generate([byte] * 40, max_tokens=50, ignore_eos=True, traceparent=trace.traceparent)
            for byte, trace in ((1, old), (2, young))
        ]
        await until(lambda: len(bench.engine._streams) == 2)
        bench.executor.gate.set()
        results = await asyncio.gather(*(stream.result() for stream in streams))
        assert [result.timing.preemptions > 0 for result in results].count(True) == 1
    for trace, result in zip((old, young), results, strict=True):
        await trace.fetch(provider, collector, 4)
        happened = Counter(name for name, _ in trace.events("decode"))
        assert happened["preemption"] == result.timing.preemptions
        assert bool(happened["chunk"]) == bool(happened["preemption"]), "it is computed again"
    told = [attributes for trace in (old, young) for name, attributes in trace.events("decode") if name == "preemption"]
    [for_whom] = {attributes["nanoserve.preempted_for"] for attributes in told}
    assert for_whom in {trace.attributes["gen_ai.response.id"] for trace in (old, young)}


async def test_a_cancelled_request(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (bench, client):
        steps = bench.executor.count_steps()
        stream = client.generate(PROMPT, traceparent=trace.traceparent)
        steps.release(2)
        await anext(aiter(stream))
        stream.cancel()
        await until(lambda: not bench.engine._streams)
        steps.release()
    await trace.fetch(provider, collector, 4)
    assert trace.names == PHASES
    assert trace.attributes["rpc.response.status_code"] == trace.attributes["error.type"] == "CANCELLED"
    # That is the caller's doing.
    assert trace.call.status.code == Status.STATUS_CODE_UNSET
    assert "gen_ai.response.finish_reasons" not in trace.attributes


async def test_a_request_whose_deadline_passes_while_it_waits(provider, collector):
    traces = []

    def request(timeout_s):
        traces.append(Trace())
        return client.generate(PROMPT, timeout=timeout_s, traceparent=traces[-1].traceparent)

    noted = Noted()
    async with watched(Tracing(provider), noted) as (bench, client):
        bench.executor.gate.clear()
        await miss_deadline(request, lambda: noted.calls)
        bench.executor.gate.set()
    trace = traces[-1]
    await trace.fetch(provider, collector, 2)
    assert trace.names == ["queue"]
    assert trace.attributes["error.type"] == "DEADLINE_EXCEEDED"
    assert trace.attributes["nanoserve.phase"] == "waiting"
    assert (trace.call.status.code, trace.call.status.message) == (Status.STATUS_CODE_ERROR, "DEADLINE")


async def test_requests_that_are_refused(provider, collector):
    full, wrong = Trace(), Trace()
    async with watched(Tracing(provider), max_waiting=1) as (bench, client):
        bench.executor.gate.clear()
        first = client.generate(PROMPT, max_tokens=1)
        waiting = asyncio.create_task(first.start())
        await until(lambda: bench.engine._streams)
        for trace, options in ((full, {}), (wrong, {"temperature": -1})):
            with pytest.raises(NanoserveError):
                await client.generate(PROMPT, traceparent=trace.traceparent, **options).result()
        bench.executor.gate.set()
        await waiting
        await first.result()
    await full.fetch(provider, collector, 2)
    await wrong.fetch(provider, collector, 1)
    assert full.names == ["queue"]
    assert full.attributes["error.type"] == "RESOURCE_EXHAUSTED"
    assert full.attributes["nanoserve.error.reason"] == "OVERLOADED"
    assert wrong.attributes["error.type"] == "INVALID_ARGUMENT"
    assert wrong.attributes["nanoserve.error.reason"] == "INVALID_REQUEST"


async def test_a_request_that_fails(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (bench, client):
        bench.executor.is_broken = True
        with pytest.raises(NanoserveError):
            await client.generate(PROMPT, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 3)
    assert trace.names == ["queue", "prefill"]
    assert trace.attributes["error.type"] == "INTERNAL"
    assert (trace.call.status.code, trace.call.status.message) == (Status.STATUS_CODE_ERROR, "ENGINE_FAILURE")


async def test_content_is_there_only_if_it_is_wanted(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider, wants_content=True)) as (_, client):
        result = await client.generate("once", max_tokens=3, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 4)
    [asked] = json.loads(trace.attributes["gen_ai.input.messages"])
    [answered] = json.loads(trace.attributes["gen_ai.output.messages"])
    assert asked == {"role": "user", "parts": [{"type": "text", "content": "once"}]}
    assert answered["parts"] == [{"type": "text", "content": result.completions[0].text}]
    assert answered["finish_reason"] == "length"


async def test_a_caller_that_does_not_sample_gets_no_span(provider, collector):
    unsampled, sampled = Trace(), Trace()
    async with watched(Tracing(provider)) as (_, client):
        await client.generate(PROMPT, max_tokens=1, traceparent=f"00-{unsampled.id}-{PARENT}-00").result()
        await client.generate(PROMPT, max_tokens=1, traceparent=sampled.traceparent).result()
    await sampled.fetch(provider, collector, 4)
    assert not collector.spans(unsampled.id, 0)


async def test_the_largest_seed_is_no_obstacle(provider, collector):
    trace = Trace()
    async with watched(Tracing(provider)) as (_, client):
        await client.generate(PROMPT, max_tokens=1, seed=2**64 - 1, traceparent=trace.traceparent).result()
    await trace.fetch(provider, collector, 4)
    assert "gen_ai.request.seed" not in trace.attributes


@pytest.fixture(scope="module")
def served(collector):
    """A server as a user starts it, with the one variable that turns traces on."""
    port = free_port()
    with serving("--http-port", f"{port}", variables={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}) as server:
        yield server, f"http://127.0.0.1:{port}"


def test_a_stream_through_rest_is_one_trace(served, collector):
    server, url = served
    trace = Trace()
    body = {"model": "nanoserve-builtin", "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"traceparent": trace.traceparent}, timeout=60
    ) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    spans = collector.spans(trace.id, 6)
    trace.check(spans)
    by_id = {span.span_id: span for span in spans}
    client = by_id[trace.call.parent_span_id]
    http = by_id[client.parent_span_id]
    assert (client.name, client.kind) == (GENERATE, Span.SPAN_KIND_CLIENT)
    assert (http.name, http.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER)
    assert http.parent_span_id.hex() == PARENT
    assert attributes(http)["http.response.status_code"] == 200
    assert http.start_time_unix_nano <= client.start_time_unix_nano <= trace.call.start_time_unix_nano
    assert trace.call.end_time_unix_nano <= http.end_time_unix_nano
    assert trace.attributes["gen_ai.request.model"] == "nanoserve-builtin"
    assert trace.attributes["gen_ai.operation.name"] == "chat"
    assert trace.names == PHASES
    assert collector.resource["service.name"] == "nanoserve"
    assert server.wait_for(rf"rpc=Generate code=OK .* trace_id={trace.id}")
    assert not any("Hello!" in line for line in server.log)
