"""An OTLP/gRPC collector, as Jaeger and others have one: keeps the spans and metrics that it is sent."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ARRIVAL_S = 60


class Collector:
    """Any thread."""

    def __init__(self) -> None:
        self.endpoint = ""
        # Of the resource that sent the last spans or metrics.
        self.resource: dict[str, object] = {}
        self._spans: list[Span] = []
        # As of the last push, by name.
        self._metrics: dict[str, Metric] = {}
        self._news = threading.Condition()

    def take_spans(self, request) -> None:
        with self._news:
            for resource_spans in request.resource_spans:
                self.resource = attributes(resource_spans.resource)
                for scope_spans in resource_spans.scope_spans:
                    self._spans += scope_spans.spans
            self._news.notify_all()

    def take_metrics(self, request) -> None:
        """A push has all metrics."""
        with self._news:
            [resource_metrics] = request.resource_metrics
            [scope_metrics] = resource_metrics.scope_metrics
            self.resource = attributes(resource_metrics.resource)
            self._metrics = {metric.name: metric for metric in scope_metrics.metrics}
            self._news.notify_all()

    def spans(self, trace_id: str, count: int) -> list[Span]:
        """Those of a trace, when there are so many."""

        def found() -> list[Span]:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

        with self._news:
            assert self._news.wait_for(lambda: len(found()) >= count, ARRIVAL_S), [span.name for span in found()]
            return found()

    def metrics(self, are_there: Callable[[dict[str, Metric]], object]) -> dict[str, Metric]:
        """The first push of which this holds."""
        with self._news:
            assert self._news.wait_for(lambda: are_there(self._metrics), ARRIVAL_S), self._metrics
            return self._metrics


def attributes(of) -> dict[str, object]:
    """Of a span, an event, a resource or a point."""
    return {each.key: _value(each.value) for each in of.attributes}


def _value(value) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


class _TraceService(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request, context):  # noqa: ARG002
        self._collector.take_spans(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _MetricsService(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request, context):  # noqa: ARG002
        self._collector.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_TraceService(collector), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_MetricsService(collector), server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
