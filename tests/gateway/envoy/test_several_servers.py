"""Two servers behind Envoy: sessions stay, and a server may go while others call."""

import asyncio
import itertools
import signal
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from behind_envoy import scripted, standing_in
from caller import OPTIONS, Caller, code_of, is_idle, num_live, num_tokens, port_of, until
from envoy_process import fronting
from failure import Failure
from http_caller import send
from logged_process import LoggedProcess
from nanoserve_client.v1 import generation_pb2 as pb
from serve_process import starting

TESTS = Path(__file__).parents[2]
ANSWER_TOKENS = 30
NUM_CALLERS = 24


@pytest.fixture(scope="module")
def servers():
    with ExitStack() as stack:
        servers = [stack.enter_context(starting("--no-compile")) for _ in "ab"]
        for server in servers:
            server.wait_until_ready()
        yield servers


@pytest.fixture(scope="module")
def modules():
    with standing_in() as a, standing_in() as b:
        yield [a, b]


@pytest.fixture(scope="module")
def envoy(servers, modules):
    ports = {50051: port_of(servers[0]), 50052: port_of(servers[1]), 8000: modules[0].port, 8001: modules[1].port}
    with fronting(ports, "several-servers.yaml") as envoy:
        envoy.wait_until_healthy(2)
        yield envoy


@pytest.fixture
async def caller(envoy):
    """It retries nothing: what fails here has failed through Envoy."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{envoy.port}", OPTIONS) as channel:
        yield Caller(channel)


def request(num_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Hello!", stopping=pb.Stopping(max_tokens=num_tokens, ignore_eos=True))


async def server_of(caller, envoy, session=None):
    """The address of the server that a request of the session goes to."""
    label = str(uuid.uuid4())
    headers = {"x-request-id": label} | ({"x-nanoserve-session": session} if session else {})
    assert code_of(await caller.run(request(1), tuple(headers.items()))) == "OK"
    return envoy.access(label)["server"]


async def test_a_session_has_one_server_and_sessions_are_spread(caller, envoy, servers):
    # An odd number: taking turns would not look like it.
    sessions = [f"session-{i}" for i in range(15)]
    first = [await server_of(caller, envoy, session) for session in sessions]
    again = [await server_of(caller, envoy, session) for session in sessions]
    assert first == again
    assert set(first) == {server.address for server in servers}


async def test_a_session_has_the_same_server_through_the_openai_api_and_through_json(caller, envoy, servers, modules):
    beside = dict(zip([server.address for server in servers], [module.port for module in modules], strict=True))
    for session in ("alice", "bob", "carol", "dave", "erin"):
        address = await server_of(caller, envoy, session)
        headers = {"x-nanoserve-session": session}
        assert send(envoy.port, "/v1/models", None, headers).json == {"stand_in": beside[address]}
        label = str(uuid.uuid4())
        assert send(envoy.port, "/nanoserve/v1/models", None, {**headers, "x-request-id": label}).status == 200
        assert envoy.access(label)["server"] == address


async def test_requests_without_a_session_go_to_any_server(caller, envoy, servers):
    seen = {await server_of(caller, envoy) for _ in range(20)}
    assert seen == {server.address for server in servers}


# A server of the contract that lets every request wait.
HOLDER = f"""
import sys, threading
sys.path.insert(0, {str(TESTS)!r})
from behind_envoy import scripted

def hold(request, context):
    print("holding", flush=True)
    threading.Event().wait()
    yield

with scripted() as server:
    server.script.generate = hold
    print("port", server.port, flush=True)
    threading.Event().wait()
"""


async def test_what_waits_on_a_server_that_is_killed_is_served_by_another():
    with ExitStack() as stack:
        holder = LoggedProcess([sys.executable, "-c", HOLDER])
        stack.callback(holder.kill)
        other, module = stack.enter_context(scripted()), stack.enter_context(standing_in())
        ports = {50051: int(holder.wait_for(r"port (\d+)")[1]), 50052: other.port, 8000: module.port, 8001: module.port}
        envoy = stack.enter_context(fronting(ports, "several-servers.yaml"))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{envoy.port}", OPTIONS) as channel:
            caller = Caller(channel)
            calls = [asyncio.create_task(caller.run(request(1))) for _ in range(8)]
            # Several in one line, where its threads print at the same moment.
            await until(lambda: "".join(holder.log).count("holding") + len(other.script.requests) == 8)
            assert len(other.script.requests) < 8
            holder.process.kill()
            assert [code_of(outcome) for outcome in await asyncio.gather(*calls)] == ["OK"] * 8


async def test_a_server_goes_away_under_load_and_no_request_fails(caller, envoy, servers):
    leaving, staying = servers
    sessions = [f"session-{i}" for i in range(16)]
    its_sessions = [s for s in sessions if await server_of(caller, envoy, s) == leaving.address]
    outcomes = []
    has_gone = asyncio.Event()

    async def call(session):
        outcomes.append(await caller.run(request(ANSWER_TOKENS), (("x-nanoserve-session", session),)))

    async def call_again_and_again(name):
        for number in itertools.count():
            is_last = has_gone.is_set()
            await call(f"{name}-{number}")
            if is_last:
                break

    calls = [asyncio.create_task(call_again_and_again(i)) for i in range(NUM_CALLERS)]
    await until(lambda: num_live(leaving) >= 3 and num_live(staying) >= 3)
    leaving.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(leaving.wait_for, "draining")
    # Envoy may not know yet; then it sends these to it, and to the other one when they come back.
    await asyncio.gather(*map(call, its_sessions))
    assert await asyncio.to_thread(leaving.process.wait, 60) == 0
    has_gone.set()
    await asyncio.gather(*calls)

    assert {code_of(outcome) for outcome in outcomes} == {"OK"}, [o for o in outcomes if isinstance(o, Failure)]
    assert {num_tokens(outcome) for outcome in outcomes} == {ANSWER_TOKENS}
    await until(lambda: is_idle(staying))
    assert {await server_of(caller, envoy, session) for session in its_sessions} == {staying.address}
