"""`nanoserve serve` behind Envoy, as callers see it: gRPC with buf and the Python client, JSON, OpenAI's client."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from caller import port_of
from envoy_process import fronting
from http_caller import events, send, sending
from nanoserve_client import Client, InvalidRequest, NanoserveError, NotFound, Unauthenticated
from serve_process import free_port, serving

BUF = str(Path(sys.executable).parent / "buf")
GENERATE = "/nanoserve/v1/generate"
KEY = {"authorization": "Bearer user-key"}
QUESTION = {"chat": {"messages": [{"role": "ROLE_USER", "content": "What is TTFT?"}]}, "sampling": {"temperature": 0}}
ENDLESS = {"text": "Hello!", "stopping": {"ignore_eos": True}}
# How many requests the server runs, and how many may wait.
MAX_RUNNING = MAX_WAITING = 2
# Of the OpenAI module.
HTTP_PORT = free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    keys, admins = (tmp_path_factory.mktemp("keys") / name for name in ("users", "admins"))
    keys.write_text("user-key\n")
    admins.write_text("admin-key\n")
    limits = ["--max-num-seqs", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING)]
    files = ["--api-keys", str(keys), "--admin-keys", str(admins), "--http-port", str(HTTP_PORT)]
    with serving("--dtype", "float32", *files, *limits) as server:
        yield server


@pytest.fixture(scope="module")
def envoy(server):
    with fronting({50051: port_of(server), 8000: HTTP_PORT}) as envoy:
        envoy.wait_until_healthy(1)
        yield envoy


@pytest.fixture
def client(envoy):
    with Client(f"127.0.0.1:{envoy.port}", api_key="user-key") as client:
        yield client


@pytest.fixture
def admin(server):
    """Speaks to the server itself."""
    with Client(server.address, api_key="admin-key") as admin:
        yield admin


@pytest.fixture(autouse=True)
def tidy(admin):
    """No test leaves a request or a block behind."""
    yield
    wait_until(admin, lambda stats: not (stats.kv_blocks_used or stats.running or stats.waiting))


def wait_until(admin, holds):
    deadline = time.monotonic() + 20
    while not holds(stats := admin.get_stats()):
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)


def curl(envoy, method, request, *arguments):
    """What buf makes of a call. It knows the contract from the server's reflection."""
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request), *arguments]
    return subprocess.run(
        [*command, f"http://127.0.0.1:{envoy.port}/{method}"], capture_output=True, text=True, check=False, timeout=60
    )


# -------------------------------------------------------------------------------------------------------- gRPC


def test_buf_curl_streams_an_answer(envoy):
    done = curl(envoy, "nanoserve.v1.GenerationService/Generate", QUESTION, "-H", "authorization: Bearer user-key")
    assert done.returncode == 0, done.stderr
    messages = json.loads("[" + done.stdout.replace("\n}\n{", "\n},\n{") + "]")
    assert "time to first token" in "".join(m.get("delta", {}).get("text", "") for m in messages)
    assert messages[-1].keys() == {"finished"}


def test_buf_curl_sees_health_without_a_key(envoy):
    done = curl(envoy, "grpc.health.v1.Health/Check", {"service": "nanoserve.v1.GenerationService"})
    assert json.loads(done.stdout) == {"status": "SERVING"}


def test_the_python_client_gets_what_it_gets_from_the_server_itself(client, server):
    with Client(server.address, api_key="user-key") as direct:
        answers = [c.chat("What is RoPE?", temperature=0).result().completions[0].text for c in (direct, client)]
    assert answers[0] == answers[1]
    assert "rotates" in answers[0]


# -------------------------------------------------------------------------------------------------------- JSON


def test_json_streams_the_same_answer_as_server_sent_events(envoy, client):
    with sending(envoy.port, GENERATE, QUESTION, KEY) as response:
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
        first, *deltas, last = events(response)
    assert first["started"]["prompt_tokens"] == 12
    assert deltas[-1]["delta"]["finish_reason"] == "FINISH_REASON_EOS"
    assert last["finished"]["usage"]["completion_tokens"] == sum(len(d["delta"]["token_ids"]) for d in deltas)
    text = "".join(d["delta"].get("text", "") for d in deltas)
    assert text == client.chat("What is TTFT?", temperature=0).result().completions[0].text


def test_events_come_one_by_one(envoy, admin):
    with sending(envoy.port, GENERATE, ENDLESS, KEY) as response:
        stream = events(response)
        assert [next(iter(next(stream))) for _ in range(3)] == ["started", "delta", "delta"]
        assert admin.get_stats().running == 1


def test_json_lists_models_and_tokenizes(envoy):
    [model] = send(envoy.port, "/nanoserve/v1/models", None, KEY).json["models"]
    assert (model["name"], model["max_context_tokens"]) == ("nanoserve-builtin", 2048)
    tokens = send(envoy.port, "/nanoserve/v1/tokenize", {"text": "What is TTFT?"}, KEY).json
    back = send(envoy.port, "/nanoserve/v1/detokenize", {"token_ids": tokens["token_ids"]}, KEY).json
    assert back == {"text": "What is TTFT?"}


def test_json_drops_a_misspelt_field_as_the_page_says(envoy):
    """Not what one would wish: when Envoy learns to refuse it, the page and this change."""
    answer = send(envoy.port, "/nanoserve/v1/tokenize", {"text": "x", "modell": "gpt-5"}, KEY)
    assert answer.status == 200


# -------------------------------------------------------------------------------------------------- rejections


def details_of(answer):
    """google.rpc's details by their name."""
    return {detail["@type"].rpartition(".")[2]: detail for detail in answer.json["details"]}


def test_400_names_each_violation(envoy, client):
    answer = send(envoy.port, GENERATE, {"text": "x", "sampling": {"temperature": -1, "top_p": 2}}, KEY)
    assert (answer.status, answer.json["code"]) == (400, grpc.StatusCode.INVALID_ARGUMENT.value[0])
    details = details_of(answer)
    assert details["ErrorInfo"]["reason"] == "INVALID_REQUEST"
    fields = [violation["field"] for violation in details["BadRequest"]["field_violations"]]
    assert fields == ["sampling.temperature", "sampling.top_p"]
    with pytest.raises(InvalidRequest) as failure:
        client.generate("x", temperature=-1, top_p=2.0).result()
    assert [field for field, _ in failure.value.violations] == fields


def test_400_for_a_prompt_that_is_too_long(envoy):
    answer = send(envoy.port, GENERATE, {"text": "word " * 500_000}, KEY)
    assert (answer.status, details_of(answer)["ErrorInfo"]["reason"]) == (400, "CONTEXT_LENGTH_EXCEEDED")


def test_429_for_a_prompt_that_the_servers_transport_does_not_take(envoy):
    answer = send(envoy.port, GENERATE, {"text": "x" * (17 * 2**20)}, KEY)
    assert (answer.status, answer.json.keys()) == (429, {"code", "message"})


def test_401_for_a_wrong_key(envoy):
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = send(envoy.port, "/nanoserve/v1/models", None, headers)
        assert (answer.status, details_of(answer)["ErrorInfo"]["reason"]) == (401, "UNAUTHENTICATED")
    with Client(f"127.0.0.1:{envoy.port}") as client, pytest.raises(Unauthenticated) as failure:
        client.list_models()
    assert failure.value.reason == "UNAUTHENTICATED"


def test_404_for_a_model_that_is_not_there(envoy, client):
    answer = send(envoy.port, GENERATE, {"text": "x", "model": "gpt-5"}, KEY)
    assert (answer.status, details_of(answer)["ResourceInfo"]["resource_name"]) == (404, "gpt-5")
    with pytest.raises(NotFound) as failure:
        client.generate("x", model="gpt-5").result()
    assert failure.value.reason == "MODEL_NOT_FOUND"


def test_429_says_when_to_come_again(envoy, client, admin):
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_RUNNING + MAX_WAITING):
            stack.callback(client.generate("Hello!", ignore_eos=True).cancel)
        wait_until(admin, lambda stats: (stats.running, stats.waiting) == (MAX_RUNNING, MAX_WAITING))
        answer = send(envoy.port, GENERATE, {"text": "x"}, KEY)
        assert answer.status == 429
        details = details_of(answer)
        assert details["ErrorInfo"]["reason"] == "OVERLOADED"
        assert float(details["RetryInfo"]["retry_delay"].removesuffix("s")) > 0
        label = str(uuid.uuid4())
        with pytest.raises(NanoserveError) as failure:
            client.generate("x", request_id=label, timeout=0.3).result()
        assert failure.value.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert envoy.access(label)["attempts"] == 1, "the client tries again when the server says, not Envoy"
        done = curl(
            envoy, "nanoserve.v1.GenerationService/Generate", {"text": "x"}, "-H", "authorization: Bearer user-key"
        )
        refusal = json.loads(done.stderr)
        assert refusal["code"] == "resource_exhausted"
        assert "google.rpc.RetryInfo" in [detail["type"] for detail in refusal["details"]]


# ------------------------------------------------------------------------------------------------ going away

VANISHING = """
import sys, threading
from nanoserve_client import Client
client = Client(sys.argv[1], api_key="user-key")
stream = client.generate("Hello!", ignore_eos=True)
next(iter(stream))
print("streaming", flush=True)
threading.Event().wait()
"""


def test_a_client_that_is_killed_frees_its_blocks(envoy, admin):
    command = [sys.executable, "-c", VANISHING, f"127.0.0.1:{envoy.port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
        assert admin.get_stats().kv_blocks_used > 0
        client.kill()
    wait_until(admin, lambda stats: stats.kv_blocks_used == 0)


def test_so_does_a_json_client_that_hangs_up(envoy, admin):
    with sending(envoy.port, GENERATE, ENDLESS, KEY) as response:
        next(events(response))
        assert admin.get_stats().kv_blocks_used > 0
    wait_until(admin, lambda stats: stats.kv_blocks_used == 0)


def test_a_deadline_frees_them_too(envoy, client, admin):
    with pytest.raises(NanoserveError) as failure:
        client.generate("Hello!", ignore_eos=True, timeout=0.5).result()
    assert failure.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(admin, lambda stats: stats.kv_blocks_used == 0)
    answer = send(envoy.port, GENERATE, ENDLESS, {**KEY, "grpc-timeout": "1m"})
    assert answer.status == 504


def test_envoy_keeps_a_deadline_for_which_the_server_is_not_awake(envoy, server):
    server.process.send_signal(signal.SIGSTOP)
    try:
        answer = send(envoy.port, GENERATE, ENDLESS, {**KEY, "grpc-timeout": "300m"})
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert (answer.status, answer.json) == (504, {"message": "downstream duration timeout"})


# -------------------------------------------------------------------------------------------- OpenAI's own client


@pytest.fixture
def openai_client(envoy):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{envoy.port}/v1", api_key="user-key") as client:
        yield client


def ask(client, **options):
    messages = [{"role": "user", "content": "What is TTFT?"}]
    return client.chat.completions.create(model="nanoserve-builtin", messages=messages, temperature=0, **options)


def test_openais_client_gets_the_same_answer_streamed_or_not(openai_client):
    whole = ask(openai_client).choices[0].message.content
    assert "time to first token" in whole
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(openai_client, stream=True, extra_body={"max_draft_tokens": 0})
    ]
    assert len(chunks) > 5, "it came at once"
    assert "".join(chunks) == whole


def test_openais_client_gets_responses_and_models(openai_client):
    response = openai_client.responses.create(model="nanoserve-builtin", input="What is RoPE?", temperature=0)
    assert "rotates" in response.output_text
    assert [model.id for model in openai_client.models.list()] == ["nanoserve-builtin"]


def test_openais_client_gets_errors_as_its_own_exceptions(openai_client):
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(openai_client, top_p=2)
    assert refusal.value.param == "top_p"
    with pytest.raises(openai.AuthenticationError):
        ask(openai_client.with_options(api_key="wrong"))


def test_envoy_goes_by_any_name_but_no_page_calls_through_it(envoy):
    url = f"http://127.0.0.1:{envoy.port}/v1/models"
    statuses = [
        httpx.get(url, headers={**KEY, "host": "api.example", **origin}).status_code
        for origin in ({}, {"origin": "https://evil.example"})
    ]
    assert statuses == [200, 403]


def test_a_stream_that_openais_client_closes_frees_its_blocks(openai_client, admin):
    stream = ask(openai_client, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    wait_until(admin, lambda stats: stats.running == 1)
    stream.close()
    wait_until(admin, lambda stats: not (stats.running or stats.kv_blocks_used))
