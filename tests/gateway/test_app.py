"""The application in front of a scripted server: status codes, headers, streams that break, callers who go."""

import contextlib
import itertools
import json
import socket
import threading

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from nanoserve_client.v1 import model_pb2
from nanoserve_gateway import pages
from nanoserve_gateway.fields import NO_QUERY, QUERIES
from scripted_gateway import scripted_gateway
from scripted_server import RichStatus, delta, hello, overloaded, started

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/responses": {"model": "tiny", "input": "hi"},
}
EVERY_API = pytest.mark.parametrize(("path", "body"), PATHS.items(), ids=PATHS)
WAIT_S = 30


def fail_with(status):
    def generate(_request, context):
        context.abort_with_status(status)
        yield

    return generate


def fail_with_unary(status):
    return lambda _request, context: context.abort_with_status(status)


def status(code, reason, *details):
    info = error_details_pb2.ErrorInfo(reason=reason, domain="nanoserve")
    return RichStatus(code, "it failed", (info, *details))


@EVERY_API
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_refusal_keeps_its_status_streamed_or_not(scripted, path, body, is_streamed):
    scripted.script.generate = fail_with(overloaded(2000))
    answer = scripted.http.post(path, json={**body, "stream": is_streamed})
    assert answer.status_code == 429
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "2250")
    error = answer.json()["error"]
    assert error == {
        "message": "the queue is full",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    # The caller's own client tries again, nobody else.
    assert len(scripted.script.requests) == 1


@pytest.mark.parametrize(
    ("code", "reason", "http_status", "error_code"),
    [
        ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", 400, "context_length_exceeded"),
        ("UNAUTHENTICATED", "UNAUTHENTICATED", 401, "invalid_api_key"),
        ("PERMISSION_DENIED", "PERMISSION_DENIED", 403, "permission_denied"),
        ("NOT_FOUND", "MODEL_NOT_FOUND", 404, "model_not_found"),
        ("UNAVAILABLE", "NOT_READY", 503, "not_ready"),
        ("CANCELLED", "", 503, "unavailable"),
        ("DEADLINE_EXCEEDED", "DEADLINE", 504, "deadline"),
        ("ABORTED", "CANCELLED_BY_OPERATOR", 409, "cancelled_by_operator"),
        ("INTERNAL", "ENGINE_FAILURE", 500, "engine_failure"),
    ],
)
def test_every_status_of_the_service_has_one_of_http(scripted, code, reason, http_status, error_code):
    scripted.script.generate = fail_with(status(grpc.StatusCode[code], reason))
    answer = scripted.http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == http_status
    assert answer.json()["error"]["code"] == error_code
    assert ("retry-after" in answer.headers) == (http_status == 503)
    assert (answer.headers.get("x-should-retry") == "false") == (http_status in (409, 500, 504))


def test_violations_of_the_service_bear_the_names_of_the_api(scripted):
    fields = ["stopping.max_tokens", "chat.messages[0].content", "sampling.top_p", "output.logprobs"]
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field=f, description="is wrong") for f in fields]
    )
    scripted.script.generate = fail_with(status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", bad))
    error = scripted.http.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 5}).json()["error"]
    assert error["param"] == "max_completion_tokens"
    assert error["message"] == "; ".join(
        f"{name}: is wrong" for name in ("max_completion_tokens", "messages[0].content", "top_p", "top_logprobs")
    )


@EVERY_API
def test_headers_of_a_stream_wait_for_started_alone(scripted, path, body):
    begin, go_on = threading.Event(), threading.Event()

    def generate(request, context):
        assert begin.wait(WAIT_S)
        yield started()
        assert go_on.wait(WAIT_S)
        yield from itertools.islice(hello(request, context), 1, None)

    scripted.script.generate = generate
    threading.Timer(0, begin.set).start()
    with scripted.http.stream("POST", path, json={**body, "stream": True}) as answer:
        # No token has been made.
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-request-id"] == scripted.script.metadata[0]["x-request-id"]
        go_on.set()
        assert b"lo" in b"".join(answer.iter_bytes())


@EVERY_API
def test_an_error_in_mid_stream_is_an_event_and_nothing_is_done(scripted, path, body):
    def generate(_request, context):
        yield started()
        yield delta(text="Hel", token_ids=(1,))
        context.abort_with_status(status(grpc.StatusCode.INTERNAL, "ENGINE_FAILURE"))

    scripted.script.generate = generate
    answer = scripted.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    assert "Hel" in answer.text
    assert "event: error\n" in answer.text
    assert "it failed" in answer.text
    assert "[DONE]" not in answer.text
    assert "response.completed" not in answer.text


def endless(_request, context):
    yield started()
    while context.is_active():
        yield delta(text="x", token_ids=(1,))


def silent(_request, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    yield started()
    assert gone.wait(WAIT_S)


@EVERY_API
@pytest.mark.parametrize("generate", [endless, silent])
def test_a_reader_who_goes_away_cancels_the_call(scripted, path, body, generate):
    scripted.script.generate = generate
    with scripted.http.stream("POST", path, json={**body, "stream": True}):
        assert not scripted.script.ended.is_set()
    assert scripted.script.ended.wait(WAIT_S)


@EVERY_API
@pytest.mark.parametrize("has_started", [True, False])
def test_who_goes_away_before_the_answer_cancels_the_call(scripted, path, body, has_started):
    called = threading.Event()

    def generate(_request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        called.set()
        if has_started:
            yield started()
        assert gone.wait(WAIT_S)

    scripted.script.generate = generate
    with httpx.Client(base_url=scripted.url, timeout=0.5) as http, pytest.raises(httpx.ReadTimeout):
        http.post(path, json=body)
    assert called.is_set()
    assert scripted.script.ended.wait(WAIT_S)


def test_who_goes_away_before_a_response_in_the_background_began_cancels_the_call(scripted):
    def generate(_request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        assert gone.wait(WAIT_S)
        yield

    scripted.script.generate = generate
    with httpx.Client(base_url=scripted.url, timeout=0.5) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/responses", json={"model": "tiny", "input": "hi", "background": True})
    assert scripted.script.ended.wait(WAIT_S)


def test_one_of_several_prompts_that_is_refused_ends_the_others(scripted):
    ended = threading.Semaphore(0)

    def generate(request, context):
        if not context.add_callback(ended.release):  # it has ended already
            ended.release()
        if request.text == "bad":
            context.abort_with_status(overloaded(1000))
        yield from endless(request, context)

    scripted.script.generate = generate
    answer = scripted.http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "bad", "b"]})
    assert answer.status_code == 429
    for _ in scripted.script.requests:
        assert ended.acquire(timeout=WAIT_S)


def test_silence_is_broken_by_comments():
    heard = threading.Event()

    def generate(request, context):
        yield started()
        assert heard.wait(WAIT_S)
        yield from itertools.islice(hello(request, context), 1, None)

    with scripted_gateway(keep_alive_s=0.05) as gateway:
        gateway.script.generate = generate
        with gateway.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert ": keep-alive" in lines
            heard.set()
            assert "data: [DONE]" in lines


@pytest.mark.parametrize("has_opentelemetry", [True, False])
def test_identity_trace_and_deadline_travel_beside_the_request(scripted, monkeypatch, has_opentelemetry):
    if not has_opentelemetry:
        monkeypatch.setattr("nanoserve_gateway.tracing.trace", None)
        monkeypatch.setattr("nanoserve_gateway.tracing.IS_INSTALLED", False)
        monkeypatch.setattr("nanoserve_client.tracing.trace", None)
    headers = {
        "x-request-id": "mine",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "authorization": "Bearer k",
        "x-request-timeout": "7",
    }
    scripted.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    [metadata] = scripted.script.metadata
    assert {name: metadata[name] for name in headers if name in metadata} == {
        name: headers[name] for name in ("x-request-id", "traceparent", "authorization")
    }
    # The server counts from when the call has come.
    assert 0 < scripted.script.deadlines[0] < 7.5


def test_a_deadline_that_passed_is_told_in_words_about_requests(scripted):
    scripted.script.generate = silent
    answer = scripted.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout": "0.1"})
    assert answer.status_code == 504
    assert answer.json()["error"]["message"] == "the request did not end within its time limit"


def test_without_a_header_the_gateways_own_deadline_holds():
    with scripted_gateway(timeout_s=3) as gateway:
        gateway.http.post("/v1/chat/completions", json=CHAT)
        # On the wire a time limit is rounded up.
        assert 0 < gateway.script.deadlines[0] < 3.5


@pytest.mark.parametrize(
    "headers",
    [{"x-request-timeout": t} for t in ("0", "-1", "nan", "inf", "soon")]
    + [{"x-request-id": "ü".encode()}, {"x-request-id": "x" * 3000}, {"authorization": "Bearer " + "x" * 3000}],
    ids=range(8),
)
def test_a_header_that_cannot_be_is_refused(scripted, headers):
    answer = scripted.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 400
    assert next(iter(headers)) in answer.json()["error"]["param"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b'{"a": NaN}', b'{"a": Infinity}', b'"\\ud800"', b"\xff", b"9" * 5000),
        *(b"[" * 60_000, b'{"a": ' * 10_000, b'{"a": 1, "a": 2}', b'{"a": [{"b": 1, "b": 1}]}'),
    ],
    ids=range(12),
)
def test_a_body_that_is_no_json_is_refused(scripted, body):
    answer = scripted.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "body"


def test_a_body_that_is_too_large_is_refused_before_it_is_read():
    with scripted_gateway(max_body_bytes=1000) as gateway:
        fits = {**CHAT, "user": "x" * (1000 - len(json.dumps(CHAT)) - len(', "user": ""'))}
        body = json.dumps(fits)
        assert gateway.http.post("/v1/chat/completions", content=body).status_code == 200
        answer = gateway.http.post("/v1/chat/completions", content=body + " ")
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


def connect(gateway, sent=b""):
    connection = socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port), timeout=WAIT_S)
    connection.sendall(sent)
    return contextlib.closing(connection)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"content-length: 100\r\n\r\n{"])
def test_a_request_that_does_not_come_is_not_waited_for_for_ever(sent):
    with scripted_gateway(receive_timeout_s=0.2) as gateway, connect(gateway, sent) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert (b"408" in answer) == (b"{" in sent)
        assert gateway.script.requests == []


def drip(connection):
    while True:
        connection.sendall(b"1\r\n[\r\n")
        with contextlib.suppress(TimeoutError):
            connection.recv(65536)


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/models", b"/v1/chat/completions"])
def test_a_body_without_an_end_is_not_read_for_ever_after_its_answer(path):
    with scripted_gateway(receive_timeout_s=0.2) as gateway:
        head = b"POST " + path + b" HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        with connect(gateway, head) as connection:
            assert connection.recv(65536).splitlines()[0].split()[1] in (b"404", b"405", b"408")
            connection.settimeout(0.05)
            with pytest.raises(ConnectionError):
                drip(connection)


def test_a_request_that_came_is_not_hurried():
    go_on = threading.Event()

    def generate(request, context):
        yield started()
        assert go_on.wait(WAIT_S)
        yield from itertools.islice(hello(request, context), 1, None)

    with scripted_gateway(receive_timeout_s=0.2, keep_alive_s=0.05) as gateway:
        gateway.script.generate = generate
        with gateway.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = answer.iter_lines()
            # Longer than a request may take to come.
            assert sum(1 for line in itertools.islice(lines, 30) if line == ": keep-alive") > 6
            go_on.set()
            assert "data: [DONE]" in lines
        assert gateway.http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_head_without_an_end_is_refused(scripted):
    with connect(scripted, HEAD + b"x: ") as connection, contextlib.suppress(ConnectionError):
        for _ in range(64):
            connection.sendall(b"x" * 65536)
        assert b"400" in connection.recv(65536).splitlines()[0]
    assert scripted.http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_callers_who_send_nothing_keep_nobody_from_being_served(scripted):
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            stack.enter_context(connect(scripted, HEAD[: number % len(HEAD)]))
        assert scripted.http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_body_that_breaks_off_is_no_request(scripted):
    with connect(scripted, HEAD + b"content-length: 100\r\n\r\n{"):
        pass
    assert scripted.http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert len(scripted.script.requests) == 1


def test_a_wrong_key_is_refused_before_a_large_body_has_come(scripted):
    scripted.script.unary = fail_with_unary(status(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"))
    head = HEAD + b"authorization: Bearer wrong\r\ncontent-length: 1000000\r\n\r\n"
    with connect(scripted, head + b"[" * 70_000) as connection:
        assert b"401" in connection.recv(65536).splitlines()[0]
    assert [metadata["authorization"] for metadata in scripted.script.metadata] == ["Bearer wrong"]


def test_a_large_body_is_parsed_like_a_small_one(scripted):
    scripted.script.unary = lambda _request, _context: model_pb2.ListModelsResponse()
    body = {**CHAT, "messages": [{"role": "user", "content": "x" * 200_000}]}
    assert scripted.http.post("/v1/chat/completions", json=body).status_code == 200
    assert scripted.http.post("/v1/chat/completions", json={**body, "n": "x"}).status_code == 400


def test_only_listed_origins_may_call():
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with scripted_gateway(cors_origins=("https://a.example",)) as gateway:
        asked = gateway.http.options("/v1/chat/completions", headers=headers)
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        other = gateway.http.options("/v1/chat/completions", headers={**headers, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
    with scripted_gateway() as gateway:
        assert (
            "access-control-allow-origin" not in gateway.http.options("/v1/chat/completions", headers=headers).headers
        )


def test_paths_and_methods_that_are_not_there_are_told_in_the_same_shape(scripted):
    for answer in (scripted.http.get("/v1/nothing"), scripted.http.get("/v1/chat/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_without_a_server_behind_it_the_answer_is_503():
    with scripted_gateway() as gateway:
        gateway.stop_server()
        answer = gateway.http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert gateway.http.get("/health").status_code == 503
        assert gateway.http.get("/version").status_code == 200


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("chat", "messages"),
        ("prompt", "messages"),
        ("chat.messages[1].tool_calls[0].arguments_json", "messages[1].tool_calls[0].function.arguments"),
        ("chat.messages[1].tool_calls[0].name", "messages[1].tool_calls[0].function.name"),
        ("chat.messages[1].name", "messages[1].name"),
        ("chat.messages[1].content_parts[0]", "messages[1].content[0]"),
        ("chat.template_kwargs_json", "chat_template_kwargs"),
        ("chat.continue_final_message", "continue_final_message"),
        ("output.prompt_logprobs", "prompt_logprobs"),
        ("add_special_tokens", "add_special_tokens"),
    ],
)
def test_no_field_is_called_what_the_contract_alone_calls_it(scripted, field, param):
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="is wrong")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    scripted.script.generate = fail_with(status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", bad))
    assert scripted.http.post("/v1/chat/completions", json=CHAT).json()["error"]["param"] == param


@pytest.mark.parametrize(("method", "path"), pages.ENDPOINTS)
def test_a_field_in_the_query_is_refused_where_it_does_nothing(scripted, method, path):
    query = QUERIES.get((method, path), NO_QUERY)
    for name in ("temperature", "limit"):
        if name not in query.fields:
            answer = scripted.http.request(method, path.format(id="x", name="tiny"), params={name: 1})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert scripted.script.requests == []


def test_a_parameter_of_the_query_that_no_api_has_is_passed_over(scripted):
    # As clients of Azure's send it with every request.
    version = {"api-version": "2024-06-01"}
    scripted.script.unary = lambda _request, _context: model_pb2.ListModelsResponse()
    for path, body in PATHS.items():
        assert scripted.http.post(path, json=body, params=version).status_code == 200
    made = scripted.http.post("/v1/responses", json=PATHS["/v1/responses"], params=version).json()["id"]
    for path in ("/v1/models", f"/v1/responses/{made}", f"/v1/responses/{made}/input_items", "/version"):
        assert scripted.http.get(path, params=version).status_code == 200
