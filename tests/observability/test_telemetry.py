"""Which of OpenTelemetry's variables turn what on, and what is refused at the start."""

import signal
import socket

import pytest
from nanoserve_client import Client
from serve_process import serving, starting

from nanoserve.config import ConfigError, ObservabilityOptions
from nanoserve.observability.telemetry import Telemetry, _endpoint

URL = "http://127.0.0.1:4317"


@pytest.mark.parametrize(
    ("variables", "traces", "metrics"),
    [
        ({}, None, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, URL, URL),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, URL, None),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, None, URL),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://else", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, URL, "http://else"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4317", None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_METRICS_EXPORTER": "none"}, URL, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_SDK_DISABLED": "true"}, None, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, URL, URL),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, None, None),
    ],
)
def test_where_it_is_sent(variables, traces, metrics):
    assert (_endpoint("TRACES", variables), _endpoint("METRICS", variables)) == (traces, metrics)


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
        _endpoint("TRACES", variables)


def test_content_without_traces_is_refused():
    with pytest.raises(ConfigError, match="--trace-content is for traces"):
        Telemetry(ObservabilityOptions(trace_content=True))


def test_a_refusal_is_one_line_and_the_server_does_not_start():
    with starting(variables={"OTEL_TRACES_EXPORTER": "zipkin"}) as server:
        assert server.process.wait(60) == 2
    assert "it must be otlp or none" in server.log[-1]


@pytest.mark.parametrize("hangs", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_collector_that_is_gone_or_hangs_holds_nobody_up(hangs):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            # Connections are made, and nothing is ever said.
            listener.listen()
        collector = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with serving("--no-compile", variables={"OTEL_EXPORTER_OTLP_ENDPOINT": collector}) as server:
            server.wait_for(f"  metrics +not served without the HTTP port, and sent to {collector}")
            server.wait_for(f"  traces +sent to {collector}")
            with Client(server.address) as client:
                for _ in range(3):
                    assert client.chat("Hello!", max_tokens=4).result().usage.completion_tokens
            assert server.end(signal.SIGTERM) == 0
    assert not any("Traceback" in line for line in server.log)
