"""The server as a process sees it: port, health, reflection, keepalive, and the way down."""

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import grpc
import pytest
from failure import failure
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import generation_pb2_grpc
from raw_http2 import ACK, GOAWAY, PING, RawConnection

from nanoserve.config import ConfigError, ServerConfig
from nanoserve.engine.stream import Delta, Finished, Started
from nanoserve.request import FinishReason
from nanoserve.rpc.server import OPTIONS, Server

HI = pb.GenerateRequest(text="hi")
SERVICES = [f"nanoserve.v1.{name}Service" for name in ("Admin", "Generation", "Model")]
STATUS = health_pb2.HealthCheckResponse
# The environment in which a child process finds what this one has.
CHILD_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(autouse=True)
def _quick_health(monkeypatch):
    monkeypatch.setattr("nanoserve.rpc.server.HEALTH_POLL_S", 0.02)


@pytest.fixture
async def serve():
    """Starts servers; returns each with its port."""
    servers = []

    async def start(engine: FakeEngine | None, **config) -> tuple[Server, int]:
        server = Server(ServerConfig(grpc_port=0, **config), engine)
        servers.append(server)
        return server, await server.start()

    yield start
    for server in servers:
        await server.stop()


# --------------------------------------------------------------------------------------------------- health


async def health(served, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(served.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_health(served, service: str, status: int) -> None:
    async with asyncio.timeout(20):
        while await health(served, service) != status:
            await asyncio.sleep(0.01)


async def test_readiness_follows_the_engine_down_and_up_again_and_liveness_stays(served):
    for service in SERVICES:
        assert await health(served, service) == STATUS.SERVING
    served.engine.why_not_ready = "no step has ended for 61 s"
    for service in SERVICES:
        await until_health(served, service, STATUS.NOT_SERVING)
    assert await health(served, "") == STATUS.SERVING
    served.engine.why_not_ready = None
    for service in SERVICES:
        await until_health(served, service, STATUS.SERVING)


async def test_the_health_of_an_unknown_service_is_not_found(served):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(served, "nanoserve.v1.Other")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_watch_sees_each_change(served):
    stub = health_pb2_grpc.HealthStub(served.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]), timeout=20)
    seen = [(await watch.read()).status]
    for why in ("stalled", None):
        served.engine.why_not_ready = why
        seen.append((await watch.read()).status)
    assert seen == [STATUS.SERVING, STATUS.NOT_SERVING, STATUS.SERVING]
    watch.cancel()


async def test_before_the_engine_is_loaded_callers_are_told_to_come_back(serve, engine, failure_of):
    server, port = await serve(None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        health_stub = health_pb2_grpc.HealthStub(channel)
        readiness = health_pb2.HealthCheckRequest(service=SERVICES[1])
        assert (await health_stub.Check(readiness)).status == STATUS.NOT_SERVING
        assert (await health_stub.Check(health_pb2.HealthCheckRequest())).status == STATUS.SERVING
        refusal = await failure_of(stub.Generate(HI))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert "loading" in refusal.message
        assert refusal.trailers["grpc-retry-pushback-ms"] == "2000"

        server.set_engine(engine)
        assert [e.WhichOneof("event") async for e in stub.Generate(HI)][-1] == "finished"
        watch = health_stub.Watch(readiness, timeout=20)
        while (await watch.read()).status != STATUS.SERVING:
            pass
        watch.cancel()


# ----------------------------------------------------------------------------------------------- reflection


async def test_reflection_lists_the_services(served):
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async for answer in stub.ServerReflectionInfo(iter(asked)):
        names = [service.name for service in answer.list_services_response.service]
    standard = ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    assert sorted(names) == standard + SERVICES


@pytest.mark.skipif(shutil.which("buf", path=Path(sys.executable).parent) is None, reason="buf is a dev tool")
async def test_buf_curl_generates_by_reflection_alone(served):
    events = await buf_curl(served.port, {"text": "hi", "stopping": {"maxTokens": 4}})
    assert [next(iter(event)) for event in events][-1] == "finished"
    assert "".join(event["delta"].get("text", "") for event in events if "delta" in event) == "naï"


async def buf_curl(port: int, request: dict) -> list[dict]:
    url = f"http://127.0.0.1:{port}/nanoserve.v1.GenerationService/Generate"
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "buf",
        *("curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request), url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    decoder, text, events = json.JSONDecoder(), out.decode().strip(), []
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:].strip()
    return events


# ------------------------------------------------------------------------------------------- the connection


async def test_a_port_in_use_is_one_clear_line(served):
    second = Server(ServerConfig(grpc_port=served.port), FakeEngine())
    with pytest.raises(ConfigError) as caught:
        await second.start()
    where = f"127.0.0.1:{served.port}"
    assert str(caught.value) == f"cannot listen on {where}: Address already in use; --grpc-port and --host choose where"


async def test_an_address_of_another_machine_is_one_clear_line():
    server = Server(ServerConfig(host="192.0.2.1", grpc_port=0), FakeEngine())
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0: Cannot assign"):
        await server.start()


async def test_a_port_that_is_taken_at_the_last_moment_is_not_shared(served, monkeypatch):
    """gRPC would share it by default, and each server get every other connection."""
    monkeypatch.setattr("nanoserve.rpc.server._try_to_bind", lambda _host, _port: None)
    second = Server(ServerConfig(grpc_port=served.port), FakeEngine())
    with pytest.raises(ConfigError, match="cannot listen"):
        await second.start()


async def test_ipv6_addresses_are_served(serve, engine):
    _, port = await serve(engine, host="::1")
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")


async def is_cut_for_pinging(port: int) -> bool:
    """Whether the server ends the connection after a dozen pings in a row."""
    connection = await RawConnection.open(port)
    try:
        for _ in range(12):
            connection.ping()
            answer = await connection.read_until(lambda f: f.kind in (GOAWAY, PING))
            if answer.kind == GOAWAY:
                assert b"too_many_pings" in answer.payload
                return True
            assert answer.flags & ACK
        return False
    finally:
        await connection.close()


@pytest.fixture
async def serve_with():
    """Starts bare gRPC servers with some options; returns the port of each."""
    servers = []

    async def start(*options) -> int:
        server = grpc.aio.server(options=options)
        servers.append(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return port

    yield start
    for server in servers:
        await server.stop(None)


async def test_clients_may_ping_as_they_like(served):
    assert await is_cut_for_pinging(served.port) is False


@pytest.mark.parametrize(
    ("options", "is_cut"),
    [
        ((), True),
        ((("grpc.http2.max_ping_strikes", 0),), False),
        ((("grpc.http2.min_ping_interval_without_data_ms", 0), ("grpc.keepalive_permit_without_calls", 1)), False),
        ((("grpc.http2.min_ping_interval_without_data_ms", 0),), True),
    ],
    ids=["default", "strikes", "interval and permit", "interval without permit"],
)
async def test_the_ping_options_are_ones_that_grpc_knows(serve_with, options, is_cut):
    """gRPC ignores a misspelt option without a word, so each is seen to make a difference."""
    assert {key for key, _ in options} <= {key for key, _ in OPTIONS}
    assert await is_cut_for_pinging(await serve_with(*options)) is is_cut


async def test_the_keepalive_option_makes_the_server_ping(serve_with):
    assert "grpc.keepalive_time_ms" in dict(OPTIONS)
    port = await serve_with(("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_permit_without_calls", 1))
    connection = await RawConnection.open(port)
    await connection.read_until(lambda f: f.kind == PING and not f.flags & ACK)
    await connection.close()


# ------------------------------------------------------------------------------------------------- the end


async def test_a_drain_finishes_running_requests_and_refuses_new_ones(serve, engine, failure_of, monkeypatch):
    # Readiness goes at once, not at the next poll.
    monkeypatch.setattr("nanoserve.rpc.server.HEALTH_POLL_S", 1000)
    was_refused = asyncio.Event()

    async def script(params):
        yield Started(1, 0, params)
        yield Delta(0, "a", [97])
        await was_refused.wait()
        yield Delta(0, "b", [98], finish_reason=FinishReason.LENGTH)
        yield Finished(1, 0, 2, 0.0, 0.0, 0.0, 0)

    engine.script = script
    server, port = await serve(engine, drain_timeout_s=60)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]))
        assert (await watch.read()).status == STATUS.SERVING
        running = stub.Generate(HI)
        assert (await running.read()).WhichOneof("event") == "started"

        stopping = asyncio.create_task(server.stop())
        async with asyncio.timeout(20):
            assert (await watch.read()).status == STATUS.NOT_SERVING
        refusal = await failure_of(stub.Generate(HI))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        was_refused.set()
        rest = []
        while (event := await running.read()) is not grpc.aio.EOF:
            rest.append(event.WhichOneof("event"))
        assert rest == ["delta", "delta", "finished"]
        assert await running.code() == grpc.StatusCode.OK
        await stopping
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_request_that_outlasts_the_drain_ends_with_an_error(serve, engine):
    async def endless(params):
        yield Started(1, 0, params)
        await asyncio.Event().wait()

    engine.script = endless
    server, port = await serve(engine, drain_timeout_s=0.05)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(HI)
        await call.read()
        await server.stop()
        assert await call.code() != grpc.StatusCode.OK
    assert engine.num_open == 0


CHILD = """
import asyncio
from fake_engine import FakeEngine
from nanoserve.config import ConfigError, ServerConfig
from nanoserve.rpc.server import Server

async def endless(params):
    from nanoserve.engine.stream import Started
    yield Started(1, 0, params)
    await asyncio.Event().wait()

async def main():
    engine = FakeEngine()
    engine.script = endless
    server = Server(ServerConfig(grpc_port=0, drain_timeout_s={drain_timeout_s}), engine)
    print(await server.start(), flush=True)
    await server.run_until_signal()
    print("stopped", flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def child_server():
    """Starts servers in processes of their own; returns the process and the port of each."""
    processes = []

    async def start(drain_timeout_s: float) -> tuple[asyncio.subprocess.Process, int]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CHILD.format(drain_timeout_s=drain_timeout_s)),
            env=CHILD_ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        return process, int(await process.stdout.readline())

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def last_words(process: asyncio.subprocess.Process) -> tuple[int | None, bytes]:
    """Its exit code and what it still printed."""
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_in_order(child_server, number):
    process, port = await child_server(drain_timeout_s=0.05)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(HI)
        await call.read()
        process.send_signal(number)
        assert await last_words(process) == (0, b"stopped\n")
        assert await call.code() != grpc.StatusCode.OK


async def generate_until_refused(stub) -> None:
    while True:
        call = stub.Generate(HI)
        await call.read()
        call.cancel()


async def test_a_second_signal_ends_the_process_at_once(child_server):
    process, port = await child_server(drain_timeout_s=1000)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        running = stub.Generate(HI)
        await running.read()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate_until_refused(stub)
        assert failure(caught.value).reason == "NOT_READY"
        process.send_signal(signal.SIGTERM)
        assert await last_words(process) == (128 + signal.SIGTERM, b"")
        assert await running.code() == grpc.StatusCode.UNAVAILABLE
