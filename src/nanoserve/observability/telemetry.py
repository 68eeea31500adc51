"""Sets up who watches a server, by its options and OpenTelemetry's own variables, and shuts that down.

Traces go to an OTLP collector if a variable names one (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT)
or asks for it (OTEL_TRACES_EXPORTER=otlp); metrics likewise, and to whoever reads /metrics in any case. What else the
variables say (headers, certificates, sampling, batching) the SDK reads itself.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from nanoserve.config import ConfigError, ObservabilityOptions, environment
from nanoserve.observability.access_log import AccessLog
from nanoserve.observability.metrics import Metrics
from nanoserve.observability.tracing import Tracing
from nanoserve.observer import Observer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
# The SDK's own.
DEFAULT_ENDPOINT = "http://localhost:4317"
# How long the last spans and metrics may take to leave at the end.
FLUSH_TIMEOUT_S = 3


class Telemetry:
    """The observers of one server, and what they write to."""

    def __init__(self, options: ObservabilityOptions) -> None:
        """Raises ConfigError for a variable that asks for what is not there."""
        variables = environment()
        resource = Resource.create({} if "OTEL_SERVICE_NAME" in variables else {"service.name": "nanoserve"})
        self.observers: list[Observer] = []
        self._closers: list[Callable[[], None]] = []
        # The gateway has a counter of its own there. None = there are no metrics.
        self.meter_provider: MeterProvider | None = None
        self._registry = CollectorRegistry()
        # Of the collector that gets them; None = none does.
        self.traces_endpoint = _endpoint("TRACES", variables)
        self.metrics_endpoint = _endpoint("METRICS", variables) if options.metrics else None
        if self.traces_endpoint is not None:
            tracer_provider, exporter = TracerProvider(resource=resource), OTLPSpanExporter()
            tracer_provider.add_span_processor(BatchSpanProcessor(exporter))
            # For the gateway, which is in this process.
            trace.set_tracer_provider(tracer_provider)
            self.observers.append(Tracing(tracer_provider, wants_content=options.trace_content))
            self._closers.append(partial(_close_traces, tracer_provider, exporter))
        elif options.trace_content:
            raise ConfigError(f"--trace-content is for traces, and there are none: set {ENDPOINT}")
        if options.metrics:
            readers: list[MetricReader] = [PrometheusMetricReader(scope_info_enabled=False, registry=self._registry)]
            if self.metrics_endpoint is not None:
                readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
            self.meter_provider = MeterProvider(readers, resource=resource)
            self.observers.append(Metrics(self.meter_provider))
            self._closers.append(partial(self.meter_provider.shutdown, FLUSH_TIMEOUT_S * 1000))
        self.observers.append(AccessLog())

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in a format that `accept` allows, and its content type."""
        encode, content_type = choose_encoder(accept)
        return await asyncio.to_thread(encode, self._registry), content_type

    async def close(self) -> None:
        """Send what is left, if the collector takes it in time."""
        await asyncio.gather(*map(asyncio.to_thread, self._closers))


def _close_traces(provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
    # The provider would wait for as long as the exporter tries.
    patience = threading.Timer(FLUSH_TIMEOUT_S, exporter.shutdown)
    patience.start()
    provider.shutdown()
    patience.cancel()


def _endpoint(signal: str, variables: Mapping[str, str]) -> str | None:
    """Where a signal, "TRACES" or "METRICS", is sent; None = to no collector. Raises ConfigError."""
    chooser = f"OTEL_{signal}_EXPORTER"
    chosen = variables.get(chooser, "").strip()
    if chosen not in ("", "otlp", "none"):
        raise ConfigError(f"{chooser} is {chosen!r}; it must be otlp or none")
    if variables.get("OTEL_SDK_DISABLED", "").lower() == "true" or chosen == "none":
        return None
    endpoint = variables.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or variables.get(ENDPOINT)
    if not (chosen or endpoint):
        return None
    protocol = variables.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or variables.get(PROTOCOL) or "grpc"
    if protocol != "grpc":
        raise ConfigError(f"{PROTOCOL} is {protocol!r}; it must be grpc")
    return endpoint or DEFAULT_ENDPOINT
