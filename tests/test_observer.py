"""Who watches an engine and a server: what each is told, in which order, and that it never breaks serving."""

import grpc
import pytest
from engine_bench import PROMPT, running
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoserve_client import AsyncClient, NanoserveError
from watched_server import miss_deadline, until, watched

from nanoserve.config import ServerConfig
from nanoserve.observer import Observer, Observers
from nanoserve.rpc.server import Server


class Diary(Observer):
    """Writes down all that it is told."""

    def __init__(self):
        self.calls, self.requests, self.steps, self.order = [], [], [], []

    def _note(self, what, record):
        assert record.start_s if "call" in what else record.arrival_s
        self.order.append(what)

    def call_started(self, call):
        self._note("call started", call)

    def call_ended(self, call):
        self._note("call ended", call)
        self.calls.append(call)

    def request_arrived(self, now):
        self._note("request arrived", now())

    def request_ended(self, request):
        self._note("request ended", request)
        self.requests.append(request)

    def step_ended(self, step):
        self.steps.append(step)


class Grump(Observer):
    def call_started(self, call):
        raise RuntimeError(call)

    step_ended = request_ended = call_started


async def test_a_request_is_told_from_its_call_to_its_steps():
    diary = Diary()
    async with watched(diary) as (_, client):
        result = await client.generate(PROMPT, max_tokens=5, n=2, request_id="mine").result()
        await until(lambda: diary.calls)
    assert diary.order == ["call started", "request arrived", "request ended", "call ended"]
    [call], [request] = diary.calls, diary.requests
    assert call.request is request
    assert (call.method, call.code, call.reason) == ("nanoserve.v1.GenerationService/Generate", "OK", "")
    assert call.request_id == request.label == "mine"
    assert (request.num_prompt_tokens, request.num_completion_tokens) == (len(PROMPT), 10)
    assert request.num_cached_tokens == result.usage.cached_tokens
    assert {index: reason.value for index, reason in request.finish_reasons.items()} == {0: "length", 1: "length"}
    assert not request.is_abandoned
    times = [call.start_s, request.arrival_s, request.started_s, request.first_token_s, request.last_token_s]
    times += [request.end_s, call.end_s]
    assert times == sorted(times)
    # The prompt; then, for the second sequence, what of it was in no full block.
    assert [(c.index, c.start, c.num_tokens) for c in request.chunks] == [(0, 0, 9), (1, 8, 1)]
    assert sum(part.num_new_tokens for step in diary.steps for part in step.parts) == 10


async def test_refusals_and_failures_have_a_reason():
    diary = Diary()
    async with watched(diary, max_waiting=1) as (bench, client):
        bench.executor.is_broken = True
        with pytest.raises(NanoserveError):
            await client.generate(PROMPT, request_id="breaks").result()
        with pytest.raises(NanoserveError):
            await client.generate(PROMPT, temperature=-1).result()
        with pytest.raises(NanoserveError):
            await client.tokenize("a", model="other")
        await until(lambda: len(diary.calls) == 3)
        assert [(c.code, c.reason) for c in diary.calls] == [
            ("INTERNAL", "ENGINE_FAILURE"),
            ("INVALID_ARGUMENT", "INVALID_REQUEST"),
            ("NOT_FOUND", "MODEL_NOT_FOUND"),
        ]
        assert type(diary.calls[0].request.error).__name__ == "EngineFailure"
        assert diary.calls[1].request is None
        assert diary.calls[1].request_id, "the server gave it a name, and told it to the caller"


async def test_an_abandoned_request_ends():
    diary = Diary()
    async with watched(diary) as (bench, client):
        bench.executor.gate.clear()
        stream = client.generate(PROMPT)
        await until(lambda: "request arrived" in diary.order)
        stream.cancel()
        await until(lambda: diary.calls)
        bench.executor.gate.set()
    [call] = diary.calls
    assert (call.code, call.reason) == ("CANCELLED", "")
    assert call.request.is_abandoned


async def test_a_request_ends_with_its_deadline():
    diary = Diary()
    async with watched(diary) as (bench, client):
        bench.executor.gate.clear()
        await miss_deadline(lambda timeout_s: client.generate(PROMPT, timeout=timeout_s), lambda: diary.calls)
        bench.executor.gate.set()
    assert {(call.code, call.reason) for call in diary.calls} == {("DEADLINE_EXCEEDED", "DEADLINE")}


async def test_a_call_without_a_key_is_told(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key")
    diary = Diary()
    server = Server(ServerConfig(grpc_port=0, api_keys=keys), FakeEngine(), observers=Observers(diary))
    async with AsyncClient(f"127.0.0.1:{await server.start()}") as client:
        for call in (client.list_models, client.generate("a").result):
            with pytest.raises(NanoserveError):
                await call()
        await until(lambda: len(diary.calls) == 2)
    await server.stop()
    assert {(call.code, call.reason) for call in diary.calls} == {("UNAUTHENTICATED",) * 2}


async def test_probes_are_not_told():
    diary = Diary()
    server = Server(ServerConfig(grpc_port=0), FakeEngine(), observers=Observers(diary))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await server.stop()
    assert not diary.order


async def test_an_observer_that_raises_harms_nobody(caplog):
    diary = Diary()
    async with watched(Grump(), diary) as (_, client):
        await client.generate(PROMPT, max_tokens=2).result()
        await until(lambda: diary.calls)
    assert diary.steps
    assert "Grump failed" in caplog.text


async def test_without_observers_nothing_is_recorded():
    async with running() as bench:
        await bench.collect()
        assert not bench.scheduler.is_observed
