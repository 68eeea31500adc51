"""The gateway as it is started: beside the gRPC port and alone; keys, floods, and two on one port."""

import asyncio
import collections
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from authority import Authority
from caller import Caller, occupied, until
from logged_process import LoggedProcess
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.server import main
from serve_process import free_port, serving, starting
from servers import MAX_WAITING, USERS

from nanoserve.config import ServerConfig

COMMAND = str(Path(sys.executable).parent / "nanoserve-gateway")
CHAT = {"model": "nanoserve-builtin", "messages": [{"role": "user", "content": "What is TTFT?"}], "max_tokens": 5}
KEY = {"authorization": f"Bearer {USERS[0]}"}


def test_keys_are_the_services(guarded):
    with httpx.Client(base_url=f"{guarded.url}/v1", timeout=60) as http:
        assert http.post("/chat/completions", json=CHAT).status_code == 401
        wrong = http.post("/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.get("/models").status_code == 401
        assert http.post("/chat/completions", json=CHAT, headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        (["ok", [1, 2, 99999]], "prompt[1][2]"),
        (["a", "b", ""], "prompt[2]"),
        (["a", []], "prompt[1]"),
        ([[1, 99999]], "prompt[1]"),
        ("", "prompt"),
    ],
)
def test_of_several_prompts_an_error_names_the_one(served, prompts, param):
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": prompts, "max_tokens": 1}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_full_queue_is_the_services(guarded):
    limits = httpx.Limits(max_connections=None)
    async with (
        grpc.aio.insecure_channel(guarded.address) as channel,
        httpx.AsyncClient(base_url=guarded.url, headers=KEY, timeout=60, limits=limits) as http,
    ):
        async with occupied(Caller(channel, USERS[0])):
            calls = [asyncio.create_task(http.post("/v1/chat/completions", json=CHAT)) for _ in range(MAX_WAITING + 30)]
            await until(lambda: sum(call.done() for call in calls) == 30)
        answers = [await call for call in calls]
    counts = collections.Counter((answer.status_code, "retry-after" in answer.headers) for answer in answers)
    assert counts == {(200, False): MAX_WAITING, (429, True): 30}


def test_alone_it_needs_the_address_of_a_server(served):
    port = str(free_port())
    gateway = subprocess.Popen([COMMAND, "--target", served.address, "--port", port], stderr=subprocess.PIPE, text=True)
    try:
        assert gateway.stderr is not None
        assert re.search(rf"listening on http://127.0.0.1:{port}", gateway.stderr.readline())
        assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT).status_code == 200
        second = subprocess.run(
            [COMMAND, "--target", served.address, "--port", port], capture_output=True, text=True, check=False
        )
        assert second.returncode != 0
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in second.stderr
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) in (0, -signal.SIGTERM)
    finally:
        gateway.kill()
        gateway.communicate()


def test_alone_it_stops_when_requests_have_ended_and_pages_do_not_hold_it_up(served):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    gateway = LoggedProcess([COMMAND, "--target", served.address, "--port", str(port)])
    try:
        gateway.wait_for("listening on")
        # Well within the time that is given to requests at the end, also on a busy machine.
        long = {**CHAT, "stream": True, "max_tokens": 400, "ignore_eos": True}
        with (
            httpx.stream("GET", f"{url}/live/events", timeout=60) as page,
            httpx.stream("POST", f"{url}/v1/chat/completions", json=long, timeout=60) as answer,
        ):
            snapshots, deltas = page.iter_raw(), answer.iter_raw()
            next(snapshots)
            next(deltas)
            gateway.process.send_signal(signal.SIGTERM)
            # The page's stream comes to its end; one that was cut off would raise.
            for _ in snapshots:
                pass
            assert b"".join(deltas).endswith(b"data: [DONE]\n\n")
        assert gateway.process.wait(60) in (0, -signal.SIGTERM)
        # What uvicorn would say of a stream that it had to cut off.
        assert not any("Cancel" in line or "without completing" in line for line in gateway.log)
    finally:
        gateway.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "--port: it is '65536'; it must be a port, 0 to 65535"),
        (["--max-body", "0"], "--max-body: it is '0'; it must be a number of bytes, at least 1"),
        (["--timeout", "nan"], "--timeout: it is 'nan'; it must be seconds, above 0"),
        (["--client-cert", __file__], "--client-cert and --client-key go together"),
        (["--tls-ca", "/nowhere"], "cannot read /nowhere: No such file or directory"),
    ],
)
def test_alone_it_tells_of_a_wrong_option_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["--target", "127.0.0.1:1", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_alone_and_beside_the_grpc_port_it_has_the_same_defaults():
    alone, beside = GatewayConfig(target=""), ServerConfig()
    assert (alone.max_body_bytes, alone.timeout_s) == (beside.http_max_body_bytes, beside.http_timeout_s)


def test_where_callers_need_certificates_it_is_not_served_and_the_start_says_so(tmp_path):
    authority = Authority(tmp_path, "some")
    certificate, key = map(str, authority.issue("server"))
    port = free_port()
    arguments = ("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", str(authority.ca))
    with starting("--http-port", str(port), *arguments, "--no-compile") as server:
        why = "not served: it cannot ask for certificates, as --tls-client-ca wants"
        server.wait_for(f"OpenAI's API is {why}")
        server.wait_for(f"OpenAI +{why}")
        server.wait_for("metrics +not served without the HTTP port")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_server_that_is_ended_leaves_no_files_and_one_with_a_certificate_is_served_in_the_clear(tmp_path):
    authority = Authority(tmp_path, "some")
    certificate, key = map(str, authority.issue("server"))
    arguments = ("--http-port", str(free_port()), "--tls-cert", certificate, "--tls-key", key, "--no-compile")
    with serving(*arguments, variables={"TMPDIR": str(tmp_path)}) as server:
        server.wait_until_ready_over_http()
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200
        assert list(tmp_path.glob("nanoserve-*/grpc"))
        assert server.end() == 0
        assert not list(tmp_path.glob("nanoserve-*"))


def test_a_server_that_is_ended_while_it_loads_answers_before_and_leaves_no_files(tmp_path):
    port = free_port()
    with starting("--http-port", str(port), "--no-compile", variables={"TMPDIR": str(tmp_path)}) as server:
        server.wait_for("listening on")
        early = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT)
        assert early.status_code in (200, 503)
        assert list(tmp_path.glob("nanoserve-*/grpc"))
        assert server.end() == 0
        assert not list(tmp_path.glob("nanoserve-*"))


def test_a_taken_port_is_told_of_with_what_would_do(served):
    port = served.url.rpartition(":")[2]
    with starting("--http-port", port) as server:
        server.wait_for(rf"cannot listen on 127.0.0.1:{port}: Address already in use; --http-port")
        assert server.process.wait(30) == 2
