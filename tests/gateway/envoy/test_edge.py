"""Envoy's part, with servers behind it that do what the test says: routes, headers, retries, time, limits, the log."""

import contextlib
import http.client
import threading
import time
import uuid

import grpc
import pytest
from behind_envoy import scripted, standing_in
from envoy_process import fronting
from http_caller import events, send, sending
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from nanoserve_client.v1 import generation_pb2 as pb
from scripted_server import RichStatus, delta, finished, hello, overloaded, started

GENERATE = "/nanoserve/v1/generate"
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


@pytest.fixture(scope="module")
def module():
    with standing_in() as module:
        yield module


@pytest.fixture(scope="module")
def envoy(server, module):
    with fronting({50051: server.port, 8000: module.port}) as envoy:
        yield envoy


@pytest.fixture(autouse=True)
def forgetful(server, module):
    """Each test begins with a server that says hello, and a module that says 200."""
    server.script.generate = hello
    server.script.ended.clear()
    for seen in (server.script.requests, server.script.metadata, server.script.deadlines, module.seen):
        seen.clear()
    module.status = 200


@pytest.fixture
def channel(envoy):
    # Whatever comes, it is Envoy that retries here.
    with grpc.insecure_channel(f"127.0.0.1:{envoy.port}", [("grpc.enable_retries", 0)]) as channel:
        yield channel


@pytest.fixture
def generate(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    return lambda **options: stub.Generate(pb.GenerateRequest(text="Hello!"), timeout=TIMEOUT_S, **options)


def failing(times, code, before=()):
    """A stream that sends the events `before` and fails, that often; then one that ends well."""
    left = [code] * times

    def generate(request, context):
        if not left:
            yield from hello(request, context)
            return
        yield from before
        context.abort_with_status(RichStatus(left.pop(), "scripted"))

    return generate


def never_ending(before=()):
    def generate(_request, context):
        over = threading.Event()
        context.add_callback(over.set)
        yield from before
        assert over.wait(TIMEOUT_S)

    return generate


# ----------------------------------------------------------------------------------------------------- headers


def test_a_call_keeps_its_label_trace_and_key(server, generate):
    sent = {
        "x-request-id": str(uuid.uuid4()),
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
        "authorization": "Bearer key",
        "x-nanoserve-session": "s",
        "some-bin": b"\x00\xff",
    }
    call = generate(metadata=tuple(sent.items()))
    assert [event.WhichOneof("event") for event in call] == ["started", "delta", "delta", "finished"]
    [seen] = server.script.metadata
    assert sent.items() <= seen.items()
    assert dict(call.initial_metadata())["x-request-id"] == sent["x-request-id"]


def test_so_does_a_request_to_the_openai_module(envoy, module):
    sent = {
        "x-request-id": "mine",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "authorization": "Bearer key",
        "x-request-timeout": "3",
    }
    answer = send(envoy.port, "/v1/chat/completions?beta=1", {"model": "m"}, sent)
    assert answer.json == {"stand_in": module.port}
    [(method, path, seen)] = module.seen
    assert (method, path) == ("POST", "/v1/chat/completions?beta=1")
    assert sent.items() <= seen.items()
    assert answer.headers["x-request-id"] == "mine"


def test_a_request_without_a_label_gets_one(server, module, envoy):
    for path, body in ((GENERATE, {"text": "Hello!"}), ("/v1/models", None)):
        label = send(envoy.port, path, body).headers["x-request-id"]
        seen = server.script.metadata[-1] if body else module.seen[-1][2]
        assert uuid.UUID(seen["x-request-id"]) == uuid.UUID(label)


def test_callers_cannot_order_retries_and_time_outs(server, envoy):
    server.script.generate = failing(1, grpc.StatusCode.INTERNAL)
    orders = {
        "x-envoy-retry-grpc-on": "internal",
        "x-envoy-max-retries": "9",
        "x-envoy-upstream-rq-timeout-ms": "1",
    }
    assert send(envoy.port, GENERATE, {"text": "Hello!"}, orders).status == 500
    [seen] = server.script.metadata
    assert not orders.keys() & seen.keys()


# ------------------------------------------------------------------------------------------------------ routes


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions", "/v1/completions", "/v1/responses/resp_1"),
        *("/v1/models", "/v1/models/org/name", "/v1/models/org%2Fname"),
        *("/tokenize", "/detokenize", "/health", "/version", "/docs", "/openapi.json"),
    ],
)
def test_the_openai_modules_paths_lead_to_it(envoy, module, path):
    assert send(envoy.port, path).json == {"stand_in": module.port}
    assert module.seen[0][:2] == ("GET", path)


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
def test_methods_reach_the_openai_module(envoy, module, method):
    assert send(envoy.port, "/v1/responses/resp_1", method=method).status == 200
    assert module.seen[0][0] == method


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/v1/../metrics", "/v2/models", "/nanoserve/v1/nothing", "/nanoserve.v1.Other/Call"]
)
def test_other_paths_lead_nowhere(envoy, module, path):
    answer = send(envoy.port, path)
    assert (answer.status, answer.body) == (404, b"nothing is served under this path")
    assert module.seen == []


def test_json_with_a_parameter_that_the_contract_does_not_have_is_refused(envoy):
    assert send(envoy.port, f"{GENERATE}?beta=1", {"text": "Hello!"}).status == 400


def test_a_service_that_is_not_there_is_unimplemented(channel):
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/nanoserve.v1.OtherService/Call")(b"", timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_admin_service_is_refused(server, channel, envoy):
    with pytest.raises(grpc.RpcError) as failure:
        admin_pb2_grpc.AdminServiceStub(channel).GetStats(admin_pb2.GetStatsRequest(), timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "not served at the edge" in failure.value.details()
    assert send(envoy.port, "/nanoserve.v1.AdminService/GetStats", {}).status == 403
    assert server.script.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "//nanoserve.v1.AdminService/GetStats",
        "/./nanoserve.v1.AdminService/GetStats",
        "/nanoserve.v1.GenerationService/../nanoserve.v1.AdminService/GetStats",
        "/nanoserve.v1.GenerationService/%2e%2e/nanoserve.v1.AdminService/GetStats",
        "/nanoserve.v1.GenerationService/..%2fnanoserve.v1.AdminService/GetStats",
        "/nanoserve.v1.%41dminService/GetStats",
        "/nanoserve.v1.adminservice/GetStats",
        "/nanoserve.v1.AdminService/GetStats?x=/nanoserve.v1.GenerationService/Generate",
    ],
)
def test_admin_service_is_refused_however_it_is_spelt(server, channel, path):
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary(path)(b"", timeout=TIMEOUT_S)
    assert failure.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
    assert server.script.requests == []


@pytest.mark.parametrize("method", ["WatchEngine", "ExplainRequest"])
def test_nobody_watches_through_the_edge(server, envoy, method):
    assert send(envoy.port, f"/nanoserve.v1.AdminService/{method}", {}).status == 403
    assert server.script.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/load_lora_adapter?x=1",
        "//v1//load_lora_adapter",
        "/v1/models/../load_lora_adapter",
        "/v1/%6coad_lora_adapter",
        "/v1/load%5Flora_adapter",
        "/v1/%2e/load_lora_adapter",
        "/v1%2fload_lora_adapter",
    ],
)
def test_nobody_loads_adapters_through_the_edge(envoy, module, path):
    connection = http.client.HTTPConnection("127.0.0.1", envoy.port, timeout=TIMEOUT_S)
    connection.request("POST", path, body='{"lora_name": "a"}')
    assert connection.getresponse().status in (403, 404)
    connection.close()
    assert module.seen == []


@pytest.mark.parametrize("path", ["/", "/live/events", "/live/explain?id=x", "/live/page.js", "/v1/../live/events"])
def test_the_live_view_is_not_served_at_the_edge(envoy, path):
    connection = http.client.HTTPConnection("127.0.0.1", envoy.port, timeout=TIMEOUT_S)
    connection.request("GET", path)
    assert connection.getresponse().status == 404
    connection.close()


# ----------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED], ids=lambda c: c.name)
def test_a_server_that_is_not_ready_is_tried_again(server, generate, code):
    server.script.generate = failing(2, code)
    assert [event.delta.text for event in generate()] == ["", "Hel", "lo", ""]
    assert len(server.script.requests) == 3


def test_but_not_for_ever(server, generate):
    server.script.generate = failing(9, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(grpc.RpcError) as failure:
        list(generate())
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "grpc-status-details-bin" in dict(failure.value.trailing_metadata()), "the server's own answer"
    assert len(server.script.requests) == 3


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c.name not in ("OK", "UNAVAILABLE", "CANCELLED")], ids=lambda c: c.name
)
def test_what_another_attempt_would_not_help_is_not_tried_again(server, generate, code):
    server.script.generate = failing(1, code)
    with pytest.raises(grpc.RpcError) as failure:
        list(generate())
    assert failure.value.code() is code
    assert len(server.script.requests) == 1


def test_a_stream_that_has_begun_is_never_tried_again(server, generate):
    server.script.generate = failing(1, grpc.StatusCode.UNAVAILABLE, [started()])
    call = generate()
    assert next(call).HasField("started")
    with pytest.raises(grpc.RpcError) as failure:
        list(call)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(server.script.requests) == 1


def test_a_long_prompt_is_tried_again_too(server, channel):
    server.script.generate = failing(1, grpc.StatusCode.UNAVAILABLE)
    request = pb.GenerateRequest(text="x" * (12 * 2**20))
    list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=TIMEOUT_S))
    assert [r == request for r in server.script.requests] == [True, True]


def test_so_is_a_long_prompt_as_json(server, envoy):
    server.script.generate = failing(1, grpc.StatusCode.UNAVAILABLE)
    text = "x" * (12 * 2**20)
    assert send(envoy.port, GENERATE, {"text": text}).status == 200
    assert [r.text == text for r in server.script.requests] == [True, True]


def test_and_to_the_openai_module(envoy, module):
    module.status = 503
    body = b"x" * (12 * 2**20)
    assert send(envoy.port, "/v1/completions", body).status == 503
    assert [headers["content-length"] for _, _, headers in module.seen] == [str(len(body))] * 3


def test_an_openai_module_that_is_not_ready_is_tried_again_and_then_answers_itself(envoy, module):
    module.status = 503
    assert send(envoy.port, "/v1/models").json == {"stand_in": module.port}
    assert len(module.seen) == 3


@pytest.mark.parametrize("status", [400, 429, 500, 504])
def test_its_other_answers_are_passed_on(envoy, module, status):
    module.status = status
    assert send(envoy.port, "/v1/models").status == status
    assert len(module.seen) == 1


# -------------------------------------------------------------------------------------------------------- time


def test_a_request_that_waits_ends_at_its_deadline(server, envoy):
    server.script.generate = never_ending()
    answer = send(envoy.port, GENERATE, {"text": "Hello!"}, {"grpc-timeout": "300m"})
    # Envoy or the server, whichever clock is first.
    assert (answer.status, answer.json["message"]) in ((504, "downstream duration timeout"), (504, "Deadline Exceeded"))
    assert server.script.ended.wait(TIMEOUT_S)


def test_a_stream_ends_at_its_deadline(server, envoy):
    server.script.generate = never_ending([started(), delta(text="Hel")])
    seen = []
    with sending(envoy.port, GENERATE, {"text": "Hello!"}, {"grpc-timeout": "300m"}) as response:
        # Envoy cuts the connection, the server ends the stream, whichever clock is first.
        with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
            for event in events(response):
                seen += event
        assert seen == ["started", "delta"]
    assert server.script.ended.wait(TIMEOUT_S)


def test_a_callers_own_clock_is_never_overtaken(server, channel):
    """Envoy would reset the stream: INTERNAL, or UNKNOWN."""
    server.script.generate = never_ending([started()])
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    calls = [stub.Generate(pb.GenerateRequest(), timeout=0.2 + 0.01 * i) for i in range(7)]
    for call in calls:
        with pytest.raises(grpc.RpcError):
            list(call)
    assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}


def test_the_server_hears_of_the_deadline(server, generate):
    list(generate())
    # Without one, it would be years; on its way it is rounded up.
    assert server.script.deadlines == [pytest.approx(TIMEOUT_S, abs=2)]


def test_a_caller_that_goes_away_ends_the_call(server, envoy):
    for before in ([], [started()]):
        server.script.ended.clear()
        server.script.generate = never_ending(before)
        label = str(uuid.uuid4())
        with grpc.insecure_channel(f"127.0.0.1:{envoy.port}") as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(pb.GenerateRequest(), metadata=[("x-request-id", label)])
            wait_until(lambda label=label: any(seen["x-request-id"] == label for seen in server.script.metadata))
            if before:
                next(call)
        assert server.script.ended.wait(TIMEOUT_S)


def wait_until(holds):
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------ limits


def test_a_flood_is_refused_in_each_callers_own_terms(server, module):
    bucket = {"max_tokens: 2000, tokens_per_fill: 1000, fill_interval: 1s": "max_tokens: 1, fill_interval: 3600s"}
    with fronting({50051: server.port, 8000: module.port}, edits=bucket) as envoy:
        assert send(envoy.port, "/v1/models").status == 200
        answer = send(envoy.port, "/v1/models")
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert answer.json["error"] == {
            "message": "local_rate_limited",
            "type": "gateway_error",
            "param": None,
            "code": None,
        }
        answer = send(envoy.port, GENERATE, {"text": "Hello!"})
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert answer.json == {"message": "local_rate_limited"}
        with grpc.insecure_channel(f"127.0.0.1:{envoy.port}", [("grpc.enable_retries", 0)]) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            metadata = dict(call.trailing_metadata()) | dict(call.initial_metadata())
            assert metadata["grpc-retry-pushback-ms"] == "1000"
    assert server.script.requests == []


def test_more_requests_than_the_circuit_breaker_lets_through_are_unavailable(server, module):
    server.script.generate = never_ending([started()])
    with fronting({50051: server.port, 8000: module.port}, edits={"max_requests: 4096": "max_requests: 2"}) as envoy:
        with sending(envoy.port, GENERATE, {}) as first, sending(envoy.port, GENERATE, {}) as second:
            assert (first.status, second.status) == (200, 200)
            answer = send(envoy.port, GENERATE, {})
        assert (answer.status, "overflow" in answer.json["message"]) == (503, True)
        assert len(server.script.requests) == 2


def test_json_may_be_as_large_as_the_server_allows(server, envoy):
    text = "x" * (15 * 2**20)
    assert send(envoy.port, GENERATE, {"text": text}).status == 200
    assert server.script.requests[0].text == text


def test_a_response_may_be_larger_than_the_buffer(server, envoy):
    server.script.generate = lambda *_: iter([started(), delta(text="x" * (20 * 2**20)), finished()])
    with sending(envoy.port, GENERATE, {"text": "Hello!"}) as response:
        assert [len(event.get("delta", {}).get("text", "")) for event in events(response)] == [0, 20 * 2**20, 0]


# ----------------------------------------------------------------------------------------------------- the log


def test_the_access_log_says_who_what_and_how_it_ended(envoy, server):
    label, trace = str(uuid.uuid4()), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    server.script.generate = failing(2, grpc.StatusCode.UNAVAILABLE)
    headers = {"x-request-id": label, "traceparent": trace, "x-forwarded-for": "192.0.2.1"}
    send(envoy.port, GENERATE, {"text": "Hello!"}, headers)
    line = envoy.access(label)
    assert (
        line.items()
        >= {
            "path": GENERATE,
            "route": "json",
            "server": f"127.0.0.1:{server.port}",
            "attempts": 3,
            "status": 200,
            "grpc_status": "0",
            "traceparent": trace,
            "peer": "127.0.0.1",
        }.items()
    )


def test_the_access_log_has_the_status_of_a_refusal(envoy, server, generate):
    label = str(uuid.uuid4())
    server.script.generate = lambda _, context: context.abort_with_status(overloaded(250))
    with pytest.raises(grpc.RpcError):
        list(generate(metadata=[("x-request-id", label)]))
    assert envoy.access(label)["grpc_status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])


def test_the_log_never_quotes_a_caller(envoy, server):
    def echo(request, context):
        context.abort_with_status(RichStatus(grpc.StatusCode.INVALID_ARGUMENT, f"cannot read {request.text}"))
        yield

    server.script.generate = echo
    secret = "Sesame"
    last = str(uuid.uuid4())
    key = {"authorization": f"Bearer {secret}"}
    assert secret in send(envoy.port, GENERATE, {"text": secret}, key).body.decode()
    assert send(envoy.port, GENERATE, f'{{"text": {secret}'.encode(), key).status == 400
    assert send(envoy.port, f"{GENERATE}?text={secret}", {}, key).status == 400
    assert send(envoy.port, f"/v1/models?q={secret}", None, {**key, "x-request-id": last}).status == 200
    envoy.access(last)
    assert secret not in "".join(envoy.log)
