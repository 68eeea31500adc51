"""An OTLP/gRPC collector, as Jaeger and others have one: keeps the spans that it is sent."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ARRIVAL_S = 60


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Any thread."""

    def __init__(self) -> None:
        self.endpoint = ""
        # Of the resource that sent the last span.
        self.resource: dict[str, object] = {}
        self._spans: list[Span] = []
        self._news = threading.Condition()

    def Export(self, request, context):  # noqa: ARG002
        with self._news:
            for resource_spans in request.resource_spans:
                self.resource = attributes(resource_spans.resource)
                for scope_spans in resource_spans.scope_spans:
                    self._spans += scope_spans.spans
            self._news.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str, count: int) -> list[Span]:
        """Those of a trace, when there are so many."""

        def found() -> list[Span]:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

        with self._news:
            assert self._news.wait_for(lambda: len(found()) >= count, ARRIVAL_S), [span.name for span in found()]
            return found()


def attributes(of) -> dict[str, object]:
    """Of a span, an event or a resource."""
    return {each.key: _value(each.value) for each in of.attributes}


def _value(value) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
