"""The product from outside: the command line, the README's commands, signals, and clients that behave badly."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from nanoserve_client import AsyncClient, Client, DraftSource, NanoserveError
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc
from serve_process import free_port, serving, starting
from servers import ADMIN, USERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client


@pytest.fixture(scope="module")
def tiny():
    """A server whose cache is too small for what may run at once, and whose steps are for prompts in chunks."""
    limits = ("--max-num-seqs", "16", "--max-waiting", "40", "--max-num-batched-tokens", "64")
    cache = ("--kv-memory", "2400KB", "--max-context-tokens", "256", "--no-prefix-cache")
    with serving("--dtype", "float32", "--speculate", "off", *limits, *cache) as server:
        yield server


def wait_until_free(address):
    """All blocks free or cached, nothing running or waiting."""
    deadline = time.monotonic() + 20
    with Client(address) as client:
        while (stats := client.get_stats()).kv_blocks_used or stats.running or stats.waiting:
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)


def test_the_built_in_model_answers(client):
    result = client.chat("What is paged attention?", temperature=0, max_tokens=100).result()
    answer = result.completions[0]
    assert "block" in answer.text
    assert answer.finish_reason.name == "EOS"


def test_guesses_come_with_their_counts_and_change_no_text(tiny):
    question = "What is paged attention?"
    with Client(tiny.address) as client:

        def ask(**options):
            return client.chat(question, temperature=0, max_tokens=60, **options).result()

        plain = ask(max_draft_tokens=0)
        expected = plain.completions[0]
        assert plain.usage.drafts == {}
        # Whether guesses pay is for the server's clock to say, which needs a few answers.
        answers = [ask(prediction=expected.text) for _ in range(3)]
        while not (usage := answers[-1].usage).accepted_draft_tokens:  # the server makes no guesses of its own
            assert len(answers) < 30, "no guess was tried, or none was right"
            answers.append(ask(prediction=expected.token_ids))
        assert {answer.completions[0].text for answer in answers} == {expected.text}
        assert usage.accepted_draft_tokens <= min(usage.draft_tokens, usage.completion_tokens)
        assert set(usage.drafts) == {DraftSource.PREDICTION}
        assert ask().usage.drafts == {}
        with pytest.raises(NanoserveError, match="max_draft_tokens"):
            ask(max_draft_tokens=65)
        with pytest.raises(NanoserveError, match="predicted_token_ids"):
            ask(prediction=[10**6])


def test_the_readmes_python_runs_as_it_stands(served):
    block, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = block.replace("127.0.0.1:50051", served.address)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "block" in done.stdout


def test_the_readmes_curl_runs_as_it_stands(served):
    [command] = re.findall(r"(    \.venv/bin/buf curl .*?Generate)\n", README, re.DOTALL)
    command = command.replace("127.0.0.1:50051", served.address).replace(".venv/bin/", f"{BIN}/")
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '"finishReason": "FINISH_REASON_EOS"' in done.stdout
    assert '"finished"' in done.stdout


async def test_greedy_text_does_not_depend_on_what_else_is_in_the_batch(tiny):
    questions = ["What is paged attention?", "Hello!", "What is TTFT?", "What does make serve do?"] * 3

    async def ask(client, question):
        return (await client.chat(question, temperature=0, max_tokens=40).result()).completions[0].token_ids

    async with AsyncClient(tiny.address) as client:
        alone = [await ask(client, q) for q in questions[:4]]
        together = await asyncio.gather(*(ask(client, q) for q in questions))
    assert together == alone * 3


def test_clients_that_vanish_in_mid_stream_free_their_blocks(served):
    code = (
        "import sys, threading\n"
        "from nanoserve_client import Client\n"
        "client = Client(sys.argv[1])\n"
        "streams = [client.chat('Hello!', max_tokens=1500, ignore_eos=True) for _ in range(20)]\n"
        "[next(iter(s)) for s in streams]\n"
        "print('streaming', flush=True)\n"
        "threading.Event().wait()\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code, served.address], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "streaming\n"
    client.kill()
    client.wait()
    client.stdout.close()
    wait_until_free(served.address)


def test_a_deadline_of_one_millisecond_leaves_nothing_behind(served, client):
    for _ in range(20):
        with pytest.raises(NanoserveError) as failure:
            client.chat("Hello!", max_tokens=500, timeout=0.001).result()
        assert failure.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_free(served.address)


def test_a_reader_that_stops_reading_does_not_hold_up_others(served):
    with Client(served.address) as slow, Client(served.address) as fast:
        stalled = slow.chat("Hello!", max_tokens=1500, ignore_eos=True, n=4)
        next(iter(stalled))
        assert fast.chat("Hello!", max_tokens=20).result().usage.completion_tokens > 0
        stalled.cancel()
    wait_until_free(served.address)


def test_without_an_http_port_the_start_says_where_metrics_are(tiny):
    why = "not served without the HTTP port; a collector gets them if OTEL_EXPORTER_OTLP_ENDPOINT names one"
    tiny.wait_for(f"  metrics +{why}")


async def test_many_prompts_in_a_tiny_cache_all_finish(tiny):
    async with AsyncClient(tiny.address) as client:
        streams = [client.chat(f"Hello {i}!", max_tokens=80, ignore_eos=True) for i in range(40)]
        results = await asyncio.gather(*(s.result() for s in streams))
        assert [r.usage.completion_tokens for r in results] == [80] * 40
        assert (await client.get_stats()).preemptions > 0
    wait_until_free(tiny.address)


async def test_a_flood_is_served_or_refused_cleanly(tiny):
    async with AsyncClient(tiny.address) as client:
        streams = [client.chat("Hello!", max_tokens=8, timeout=60) for _ in range(200)]
        results = await asyncio.gather(*(s.result() for s in streams), return_exceptions=True)
    failures = [r for r in results if isinstance(r, BaseException)]
    assert all(f.code is grpc.StatusCode.RESOURCE_EXHAUSTED and f.reason == "OVERLOADED" for f in failures)
    assert len(failures) < len(results)
    with grpc.insecure_channel(tiny.address) as channel:
        stats = admin_pb2_grpc.AdminServiceStub(channel).GetStats(admin_pb2.GetStatsRequest())
    assert stats.kv_blocks_used == 0


def test_sigterm_lets_a_running_stream_finish_and_a_new_one_is_refused():
    with serving("--drain-timeout", "120") as server:
        with Client(server.address) as client:
            stream = client.chat("Hello!", max_tokens=300, ignore_eos=True)
            next(iter(stream))
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            with Client(server.address) as late, pytest.raises(NanoserveError) as refusal:
                late.chat("Hello!", timeout=1).result()
            assert refusal.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            assert stream.result().usage.completion_tokens == 300
        assert server.process.wait(60) == 0


def test_a_second_signal_ends_the_server_at_once_and_leaves_no_files(tmp_path):
    files = {"TMPDIR": str(tmp_path)}
    with serving("--http-port", f"{free_port()}", variables=files) as server, Client(server.address) as client:
        stream = client.chat("Hello!", max_tokens=1900, ignore_eos=True)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert list(tmp_path.glob("nanoserve-*"))
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        assert not list(tmp_path.glob("nanoserve-*"))
        with pytest.raises(NanoserveError):
            stream.result()


def test_a_signal_while_the_model_loads_ends_the_server():
    with starting() as server:
        server.wait_for("listening")
        assert server.end() == 0


def test_api_keys_part_callers_and_admins(guarded):
    def code_of(call):
        try:
            call()
        except NanoserveError as error:
            return error.code
        return grpc.StatusCode.OK

    expected = {
        None: (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAUTHENTICATED),
        "wrong": (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAUTHENTICATED),
        USERS[0]: (grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED),
        ADMIN: (grpc.StatusCode.OK, grpc.StatusCode.OK),
    }
    for key, codes in expected.items():
        with Client(guarded.address, api_key=key) as client:
            assert (code_of(client.list_models), code_of(client.get_stats)) == codes


def test_prefixes_are_not_shared_between_keys(guarded):
    prompt = list(range(10, 74))
    cached = []
    for key in (*USERS, USERS[0]):
        with Client(guarded.address, api_key=key) as client:
            cached.append(client.generate(prompt, max_tokens=1).result().usage.cached_tokens)
    assert cached == [0, 0, 48]


def test_threads_share_a_client(client):
    answers = []

    def ask():
        answers.append(client.chat("What is TTFT?", temperature=0, max_tokens=30).result().completions[0].text)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
