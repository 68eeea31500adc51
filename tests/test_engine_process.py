"""The engine in a process of its own: what the server hears of it, and how either ends with the other."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import grpc
import pytest
from caller import OPTIONS, Caller, code_of, endless, is_idle, num_live, until
from failure import Failure
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve_process import ServeProcess, is_gone, serving, starting

from nanoserve.engine_process import _Speaker

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
# Runs in the engine's process alone.
IN_ENGINE = """
import os, signal, sys
if any("engine_process" in argument for argument in sys.orig_argv):
    {}
"""


# The engine's process hears of what is built, and says something before that.
LOUD = """
    import logging
    from nanoserve import build
    build_core = build.build_core
    def loud(*arguments, **options):
        logging.getLogger("loud").warning("a line of %d", os.getpid())
        return build_core(*arguments, **options)
    build.build_core = loud
"""

# Whoever closes a pipe takes his time.
SLOW_CLOSE = """
import multiprocessing.connection, time
def close(self, close=multiprocessing.connection.Connection._close):
    time.sleep(0.3)
    close(self)
multiprocessing.connection.Connection._close = close
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    """The last test that asks for it ends it."""
    arguments = ("--no-compile", "--kv-memory", "64MiB", "--step-timeout", "2")
    with serving(*arguments, sabotage=IN_ENGINE.format(LOUD.strip())) as server:
        yield server


@pytest.fixture
async def channel(server: ServeProcess) -> Any:
    async with grpc.aio.insecure_channel(server.address, OPTIONS) as channel:
        yield channel


async def health(channel: grpc.aio.Channel) -> int:
    request = health_pb2.HealthCheckRequest(service="nanoserve.v1.GenerationService")
    return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


async def wait_for_health(channel: grpc.aio.Channel, status: int) -> None:
    async with asyncio.timeout(30):
        while await health(channel) != status:
            await asyncio.sleep(0.02)


def test_what_the_engine_logs_is_in_the_servers_log(server):
    server.wait_for(rf"WARNING loud: a line of {server.engine_pid}$")


def test_the_server_does_without_torch(server):
    assert "libtorch" in Path(f"/proc/{server.engine_pid}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


async def test_an_engine_that_hangs_is_unhealthy_until_it_goes_on(server, channel):
    caller = Caller(channel)
    await wait_for_health(channel, SERVING)
    pid = server.engine_pid
    call = asyncio.create_task(caller.run(endless()))
    await until(lambda: num_live(server) == 1)
    os.kill(pid, signal.SIGSTOP)
    await wait_for_health(channel, NOT_SERVING)
    os.kill(pid, signal.SIGCONT)
    await wait_for_health(channel, SERVING)
    call.cancel()
    await until(lambda: is_idle(server))


async def test_an_engine_that_is_killed_fails_its_requests_and_ends_the_server(server, channel):
    caller = Caller(channel)
    calls = [asyncio.create_task(caller.run(endless())) for _ in range(4)]
    await until(lambda: num_live(server) == 4)
    os.kill(server.engine_pid, signal.SIGKILL)
    outcomes = [await call for call in calls]
    assert {o.reason for o in outcomes if isinstance(o, Failure)} == {"ENGINE_FAILURE"}
    assert set(map(code_of, outcomes)) == {"INTERNAL"}
    assert server.process.wait(30) == 1
    server.wait_for("the engine is gone; stopping")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_engine_ends_with_its_server_also_while_it_loads(number):
    with starting("--no-compile") as server:
        server.wait_for("importing torch")
        pid = server.engine_pid
        server.end(number)
        await until(lambda: is_gone(pid))


def test_an_orderly_stop_is_one_although_two_threads_close_the_pipe():
    with serving("--no-compile", sabotage=SLOW_CLOSE) as server:
        assert server.end() == 0, "".join(server.log)


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed, as the system does when memory runs out"),
        ("os.abort()", "killed by SIGABRT"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_an_engine_that_dies_while_it_loads_is_told_of_in_one_line(sabotage, words):
    with starting("--no-compile", sabotage=IN_ENGINE.format(sabotage)) as server:
        server.wait_for(f"nanoserve: the engine's process died while it loaded the model: {words}")
        assert server.process.wait(30) == 2


def test_no_step_waits_for_a_server_that_does_not_read() -> None:
    """More than the pipe holds is said, and all of it arrives, in order, before the process ends."""
    ours, theirs = Pipe()
    speaker = _Speaker(theirs)
    lines = [f"{number} {'x' * 100_000}" for number in range(50)]
    saying = threading.Thread(target=lambda: [speaker.say(line) for line in lines], daemon=True)
    saying.start()
    saying.join(20)
    assert not saying.is_alive(), "it waits for a reader"
    finishing = threading.Thread(target=speaker.finish, daemon=True)
    finishing.start()
    assert [ours.recv() for _ in lines] == lines
    finishing.join(20)
    assert not finishing.is_alive()
