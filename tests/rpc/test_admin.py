"""WatchEngine and ExplainRequest over gRPC, with a real engine behind them; and readers who misbehave."""

import asyncio
import contextlib
import dataclasses
import math
import re
import time

import grpc
import pytest
from engine_bench import SECONDS, running
from google.protobuf.duration_pb2 import Duration
from nanoserve_client import AsyncClient, InvalidRequest, NanoserveError, NotFound, TimelineEnd
from nanoserve_client import watching as client_watching
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc

from nanoserve.config import ServerConfig
from nanoserve.flight_recorder.recorder import FlightRecorder
from nanoserve.flight_recorder.timeline import WAIT_REASONS, WANTED
from nanoserve.observer import Observers
from nanoserve.rpc import admin
from nanoserve.rpc.server import Server
from nanoserve.step_record import WaitReason

PROMPT = list(range(20))


@dataclasses.dataclass
class Watched:
    bench: object
    recorder: FlightRecorder
    client: AsyncClient
    target: str


@contextlib.asynccontextmanager
async def watched(*, keys=None, **options):
    """A bench with a gRPC server before it, as `nanoserve serve` ties them together."""
    recorder = FlightRecorder()
    observers = Observers(recorder)
    async with running(observers=observers, **options) as bench:
        config = ServerConfig(grpc_port=0, drain_timeout_s=0, **(keys or {}))
        server = Server(config, bench.engine, observers=observers, recorder=recorder)
        target = f"127.0.0.1:{await server.start()}"
        try:
            async with AsyncClient(target, retries=False) as client:
                yield Watched(bench, recorder, client, target)
        finally:
            await server.stop()


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


async def test_the_first_snapshot_comes_at_once_and_the_next_ones_have_the_steps_since():
    async with watched() as served, served.client.watch_engine(interval=0.05) as watch:
        first = await anext(watch)
        assert (first.stats.running, first.sequences, first.steps) == (0, (), ())
        generation = asyncio.create_task(served.client.generate(PROMPT, max_tokens=6, request_id="mine").result())
        numbers, ids = [], set()
        async for snapshot in watch:
            numbers += [step.number for step in snapshot.steps]
            ids |= {(sequence.request_id, sequence.request_number) for sequence in snapshot.sequences}
            assert snapshot.lost_steps == 0
            if generation.done() and len(numbers) == 6:
                break
        assert numbers == [1, 2, 3, 4, 5, 6]
        assert ids == {("mine", 1)}


async def test_neither_prompt_nor_completion_is_in_a_snapshot_or_a_timeline():
    async with watched() as served:
        served.bench.executor.gate.clear()
        prompt = "a very secret prompt"
        generation = asyncio.create_task(served.client.generate(prompt, max_tokens=8, stop=["hidden"]).result())
        await until(lambda: served.bench.executor.num_begun)
        async with grpc.aio.insecure_channel(served.target) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            watch = stub.WatchEngine(admin_pb2.WatchEngineRequest())
            raw = (await anext(aiter(watch))).SerializeToString()
            served.bench.executor.gate.set()
            result = await generation
            asked = admin_pb2.ExplainRequestRequest(request_id=result.started.request_id)
            raw += (await stub.ExplainRequest(asked)).SerializeToString()
            assert result.started.request_id.encode() in raw
        for secret in ("secret", "hidden", result.text):
            assert secret.encode() not in raw


@pytest.mark.parametrize("interval", [0.0, 0.049, 60.1, -1.0])
async def test_the_interval_has_limits(interval):
    async with watched() as served:
        with pytest.raises(InvalidRequest) as caught:
            await anext(served.client.watch_engine(interval=interval))
        [(field, description)] = caught.value.violations
        assert field == "interval"
        assert "allowed: 0.05 to 60" in description


async def test_an_interval_that_is_none_is_refused():
    async with watched() as served, grpc.aio.insecure_channel(served.target) as channel:
        request = admin_pb2.WatchEngineRequest(interval=Duration(seconds=1, nanos=-5))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(admin_pb2_grpc.AdminServiceStub(channel).WatchEngine(request)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_timeline_over_grpc():
    async with watched() as served:
        await served.client.generate(PROMPT, max_tokens=4, request_id="mine").result()
        # The caller has its last message before the server has closed the books.
        timeline = None
        while timeline is None or not timeline.ended:
            [timeline] = await served.client.explain_request("mine")
        assert (timeline.prompt_tokens, timeline.completion_tokens, timeline.request_number) == (20, 4, 1)
        assert [entry.text for entry in timeline.entries][-1] == "it ended: length"
        assert "Prefilled in 1 chunk. Generated 4 tokens in" in timeline.summary
        assert abs((timeline.create_time.timestamp() + timeline.duration_s) - time.time()) < SECONDS


async def test_an_unknown_id_is_not_found():
    async with watched() as served:
        with pytest.raises(NotFound) as caught:
            await served.client.explain_request("never-heard")
        assert caught.value.reason == "REQUEST_NOT_FOUND"
        assert "never-heard" in caught.value.message
        with pytest.raises(InvalidRequest) as caught:
            await served.client.explain_request("")
        assert [field for field, _ in caught.value.violations] == ["request_id"]


async def test_the_id_of_a_refused_request_is_explained():
    async with watched() as served:
        with pytest.raises(InvalidRequest):
            await served.client.generate(PROMPT, temperature=-1, request_id="bad").result()
        await until(lambda: served.recorder.explain("bad"))
        [timeline] = await served.client.explain_request("bad")
        assert timeline.entries[0].text == "it was refused: INVALID_ARGUMENT (INVALID_REQUEST)"
        assert timeline.entries[0].event == TimelineEnd((), "INVALID_REQUEST", False)


async def test_without_records_it_says_so():
    async with running() as bench:
        server = Server(ServerConfig(grpc_port=0, drain_timeout_s=0), bench.engine)
        async with AsyncClient(f"127.0.0.1:{await server.start()}", retries=False) as client:
            for call in (client.explain_request("x"), anext(client.watch_engine())):
                with pytest.raises(NanoserveError) as caught:
                    await call
                assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_RECORDED")
        await server.stop()


async def test_both_take_an_admin_key(tmp_path):
    (tmp_path / "keys").write_text("ordinary")
    (tmp_path / "admins").write_text("boss")
    keys = {"api_keys": tmp_path / "keys", "admin_keys": tmp_path / "admins"}
    async with watched(keys=keys) as served:
        for key, reason in ((None, "UNAUTHENTICATED"), ("wrong", "UNAUTHENTICATED"), ("ordinary", "PERMISSION_DENIED")):
            async with AsyncClient(served.target, api_key=key, retries=False) as client:
                for call in (client.explain_request("x"), anext(client.watch_engine())):
                    with pytest.raises(NanoserveError) as caught:
                        await call
                    assert caught.value.reason == reason
        async with AsyncClient(served.target, api_key="boss", retries=False) as client:
            assert (await anext(client.watch_engine())).stats.running == 0


async def test_a_watcher_who_does_not_read_gets_no_more_and_misses_no_step(monkeypatch):
    """Snapshots are made as they are read, not queued; the steps that it missed come with the next, or are counted."""
    made = []
    snapshot = FlightRecorder.snapshot
    monkeypatch.setattr(FlightRecorder, "snapshot", lambda *args: made.append(snapshot(*args)) or made[-1])
    # As often as it asked for, however long the making takes.
    monkeypatch.setattr(admin, "WATCHERS_SHARE", math.inf)
    async with watched(max_waiting=1000) as served:
        # Large snapshots, so that what lies between server and reader is soon full.
        served.bench.executor.gate.clear()
        tasks = [
            asyncio.create_task(served.client.generate(PROMPT, max_tokens=2, request_id=f"{i:x>128}").result())
            for i in range(400)
        ]
        await until(lambda: served.bench.executor.num_begun)
        await until(lambda: len(served.recorder._live) == 400)
        watch = served.client.watch_engine(interval=0.05)
        await until(lambda: len(made) > 3)
        count = 0
        async with asyncio.timeout(60):
            while count < len(made):
                count = len(made)
                # Twenty intervals.
                await asyncio.sleep(1)
        served.bench.executor.gate.set()
        await asyncio.gather(*tasks)
        assert len(made) <= count + 1
        seen, lost = [], 0
        last = served.recorder._num_steps
        async for each in watch:
            seen += [step.number for step in each.steps]
            lost += each.lost_steps
            if len(seen) + lost >= last:
                break
        assert seen == sorted(set(seen))
        watch.cancel()


async def test_what_the_queue_waits_for_is_told_in_words():
    async with watched(max_num_seqs=1) as served, served.client.watch_engine(interval=0.05) as watch:
        permits = served.bench.executor.count_steps()
        ask = served.client.generate
        tasks = [asyncio.create_task(ask(PROMPT, max_tokens=20, request_id=name).result()) for name in ("one", "two")]
        await until(lambda: len(served.bench.engine._streams) == 2)
        permits.release(3)  # so that the one in front is still there when its name is looked up
        async for snapshot in watch:
            waits = [step.wait for step in snapshot.steps if step.wait]
            if waits:
                break
        permits.release(100)
        await asyncio.gather(*tasks)
        assert re.fullmatch("one of the running sequences to end behind request (one|two)", waits[0].text)


def test_where_many_watch_or_a_snapshot_takes_long_they_come_less_often():
    assert admin._pause_s(interval_s=0.05, took_s=0.002, num_watchers=1) == 0.05
    assert admin._pause_s(interval_s=0.05, took_s=0.002, num_watchers=50) == pytest.approx(50 * 0.002 / 0.1)
    assert admin._pause_s(interval_s=60, took_s=0.002, num_watchers=50) == 60


async def test_fifty_watchers_are_served_and_forgotten_when_they_leave(monkeypatch):
    counted = []
    pause_s = admin._pause_s
    monkeypatch.setattr(admin, "_pause_s", lambda *args: counted.append(args[-1]) or pause_s(*args))
    async with watched() as served:
        async with contextlib.AsyncExitStack() as watches:
            for _ in range(50):
                watch = await watches.enter_async_context(served.client.watch_engine(interval=0.05))
                assert (await anext(watch)).stats.running == 0
            # The last one is counted when it pauses, a moment after its first snapshot.
            await until(lambda: max(counted) == 50)
            result = await served.client.generate(PROMPT, max_tokens=6).result()
            assert result.usage.completion_tokens == 6
        # They have left, and are forgotten.
        async with served.client.watch_engine(interval=0.05):
            await until(lambda: counted[-1] == 1)


@pytest.mark.parametrize("reason", WaitReason)
def test_every_reason_to_wait_has_its_name_on_both_sides(reason):
    number = WAIT_REASONS[reason]
    assert admin_pb2.WaitReason.Name(number) == f"WAIT_REASON_{reason.name}"
    assert client_watching._WAIT_REASONS[number].value == reason.value
    assert WANTED[reason]
