"""Abuse, from outside: bad requests, bad clients and full queues, against server processes.

Whatever was done to it, the server tells the one who did it what was wrong, keeps no block that nobody uses, and serves
the next caller. Deadlines of a millisecond and wrong keys are in test_serve.py, requests made at random in
test_soak.py, and those that a fuzzer finds in fuzz_request.py.
"""

import asyncio
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest
from caller import (
    GENERATE,
    OPTIONS,
    Caller,
    chat,
    code_of,
    endless,
    is_idle,
    num_live,
    num_tokens,
    occupied,
    port_of,
    short,
    until,
)
from failure import Failure
from google.protobuf.message import Message
from nanoserve_client import Client
from nanoserve_client.v1 import generation_pb2 as pb
from raw_http2 import ACK, DATA, GOAWAY, PING, RawConnection
from serve_process import ServeProcess, serving
from servers import ADMIN, USERS

CONTEXT, VOCAB_SIZE = 2048, 2560  # of the built-in model
NUM_CLIENTS = 200
UNKNOWN = b"\xd0\x3e\x01"  # field 1002, varint 1


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    with serving("--no-compile", "--max-num-seqs", str(NUM_CLIENTS), "--kv-memory", "256MiB") as server:
        yield server


@pytest.fixture
async def caller(server: ServeProcess) -> Any:
    async with grpc.aio.insecure_channel(server.address, OPTIONS) as channel:
        yield Caller(channel)
        assert await Caller(channel).is_served()
    await until(lambda: is_idle(server))


# ------------------------------------------------------------------------------------------------ bad requests


REFUSED: dict[str, tuple[str, Message]] = {
    "no prompt": ("prompt", pb.GenerateRequest()),
    "an empty text": ("text", short(text="")),
    "no token ids": ("token_ids.ids", short(text=None, token_ids=pb.TokenIds())),
    "no messages": ("chat.messages", short(text=None, chat=pb.Chat())),
    "an unknown role": ("chat.messages[0].role", short(text=None, chat=chat(99))),
    "temperature -1": ("sampling.temperature", short(sampling=pb.Sampling(temperature=-1))),
    "temperature NaN": ("sampling.temperature", short(sampling=pb.Sampling(temperature=math.nan))),
    "top_p -1": ("sampling.top_p", short(sampling=pb.Sampling(top_p=-1))),
    "17 stop strings": ("stopping.strings", short(stopping=pb.Stopping(strings=["x"] * 17))),
    "min_tokens above": ("stopping.min_tokens", short(stopping=pb.Stopping(max_tokens=0, min_tokens=1))),
    "a token id too high": ("token_ids.ids[1]", short(text=None, token_ids=pb.TokenIds(ids=[5, VOCAB_SIZE]))),
}
REFUSED_BYTES = {
    "an unknown field": ("1002", short().SerializeToString() + UNKNOWN),
    "invalid UTF-8": ("nanoserve.v1.GenerateRequest", b"\x1a\x02\xc3\x28"),
    "half a message": ("nanoserve.v1.GenerateRequest", b"\x1a\x7fHello!"),
    **{name: (field, request.SerializeToString()) for name, (field, request) in REFUSED.items()},
}


@pytest.mark.parametrize(("field", "data"), REFUSED_BYTES.values(), ids=REFUSED_BYTES)
async def test_a_bad_request_is_told_which_field_is_wrong(caller, field, data):
    refusal = await caller.refusal(data)
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert list(refusal.violations) == [field]


async def test_a_prompt_one_token_too_long_is_refused_and_one_shorter_gets_its_token(caller):
    ids = [5] * CONTEXT
    refusal = await caller.run(endless(text=None, token_ids=pb.TokenIds(ids=ids)))
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
    assert f"{CONTEXT} tokens" in refusal.message
    events = await caller.run(endless(text=None, token_ids=pb.TokenIds(ids=ids[1:])))
    assert num_tokens(events) == 1


async def test_an_unknown_model_is_not_found(caller):
    refusal = await caller.run(short(model="gpt-5"))
    assert (refusal.code.name, refusal.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_of_20_mb_is_refused_even_if_it_was_sent_as_a_few_kilobytes(caller, compression):
    refusal = await caller.refusal(short(text="a" * 20_000_000).SerializeToString(), compression)
    assert refusal.code.name == "RESOURCE_EXHAUSTED"


# ------------------------------------------------------------------------------------------------- bad clients


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        random.Random(0).randbytes(100_000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    ],
    ids=["HTTP/1.1", "noise", "a frame of 16 MB"],
)
@pytest.mark.usefixtures("caller")
async def test_bytes_that_are_no_http2_end_their_connection_alone(server, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    writer.write(data)
    async with asyncio.timeout(20):
        while await reader.read(1 << 16):
            pass
    writer.close()


async def test_streams_that_are_reset_as_soon_as_they_are_opened_cost_other_callers_nothing(server, caller):
    connection = await RawConnection.open(port_of(server))
    data = endless().SerializeToString()
    for _ in range(4000):
        connection.reset(connection.call(GENERATE, data))
    connection.ping()
    await connection.read_until(lambda frame: frame.kind == GOAWAY or (frame.kind == PING and frame.flags == ACK))
    others = await asyncio.gather(*(caller.run(short()) for _ in range(20)))
    assert set(map(code_of, others)) == {"OK"}
    await connection.close()


async def test_readers_that_stop_reading_hold_no_blocks_and_can_go_on_later(server, caller):
    # With so much to say of each token, the answer is larger than the windows of HTTP/2, which begin with 64 KiB.
    request = short(stopping=pb.Stopping(max_tokens=250, ignore_eos=True), output=pb.OutputOptions(logprobs=20))
    stalled = [await RawConnection.open(port_of(server)) for _ in range(3)]
    for connection in stalled:
        stream = connection.call(GENERATE, request.SerializeToString())
        await connection.read_until(lambda frame: frame.kind == DATA)
    assert await caller.is_served()
    await until(lambda: is_idle(server))
    for connection in stalled:
        connection.widen(stream)
        frames = await connection.answer(stream)
        await connection.close()
        events = list(messages_of(b"".join(frame.payload for frame in frames if frame.kind == DATA)))
        assert num_tokens(events) == 250
        assert len(events) < 250, "what was not read did not merge"


def messages_of(data: bytes) -> Iterator[pb.GenerateResponse]:
    """Each is a flag, its length, itself."""
    while data:
        end = 5 + int.from_bytes(data[1:5])
        yield pb.GenerateResponse.FromString(data[5:end])
        data = data[end:]


CLIENTS = """
import asyncio, sys
from raw_http2 import DATA, RawConnection

async def begin(port, method, message):
    connection = await RawConnection.open(port)
    connection.call(method, message)
    for _ in range(3):
        await connection.read_until(lambda frame: frame.kind == DATA)
    return connection

async def main(port, method, message, count):
    connections = await asyncio.gather(*(begin(port, method, message) for _ in range(count)))
    print("streaming", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(int(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4])))
"""


@pytest.mark.usefixtures("caller")
def test_two_hundred_clients_killed_in_mid_stream(server):
    arguments = [str(port_of(server)), GENERATE, endless().SerializeToString().hex(), str(NUM_CLIENTS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", CLIENTS, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as clients:
        assert clients.stdout is not None
        assert clients.stdout.readline() == "streaming\n"
        assert num_live(server) == NUM_CLIENTS
        clients.kill()
    # Left alone they would run for minutes; the fixture waits for less.


# ------------------------------------------------------------------------------------------------- full queues


@pytest.fixture
async def tenants(guarded: ServeProcess) -> Any:
    async with grpc.aio.insecure_channel(guarded.address, OPTIONS) as channel:
        yield tuple(Caller(channel, user) for user in USERS)
    await until(lambda: is_idle(guarded, ADMIN))


async def test_of_a_thousand_requests_a_hundred_wait_and_the_others_are_told_to_come_back(tenants):
    caller, _ = tenants
    async with occupied(caller):
        calls = [asyncio.create_task(caller.run(short())) for _ in range(1000)]
        await until(lambda: sum(call.done() for call in calls) == 900)
    outcomes = await asyncio.gather(*calls)
    assert Counter(map(code_of, outcomes)) == {"OK": 100, "RESOURCE_EXHAUSTED": 900}
    refusals = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert {refusal.reason for refusal in refusals} == {"OVERLOADED"}
    assert {refusal.trailers["grpc-retry-pushback-ms"] for refusal in refusals} == {"1000"}


async def test_tenants_share_one_queue_in_order_of_arrival_and_a_higher_priority_overtakes(guarded, tenants):
    flooder, other = tenants
    calls: list[tuple[str, asyncio.Task[Any]]] = []

    async def enqueue(name: str, caller: Caller, count: int, priority: int = 0) -> None:
        before = num_waiting(guarded)
        calls.extend((name, asyncio.create_task(caller.run(short(priority=priority)))) for _ in range(count))
        await until(lambda: num_waiting(guarded) == before + count)

    async with occupied(flooder):
        await enqueue("early", flooder, 10)
        await enqueue("other", other, 1)
        await enqueue("late", flooder, 10)
        await enqueue("urgent", other, 1, priority=1)
    begun = sorted([(begin_s(await call), name) for name, call in calls])
    assert [name for _, name in begun] == ["urgent", *["early"] * 10, "other", *["late"] * 10]


def num_waiting(server: ServeProcess) -> int:
    with Client(server.address, api_key=ADMIN) as client:
        return client.get_stats().waiting


def begin_s(events: list[pb.GenerateResponse]) -> float:
    """When the request was first scheduled, by the server's clock."""
    queue = events[-1].finished.timing.queue
    return events[0].started.create_time.ToNanoseconds() / 1e9 + queue.ToNanoseconds() / 1e9


# ------------------------------------------------------------------------------------------------------ fuzzing


@pytest.mark.soak
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_a_fuzzer_finds_no_request_that_fails_inside_the_server(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_request.py"), "-max_total_time=120"]
    done = subprocess.run([*command, f"-artifact_prefix={tmp_path}/"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
