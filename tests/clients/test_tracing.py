"""The client's span: below the caller's, above the server's, and ended however the call ends."""

import gc
import subprocess
import sys

import grpc
import pytest
from nanoserve_client import NanoserveError, tracing
from nanoserve_client.v1 import model_pb2
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from scripted_server import overloaded, started

GENERATE = "nanoserve.v1.GenerationService/Generate"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter(monkeypatch):
    """Whose provider is the process's."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def header_of(span):
    carrier = {}
    context = trace.set_span_in_context(NonRecordingSpan(span.get_span_context()))
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier["traceparent"]


async def test_a_stream_has_a_span_between_the_callers_and_the_servers(face, server, exporter):
    client = face.connect(server.target)
    with trace.get_tracer("test").start_as_current_span("mine") as mine:
        await face.call(client.generate("Hello").result)
    [span] = [span for span in exporter.get_finished_spans() if span.name == GENERATE]
    assert span.kind is SpanKind.CLIENT
    assert span.parent.span_id == mine.get_span_context().span_id
    host, port = server.target.split(":")
    assert span.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "server.address": host,
        "server.port": int(port),
    }
    assert span.status.status_code is StatusCode.UNSET
    assert server.script.metadata[0]["traceparent"] == header_of(span)


async def test_a_named_parent_goes_before_the_current_span(face, server, exporter):
    client = face.connect(server.target)
    with trace.get_tracer("test").start_as_current_span("mine"):
        await face.call(client.generate("Hello", traceparent=TRACEPARENT).result)
    [span] = [span for span in exporter.get_finished_spans() if span.name == GENERATE]
    assert trace.format_span_id(span.parent.span_id) in TRACEPARENT
    assert server.script.metadata[0]["traceparent"] == header_of(span) != TRACEPARENT


async def test_a_refusal_ends_it_once_after_all_attempts(face, server, exporter):
    def refuse(_request, context):
        context.abort_with_status(overloaded(1))
        yield

    server.script.generate = refuse
    client = face.connect(server.target)
    with pytest.raises(NanoserveError):
        await face.call(client.generate("Hello").result)
    [span] = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert {metadata["traceparent"] for metadata in server.script.metadata} == {header_of(span)}
    assert len(server.script.metadata) == 4


@pytest.mark.parametrize("how", ["cancelled", "dropped"])
async def test_nobody_reads_on(face, server, exporter, how):
    def endless(_request, _context):
        yield started()
        server.script.ended.wait()

    server.script.generate = endless
    stream = face.connect(server.target).generate("Hello")
    if how == "cancelled":
        stream.cancel()
    del stream
    gc.collect()
    [span] = exporter.get_finished_spans()
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_unary_calls_have_one_too(face, server, exporter):
    client = face.connect(server.target)
    server.script.unary = lambda _request, _context: model_pb2.ListModelsResponse()
    await face.call(client.list_models)
    server.script.unary = lambda _request, context: context.abort_with_status(overloaded(1))
    with pytest.raises(NanoserveError):
        await face.call(client.tokenize, "Hello")
    good, bad = exporter.get_finished_spans()
    assert (good.name, good.attributes["rpc.response.status_code"]) == ("nanoserve.v1.ModelService/ListModels", "OK")
    assert (bad.name, bad.attributes["error.type"]) == ("nanoserve.v1.ModelService/Tokenize", "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("is_installed", [True, False])
async def test_without_a_tracer_the_callers_header_goes_on(face, server, monkeypatch, is_installed):
    if not is_installed:
        monkeypatch.setattr(tracing, "trace", None)
    client = face.connect(server.target)
    await face.call(client.generate("Hello", traceparent=TRACEPARENT).result)
    await face.call(client.generate("Hello").result)
    first, second = server.script.metadata
    assert first["traceparent"] == TRACEPARENT
    assert "traceparent" not in second


def test_a_call_that_began_without_a_tracer_ends_without_one(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(tracing, "trace", None)
        span = tracing.CallSpan(model_pb2.ListModelsRequest(), "llm.example:443", None)
    span.end(grpc.StatusCode.OK)


def test_the_client_works_where_opentelemetry_is_not_installed():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import nanoserve_client.tracing as tracing\n"
        "sys.exit(tracing.trace is not None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("127.0.0.1:50051", {"server.address": "127.0.0.1", "server.port": 50051}),
        ("dns:///llm.example:443", {"server.address": "llm.example", "server.port": 443}),
        ("[::1]:50051", {"server.address": "::1", "server.port": 50051}),
        ("unix:/run/nanoserve", {"server.address": "unix:/run/nanoserve"}),
        ("llm.example", {"server.address": "llm.example"}),
    ],
)
def test_targets_as_attributes(target, address):
    assert tracing._address(target) == address
