"""The gateway as it is started: beside the gRPC port and alone; keys, floods, and two on one port."""

import collections
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from serve_process import free_port, starting

COMMAND = str(Path(sys.executable).parent / "nanoserve-gateway")
CHAT = {"model": "nanoserve-builtin", "messages": [{"role": "user", "content": "What is TTFT?"}], "max_tokens": 5}


def test_beside_the_grpc_port_keys_and_a_full_queue_are_the_services(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    port = free_port()
    arguments = ("--http-port", str(port), "--api-keys", str(tmp_path / "keys"), "--no-compile")
    with starting(*arguments, "--max-num-seqs", "1", "--max-waiting", "1") as server:
        url = f"http://127.0.0.1:{port}"
        server.wait_for("listening on")
        key = {"authorization": "Bearer secret"}
        early = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=key)
        assert early.status_code in (200, 503)
        server.wait_until_ready()
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 401
        wrong = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/v1/models").status_code == 401

        def call(_number):
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=key, timeout=60)
            return answer.status_code, "retry-after" in answer.headers

        with ThreadPoolExecutor(32) as pool:
            counts = collections.Counter(pool.map(call, range(64)))
        assert counts.keys() == {(200, False), (429, True)}
        assert call(0) == (200, False)
        assert server.end() == 0


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


def test_a_taken_port_is_told_of_with_what_would_do(served):
    port = served.url.rpartition(":")[2]
    with starting("--http-port", port) as server:
        server.wait_for(rf"cannot listen on 127.0.0.1:{port}: Address already in use; --http-port")
        assert server.process.wait(30) == 2
