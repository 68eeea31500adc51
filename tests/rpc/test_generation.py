"""What passes between the wire and the engine in GenerationService."""

import asyncio
import hashlib
import logging
from types import SimpleNamespace

import grpc
import pytest
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import model_pb2

from nanoserve.engine.stream import Delta, Finished, PromptLogprobs, Started
from nanoserve.errors import EngineFailure
from nanoserve.observer import Observers
from nanoserve.request import FinishReason, SamplingParams, TokenLogprob
from nanoserve.rpc import messages
from nanoserve.rpc.call import Calls
from nanoserve.rpc.generation import GenerationService

HI = pb.GenerateRequest(text="hi")
GENERATE = "/nanoserve.v1.GenerationService/Generate"


def script_of(*events):
    async def script(_params):
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return script


STARTED = Started(3, 2, SamplingParams(seed=0))


def delta(**fields):
    return Delta(**{"index": 0, "text": "", "token_ids": [], **fields})


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def read(call):
    return [event async for event in call]


# ------------------------------------------------------------------------------------- what the engine gets


async def test_the_request_and_its_metadata_reach_the_engine(served):
    request = pb.GenerateRequest(
        text="hi",
        n=2,
        priority=5,
        cache=pb.CacheOptions(skip_read=True, salt="s"),
        output=pb.OutputOptions(min_delta_tokens=4),
    )
    await read(served.generation.Generate(request, timeout=100, metadata=(("x-request-id", "r-1"),)))
    (call,) = served.engine.calls
    assert call["prompt"] == "hi"
    assert call["params"].n == 2
    assert (call["label"], call["priority"], call["skip_cache_read"]) == ("r-1", 5, True)
    assert (call["cache_salt"], call["min_delta_tokens"]) == (":s", 4)
    # gRPC sends it rounded up, to whole seconds from here on.
    assert 90 < call["timeout_s"] <= 101


async def test_without_deadline_salt_and_key_the_engine_gets_none(served):
    await read(served.generation.Generate(HI))
    (call,) = served.engine.calls
    assert (call["timeout_s"], call["cache_salt"]) == (None, "")


async def test_callers_with_different_keys_never_share_a_cache_salt(served):
    keys_and_salts = [("a", ""), ("b", ""), ("a", "s"), ("b", "s"), (None, "s"), (None, "")]
    for key, salt in keys_and_salts:
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        request = pb.GenerateRequest(text="hi", cache=pb.CacheOptions(salt=salt))
        await read(served.generation.Generate(request, metadata=metadata))
    salts = [call["cache_salt"] for call in served.engine.calls]
    assert len(set(salts)) == len(keys_and_salts)
    # A salt cannot be made to look like another caller's.
    digest = hashlib.sha256(b"a").hexdigest()
    assert salts[0] == f"{digest}:"
    request = pb.GenerateRequest(text="hi", cache=pb.CacheOptions(salt=f"{digest}:"))
    await read(served.generation.Generate(request))
    assert served.engine.calls[-1]["cache_salt"] not in salts


async def test_a_large_prompt_is_checked_off_the_event_loop_with_the_same_result(served, failure_of):
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="x" * 200_000)] * 2))
    failure = await failure_of(served.generation.Generate(request))
    assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert len(served.engine.calls[0]["prompt"].messages) == 2
    request.chat.messages[1].ClearField("role")
    failure = await failure_of(served.generation.Generate(request))
    assert list(failure.violations) == ["chat.messages[1].role"]


# ------------------------------------------------------------------------------------- what the caller gets


async def test_every_event_becomes_its_message(served):
    top = (TokenLogprob(104, -0.125, 1), TokenLogprob(105, -2.5, 2))
    served.engine.script = script_of(
        STARTED,
        PromptLogprobs([TokenLogprob(97, None, 0), TokenLogprob(98, -1.5, 4)]),
        delta(text="h", token_ids=[104], logprobs=[TokenLogprob(104, -0.125, 1, top)]),
        delta(index=1, token_ids=[0xC3]),
        delta(token_ids=[105, 256], finish_reason=FinishReason.EOS, stop_token_id=256),
        delta(index=1, text="é", token_ids=[0xA9], finish_reason=FinishReason.STOP, stop_string="!"),
        Finished(3, 2, 5, 0.5, 0.25, 1.000001, 6),
    )
    started, prompt, first, second, third, fourth, finished = await read(served.generation.Generate(HI))

    assert (started.started.model, started.started.prompt_tokens, started.started.cached_tokens) == ("fake", 3, 2)
    assert started.started.sampling.HasField("seed")
    assert prompt.prompt_logprobs == pb.PromptLogprobs(
        tokens=[
            pb.TokenLogprob(token_id=97, token=b"a"),
            pb.TokenLogprob(token_id=98, token=b"b", logprob=-1.5, rank=4),
        ]
    )
    assert not prompt.prompt_logprobs.tokens[0].HasField("logprob")
    alternatives = [
        pb.TokenLogprob(token_id=104, token=b"h", logprob=-0.125, rank=1),
        pb.TokenLogprob(token_id=105, token=b"i", logprob=-2.5, rank=2),
    ]
    assert first.delta == pb.Delta(
        text="h",
        token_ids=[104],
        logprobs=[pb.TokenLogprob(token_id=104, token=b"h", logprob=-0.125, rank=1, top=alternatives)],
    )
    assert second.delta == pb.Delta(index=1, token_ids=[0xC3])
    assert third.delta == pb.Delta(token_ids=[105, 256], finish_reason=pb.FINISH_REASON_EOS, stop_token_id=256)
    assert fourth.delta == pb.Delta(
        index=1, text="é", token_ids=[0xA9], finish_reason=pb.FINISH_REASON_STOP, stop_string="!"
    )
    assert finished.finished.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=5)
    timing = finished.finished.timing
    times_ms = [t.ToMilliseconds() for t in (timing.queue, timing.prefill)]
    assert (times_ms, timing.decode.ToMicroseconds(), timing.preemptions) == ([500, 250], 1_000_001, 6)


async def test_started_reports_every_value_in_force_and_the_time_of_arrival(served):
    params = SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        frequency_penalty=-1.0,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        logit_bias={7: -2.5},
    )
    served.engine.script = script_of(Started(1, 0, params))
    (event,) = await read(served.generation.Generate(HI))
    assert event.started.sampling == pb.Sampling(
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        frequency_penalty=-1.0,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        logit_bias={7: -2.5},
    )
    assert event.started.create_time.ToDatetime().year >= 2025


def test_every_finish_reason_has_its_own_value():
    values = [messages.FINISH_REASONS[reason] for reason in FinishReason]
    assert sorted(values) == sorted(set(pb.FinishReason.values()) - {pb.FINISH_REASON_UNSPECIFIED})


async def test_logprobs_of_a_long_prompt_come_in_messages_of_a_size_that_clients_take(served):
    top = tuple(TokenLogprob(t, -1.5, 1) for t in range(20))
    served.engine.script = script_of(STARTED, PromptLogprobs([TokenLogprob(97, -1.5, 1, top)] * 10_000))
    _, *parts = await read(served.generation.Generate(HI))
    assert sum(len(part.prompt_logprobs.tokens) for part in parts) == 10_000
    assert max(part.ByteSize() for part in parts) < 1024 * 1024


async def test_what_was_sent_before_an_error_arrives(served):
    served.engine.script = script_of(STARTED, delta(text="a", token_ids=[97]), EngineFailure())
    events = []

    async def collect():
        async for event in served.generation.Generate(HI):
            events.append(event.WhichOneof("event"))  # noqa: PERF401

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect()
    assert events == ["started", "delta"]
    assert caught.value.code() == grpc.StatusCode.INTERNAL


async def test_nothing_is_sent_before_the_engines_first_event(served):
    scheduled = asyncio.Event()

    async def waiting(params):
        await scheduled.wait()
        yield Started(1, 0, params)

    served.engine.script = waiting
    call = served.generation.Generate(HI)
    headers = asyncio.create_task(call.initial_metadata())
    await until(lambda: served.engine.num_open == 1)
    # Another call goes there and back meanwhile, so headers would have come.
    await served.model.ListModels(model_pb2.ListModelsRequest())
    assert not headers.done()
    scheduled.set()
    await headers
    assert [event.WhichOneof("event") for event in await read(call)] == ["started"]


# ------------------------------------------------------------------------------------------ the request id


@pytest.mark.parametrize("label", ["r", "x" * 128, "a b/c:d%~"])
async def test_the_callers_id_is_echoed_in_header_and_message(served, label):
    call = served.generation.Generate(HI, metadata=(("x-request-id", label),))
    events = await read(call)
    assert events[0].started.request_id == label
    assert dict(await call.initial_metadata())["x-request-id"] == label


async def test_without_an_id_each_call_gets_its_own(served):
    ids = [(await read(served.generation.Generate(HI)))[0].started.request_id for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(len(one) == 36 for one in ids)


async def test_an_id_that_is_too_long_is_refused_and_cut_in_the_refusal(served, failure_of):
    failure = await failure_of(served.generation.Generate(HI, metadata=(("x-request-id", "x" * 129),)))
    assert list(failure.violations) == ["metadata x-request-id"]
    assert failure.details["RequestInfo"].request_id == "x" * 128
    assert served.engine.calls == []


# ------------------------------------------------------------------------------------- how a stream can end


async def endless(params):
    yield Started(1, 0, params)
    yield delta(text="a", token_ids=[97])
    await asyncio.Event().wait()


async def silent(_params):
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize(("script", "phase"), [(endless, "running"), (silent, "waiting")])
async def test_a_cancelled_call_closes_the_engines_stream(served, script, phase):
    served.engine.script = script
    call = served.generation.Generate(HI, metadata=(("x-request-id", "r-1"),))
    reader = asyncio.create_task(read(call))
    await until(lambda: served.engine.num_open == 1)
    if phase == "running":
        await call.initial_metadata()
    call.cancel()
    await until(lambda: served.engine.num_open == 0)
    with pytest.raises(asyncio.CancelledError):
        await reader


async def test_a_connection_that_breaks_closes_the_engines_stream(served):
    served.engine.script = endless
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        call = channel.unary_stream(GENERATE)(HI.SerializeToString())
        assert await call.read()
    await until(lambda: served.engine.num_open == 0)


async def test_a_caller_that_leaves_while_much_is_written_closes_the_engines_stream(served, caplog):
    async def torrent(params):
        yield Started(1, 0, params)
        while True:
            yield delta(text="a" * 100_000, token_ids=[97])

    streams = []

    def generate(*args, **kwargs):
        # With this reference, only the servicer closes the stream, not the garbage collector.
        streams.append(type(served.engine).generate(served.engine, *args, **kwargs))
        return streams[0]

    served.engine.script, served.engine.generate = torrent, generate
    call = served.generation.Generate(HI)
    await call.read()
    call.cancel()
    await until(lambda: served.engine.num_open == 0)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_write_to_a_connection_that_is_gone_is_left_to_grpc(served, caplog):
    """Its own errors are neither logged as ours nor answered."""

    class BrokenContext:
        def invocation_metadata(self):
            return ()

        def time_remaining(self):
            return None

        async def send_initial_metadata(self, _metadata):
            raise grpc.aio.InternalError("the connection is gone")

    service = pb.DESCRIPTOR.services_by_name["GenerationService"]
    handler = Calls(Observers()).handler(service, GenerationService(lambda: served.engine))
    method = handler.service(SimpleNamespace(method=GENERATE, invocation_metadata=()))
    with pytest.raises(grpc.aio.InternalError):
        await method.unary_stream(HI, BrokenContext())
    assert caplog.records == []
    assert served.engine.num_open == 0


async def test_the_deadline_closes_the_engines_stream(served, failure_of):
    served.engine.script = endless
    metadata = (("x-request-id", "r-1"),)
    failure = await failure_of(served.generation.Generate(HI, timeout=1, metadata=metadata))
    assert failure.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: served.engine.num_open == 0)


# --------------------------------------------------------------------------------- messages that do not parse


@pytest.mark.parametrize("data", [b"\x1a\x01\xff", b"\xff", b"\x1a\x7f"], ids=["utf-8", "tag", "length"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(served, failure_of, data):
    failure = await failure_of(served.channel.unary_stream(GENERATE)(data, metadata=(("x-request-id", "r"),)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(failure.violations) == ["nanoserve.v1.GenerateRequest"]
    assert failure.details["RequestInfo"].request_id == "r"


async def test_an_oversized_message_is_refused_by_the_transport(served, failure_of):
    request = pb.GenerateRequest(text="x" * (16 * 1024 * 1024))
    failure = await failure_of(served.generation.Generate(request))
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.details == {}
    assert "grpc-retry-pushback-ms" not in failure.trailers


async def test_a_message_just_under_the_limit_is_read(served, failure_of):
    request = pb.GenerateRequest(text="x" * (16 * 1024 * 1024 - 100))
    failure = await failure_of(served.generation.Generate(request))
    assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"
