"""Which of OpenTelemetry's variables turn what on, and what is refused at the start."""

import signal

import pytest
from nanoserve_client import Client
from serve_process import free_port, serving, starting

from nanoserve.config import ConfigError, ObservabilityOptions
from nanoserve.observability.telemetry import Telemetry, _is_exported

URL = "http://127.0.0.1:4317"


@pytest.mark.parametrize(
    ("variables", "traces", "metrics"),
    [
        ({}, False, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, True, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, True, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, False, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_METRICS_EXPORTER": "none"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_SDK_DISABLED": "true"}, False, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, False, False),
    ],
)
def test_what_is_sent(variables, traces, metrics):
    assert (_is_exported("TRACES", variables), _is_exported("METRICS", variables)) == (traces, metrics)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'; it must be otlp or none"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'; it must be grpc",
        ),
    ],
)
def test_what_is_refused(variables, message):
    with pytest.raises(ConfigError, match=message):
        _is_exported("TRACES", variables)


def test_content_without_traces_is_refused():
    with pytest.raises(ConfigError, match="--trace-content is for traces"):
        Telemetry(ObservabilityOptions(trace_content=True))


def test_a_refusal_is_one_line_and_the_server_does_not_start():
    with starting(variables={"OTEL_TRACES_EXPORTER": "zipkin"}) as server:
        assert server.process.wait(60) == 2
    assert "it must be otlp or none" in server.log[-1]


def test_a_collector_that_is_gone_holds_nobody_up():
    with serving(variables={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}) as server:
        with Client(server.address) as client:
            for _ in range(3):
                assert client.chat("Hello!", max_tokens=4).result().usage.completion_tokens
        assert server.end(signal.SIGTERM) == 0
