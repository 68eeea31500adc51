"""What every request passes: its id, the question where it comes from, and a line and a count if it is refused."""

import json
import logging
import re
import socket

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from nanoserve_gateway.app import Gateway
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.errors import Problem
from nanoserve_gateway.refusals import Refusals
from nanoserve_gateway.server import GatewayServer
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families
from scripted_gateway import scripted_gateway
from scripted_server import RichStatus, overloaded

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
USER = {"role": "user", "content": "a"}
MADE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


# ------------------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "hi"}),
        ("POST", "/v1/responses", {"model": "tiny", "input": "hi", "stream": True}),
        ("POST", "/v1/responses", {"model": "tiny", "input": "hi", "background": True}),
        ("POST", "/v1/chat/completions", {"colour": 1}),
        ("GET", "/v1/responses/nothing", None),
        ("GET", "/v1/nothing", None),
        ("DELETE", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/", None),
        ("GET", "/live/explain", None),
    ],
)
def test_every_answer_bears_the_callers_id_or_a_made_one(scripted, method, path, body):
    mine = scripted.http.request(method, path, json=body, headers={"x-request-id": "mine"})
    assert mine.headers.get_list("x-request-id") == ["mine"]
    assert MADE.fullmatch(scripted.http.request(method, path, json=body).headers["x-request-id"])


def test_the_service_hears_the_id_that_the_answer_bears(scripted):
    for headers in ({"x-request-id": "mine"}, {}):
        answer = scripted.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert scripted.script.metadata[-1]["x-request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("given", ["ü".encode(), b"x" * 129, b"a\tb"])
def test_an_id_that_cannot_be_is_refused_and_the_answer_bears_a_made_one(scripted, given):
    answer = scripted.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "header x-request-id")
    assert MADE.fullmatch(answer.headers["x-request-id"])
    assert scripted.http.get("/version", headers={"x-request-id": given}).status_code == 200


def test_an_error_of_the_gateways_own_bears_an_id_too(monkeypatch):
    async def broken(_self, _request):
        raise RuntimeError("broken")

    monkeypatch.setattr(Gateway, "version", broken)
    with scripted_gateway() as gateway:
        answer = gateway.http.get("/version", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")


# ------------------------------------------------------------------------------------------------------ who may call


def post(gateway, **headers):
    """As a page may without asking first: plain text."""
    body = json.dumps(CHAT)
    return gateway.http.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain", **headers})


@pytest.mark.parametrize("origin", ["http://evil.example", "https://localhost:1", "null", "file://", "http://", ""])
def test_pages_of_foreign_origins_are_refused(scripted, origin):
    answer = post(scripted, origin=origin)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (403, "foreign_origin", "header origin")
    assert "--http-cors-origins" in error["message"]
    assert scripted.script.requests == []


def test_pages_of_the_servers_own_origin_and_of_listed_ones_may_call():
    with scripted_gateway(cors_origins=("https://a.example", "null")) as gateway:
        own = httpx.URL(gateway.url)
        for origin in (gateway.url, f"HTTP://127.0.0.1:{own.port}", "https://A.example", "null"):
            assert post(gateway, origin=origin).status_code == 200, origin
        assert post(gateway, origin=f"http://localhost:{own.port}", host=f"localhost:{own.port}").status_code == 200
        assert post(gateway, origin="https://b.example").status_code == 403
    with scripted_gateway(cors_origins=("*",)) as gateway:
        assert post(gateway, origin="https://b.example").status_code == 200


def test_programs_that_are_no_browsers_send_what_they_like(scripted):
    assert post(scripted).status_code == 200
    form = {"content-type": "application/x-www-form-urlencoded"}
    content = json.dumps(CHAT)
    assert scripted.http.post("/v1/chat/completions", content=content, headers=form).status_code == 200


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.168.0.7:8000", True),
        ("host.docker.internal:8000", True),
        ("chat.example", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example#localhost", False),
        ("[evil.example]:80", False),
    ],
)
def test_a_server_on_a_loopback_address_goes_by_no_name_that_others_may_own(host, may):
    with scripted_gateway(host="localhost", cors_origins=("https://chat.example", "*")) as gateway:
        for origin in ({}, {"origin": f"http://{host}"}):
            answer = post(gateway, host=host, **origin)
            assert answer.status_code == (200 if may else 403)
            assert may or answer.json()["error"]["code"] == "foreign_host"
        # The server behind has no health.
        probed = gateway.http.get("/health", headers={"host": host, "origin": "http://evil.example"})
        assert probed.json() == {"status": "not ready"}


@pytest.mark.parametrize("listened_on", ["0.0.0.0", "::", "10.0.0.7", "gpu-box"])
def test_a_server_for_other_machines_goes_by_any_name(listened_on):
    with scripted_gateway(host=listened_on) as gateway:
        assert post(gateway, host="api.example").status_code == 200
        assert post(gateway, host="api.example", origin="https://api.example").status_code == 200
        assert post(gateway, host="api.example", origin="https://evil.example").status_code == 403


# -------------------------------------------------------------------------------------------------- what is refused


def refusals(caplog):
    return [record for record in caplog.records if record.name == "nanoserve_gateway.refusals"]


@pytest.mark.parametrize(
    ("method", "path", "status", "sent"),
    [
        ("POST", "/v1/chat/completions", 400, {"content": b"{"}),
        ("POST", "/v1/chat/completions", 400, {"json": {**CHAT, "colour": "secret"}}),
        ("POST", "/v1/chat/completions", 413, {"content": b" " * 1001}),
        ("POST", "/v1/chat/completions", 415, {"content": b"{}", "headers": {"content-encoding": "gzip"}}),
        ("POST", "/v1/chat/completions", 403, {"json": CHAT, "headers": {"origin": "null"}}),
        ("GET", "/v1/responses/nothing", 404, {}),
        ("GET", "/nothing%0Aforged", 404, {}),
        ("GET", "/v1/chat/completions", 405, {}),
        ("GET", "/live/explain", 400, {}),
    ],
)
def test_each_request_that_the_gateway_refuses_has_a_line(caplog, method, path, status, sent):
    caplog.set_level(logging.INFO)
    with scripted_gateway(max_body_bytes=1000) as gateway:
        headers = {"authorization": "Bearer secret", "x-request-id": "mine", **sent.pop("headers", {})}
        answer = gateway.http.request(method, path, headers=headers, **sent)
    assert answer.status_code == status
    [record] = refusals(caplog)
    assert record.fields["error"] == answer.json()["error"]["message"]
    line = record.getMessage()
    assert line.startswith(f"http={method} path={path} status={status} reason=")
    assert line.endswith(" request_id=mine")
    assert "\n" not in line
    assert "secret" not in line


def test_a_request_that_did_not_come_has_a_line(caplog):
    caplog.set_level(logging.INFO)
    with scripted_gateway(receive_timeout_s=0.2) as gateway:
        address = ("127.0.0.1", httpx.URL(gateway.url).port)
        with socket.create_connection(address, timeout=30) as connection:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
            connection.sendall(head + b"{")
            assert b"408" in connection.recv(65536)
    assert [record.fields["status"] for record in refusals(caplog)] == [408]


def test_what_the_service_refuses_has_its_line_there_and_what_never_reached_it_here(caplog, scripted):
    caplog.set_level(logging.INFO)
    scripted.script.generate = refusing(overloaded(1000))
    assert scripted.http.post("/v1/chat/completions", json=CHAT).status_code == 429
    assert refusals(caplog) == []
    scripted.stop_server()
    assert scripted.http.post("/v1/chat/completions", json=CHAT).status_code == 503
    assert [record.fields["reason"] for record in refusals(caplog)] == ["unavailable"]


def test_refusals_are_counted_by_status_and_reason():
    reader = InMemoryMetricReader()
    counted = Refusals(MeterProvider([reader]))
    scope = {"method": "POST", "raw_path": b"/", "state": {"request_id": "x"}}
    for code in ("invalid_request", "invalid_request", "foreign_host"):
        counted.note(scope, Problem(400, "invalid_request_error", code, "it is wrong"))
    [metric] = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("nanoserve.http.rejected", "{request}")
    counts = {point.attributes["nanoserve.error.reason"]: point.value for point in metric.data.data_points}
    assert counts == {"invalid_request": 2, "foreign_host": 1}


def test_refusals_are_among_the_metrics_of_the_server(served):
    def count():
        families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        samples = [each for family in families for each in family.samples]
        return sum(each.value for each in samples if each.name == "nanoserve_http_rejected_total")

    before = count()
    assert httpx.post(f"{served.url}/v1/chat/completions", content=b"{").status_code == 400
    assert count() == before + 1


# ----------------------------------------------------------------------------------------------------------- bodies


def test_a_compressed_body_is_refused_as_what_it_is(scripted):
    answer = scripted.http.post("/v1/chat/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (415, "header content-encoding")
    assert "'gzip'" in error["message"]
    plain = {"content-encoding": "identity"}
    assert scripted.http.post("/v1/chat/completions", json=CHAT, headers=plain).status_code == 200


def refusing(status):
    def generate(_request, context):
        context.abort_with_status(status)
        yield

    return generate


def test_more_prompts_than_may_ever_wait_are_no_reason_to_come_again(scripted):
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", metadata={"max_waiting": "3"})
    scripted.script.generate = refusing(RichStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", (info,)))
    for count, status in ((3, 429), (4, 400)):
        answer = scripted.http.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * count})
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == "prompt"
    assert "has 4 prompts; the server lets 3 requests wait" in answer.json()["error"]["message"]


def violating(field):
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="is wrong")
    info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST")
    packed = (info, error_details_pb2.BadRequest(field_violations=[violation]))
    return refusing(RichStatus(grpc.StatusCode.INVALID_ARGUMENT, "it is wrong", packed))


@pytest.mark.parametrize(
    ("path", "body", "field", "param"),
    [
        ("chat/completions", CHAT, "chat", "messages"),
        ("chat/completions", CHAT, "chat.messages[0].content", "messages[0].content"),
        ("chat/completions", CHAT, "prompt", "messages"),
        ("completions", {"prompt": "hi"}, "text", "prompt"),
        ("completions", {"prompt": "hi"}, "prompt", "prompt"),
        ("responses", {"input": "hi"}, "chat", "input"),
        ("responses", {"input": "hi"}, "prompt", "input"),
        ("responses", {"input": "hi"}, "chat.messages[0].content", "input"),
        ("responses", {"input": "hi", "instructions": "x"}, "chat.messages[0].content", "instructions"),
        ("responses", {"input": "hi", "instructions": "x"}, "chat.messages[1].content", "input"),
        ("responses", {"input": [USER] * 12}, "chat.messages[11].content", "input[11].content"),
        ("responses", {"input": [USER] * 2, "instructions": "x"}, "chat.messages[2].content", "input[1].content"),
    ],
)
def test_what_is_wrong_bears_the_name_that_the_caller_used(scripted, path, body, field, param):
    scripted.script.generate = violating(field)
    assert scripted.http.post(f"/v1/{path}", json=body).json()["error"]["param"] == param


def test_what_is_wrong_with_an_earlier_message_is_not_told_of_the_input(scripted):
    made = scripted.http.post("/v1/responses", json={"input": "hi"}).json()
    scripted.script.generate = violating("chat.messages[1].content")
    body = {"input": [USER], "previous_response_id": made["id"]}
    assert scripted.http.post("/v1/responses", json=body).json()["error"]["param"] == "previous_response_id"
    scripted.script.generate = violating("chat.messages[2].content")
    assert scripted.http.post("/v1/responses", json=body).json()["error"]["param"] == "input[0].content"


# ------------------------------------------------------------------------------------------------------ connections


def test_idle_connections_outlast_those_of_proxies():
    server = GatewayServer(GatewayConfig(target="unused"), takes_signals=False)
    assert server.config.timeout_keep_alive > 90
