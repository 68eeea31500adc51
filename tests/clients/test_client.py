"""Both clients against a real server: streams, results, requests, metadata, cancellation, size."""

import asyncio
import gc
import threading
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from nanoserve_client import (
    AsyncClient,
    Cancelled,
    ChatMessage,
    Client,
    Completion,
    DeadlineExceeded,
    DraftSource,
    FinishReason,
    InvalidRequest,
    NanoserveError,
    NotFound,
    Timing,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)
from nanoserve_client.transport import MAX_REQUEST_BYTES
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb
from scripted_server import Script, delta, finished, hello, started


def endless(_request, _context):
    """A stream that goes on until its caller leaves."""
    yield started()
    while True:
        yield delta(text="x", token_ids=(1,))
        threading.Event().wait(0.01)


def silent(_request, context):
    """A request that waits in the queue until its caller leaves."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()
    yield from ()


# ------------------------------------------------------------------------------------------------ the stream


async def test_deltas_come_as_the_server_sends_them(face, server):
    client = face.connect(server.target)
    deltas = await face.deltas(client.generate("Say hello"))
    assert [(d.index, d.text, d.token_ids, d.finish_reason) for d in deltas] == [
        (0, "Hel", (1,), None),
        (0, "lo", (2, 3), FinishReason.EOS),
    ]
    assert deltas[-1].stop_token_id == 3
    assert deltas[-1].stop_string is None


async def test_started_is_known_from_the_first_delta_on(face, server):
    def generate(_request, _context):
        sampling = pb.Sampling(temperature=0.5, top_p=1, top_k=7, seed=99, logit_bias={5: -1.5})
        yield started(create_time=Timestamp(seconds=1_000_000), cached_tokens=2, sampling=sampling)
        yield delta(finish_reason=pb.FINISH_REASON_LENGTH)
        yield finished()

    server.script.generate = generate
    stream = face.connect(server.target).generate("x")
    assert stream.started is None
    await face.next(stream)
    begun = stream.started
    assert (begun.request_id, begun.model, begun.prompt_tokens, begun.cached_tokens) == ("made-by-server", "tiny", 4, 2)
    assert begun.create_time == datetime.fromtimestamp(1_000_000, UTC)
    assert (begun.sampling.temperature, begun.sampling.top_k, begun.sampling.seed) == (0.5, 7, 99)
    assert begun.sampling.logit_bias == {5: -1.5}


async def test_result_joins_three_interleaved_sequences(face, server):
    def generate(_request, _context):
        yield started()
        yield delta(2, "C", (30,))
        yield delta(0, "A", (10,))
        yield delta(2, "c", (31,), finish_reason=pb.FINISH_REASON_LENGTH)
        yield delta(1, "", (20,))
        yield delta(0, "a", (11, 12), finish_reason=pb.FINISH_REASON_STOP, stop_string="END")
        yield delta(1, "B", (21,), finish_reason=pb.FINISH_REASON_EOS, stop_token_id=21)
        yield finished(7)

    server.script.generate = generate
    result = await face.call(face.connect(server.target).generate("x", n=3).result)
    assert result.completions == (
        Completion(0, "Aa", (10, 11, 12), (), FinishReason.STOP, "END", None),
        Completion(1, "B", (20, 21), (), FinishReason.EOS, None, 21),
        Completion(2, "Cc", (30, 31), (), FinishReason.LENGTH, None, None),
    )
    assert result.text == "Aa"
    assert result.usage == Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=7)
    assert result.timing == Timing(queue_s=1.5, prefill_s=0.0, decode_s=2.0, preemptions=3)
    assert result.started.request_id == "made-by-server"


async def test_result_holds_what_was_read_before_and_can_be_asked_twice(face, server):
    stream = face.connect(server.target).generate("x")
    await face.next(stream)
    result = await face.call(stream.result)
    assert result.text == "Hello"
    assert await face.call(stream.result) is result
    assert await face.deltas(stream) == []


async def test_logprobs_stay_aligned_with_their_tokens(face, server):
    first = pb.TokenLogprob(token_id=1, token=b"\xe2\x82", logprob=-0.5, rank=1)
    first.top.add(token_id=1, token=b"\xe2\x82", logprob=-0.5, rank=1)
    second = pb.TokenLogprob(token_id=2, token=b"\xac", logprob=-0.25, rank=2)

    def generate(_request, _context):
        yield started()
        prompt = pb.PromptLogprobs(tokens=[pb.TokenLogprob(token_id=7, token=b"a")])
        yield pb.GenerateResponse(prompt_logprobs=prompt)
        prompt = pb.PromptLogprobs(tokens=[pb.TokenLogprob(token_id=8, token=b"b", logprob=0.0, rank=1)])
        yield pb.GenerateResponse(prompt_logprobs=prompt)
        yield delta(token_ids=(1,), logprobs=[first])
        yield delta(text="€", token_ids=(2,), logprobs=[second], finish_reason=pb.FINISH_REASON_LENGTH)
        yield finished(2)

    server.script.generate = generate
    result = await face.call(face.connect(server.target).generate("ab", logprobs=1, prompt_logprobs=0).result)
    alternative = TokenLogprob(1, b"\xe2\x82", -0.5, 1)
    assert result.completions[0].logprobs == (
        TokenLogprob(1, b"\xe2\x82", -0.5, 1, (alternative,)),
        TokenLogprob(2, b"\xac", -0.25, 2),
    )
    # No log-probability is not the same as one of 0.
    assert result.prompt_logprobs == (TokenLogprob(7, b"a", None, 0), TokenLogprob(8, b"b", 0.0, 1))


async def test_events_and_reasons_of_a_newer_server_are_tolerated(face, server):
    def generate(_request, _context):
        yield started()
        # Field 15 of GenerateResponse: an event that this client does not know.
        yield pb.GenerateResponse.FromString(b"\x7a\x02\x08\x01")
        yield delta(text="ok", token_ids=(1,), finish_reason=77)
        yield finished(1)

    server.script.generate = generate
    result = await face.call(face.connect(server.target).generate("x").result)
    assert result.completions[0].finish_reason is FinishReason.UNKNOWN
    assert result.text == "ok"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [started()],
        [started(), delta(text="a", finish_reason=pb.FINISH_REASON_EOS)],
        [started(), delta(text="a"), finished(1)],
        [delta(text="a", finish_reason=pb.FINISH_REASON_EOS), finished(1)],
    ],
    ids=["nothing", "only started", "no finished", "a sequence without end", "no started"],
)
async def test_stream_that_is_ok_but_incomplete_is_an_error(face, server, events):
    server.script.generate = lambda _request, _context: iter(events)
    stream = face.connect(server.target).generate("x", request_id="mine")
    with pytest.raises(NanoserveError) as failure:
        await face.deltas(stream)
    assert (failure.value.code, failure.value.reason) == (grpc.StatusCode.DATA_LOSS, "STREAM_INCOMPLETE")
    assert failure.value.request_id == ("made-by-server" if started() in events else "mine")
    with pytest.raises(NanoserveError):
        await face.call(stream.result)


async def test_every_delta_arrives_although_the_reader_is_slow(face, server):
    def generate(_request, _context):
        yield started()
        for token in range(500):
            yield delta(text="x", token_ids=(token,))
        yield delta(finish_reason=pb.FINISH_REASON_LENGTH)
        yield finished(500)

    server.script.generate = generate
    stream = face.connect(server.target).generate("x")
    await face.next(stream)
    assert await asyncio.to_thread(server.script.ended.wait, 30)
    result = await face.call(stream.result)
    assert result.completions[0].token_ids == tuple(range(500))


# -------------------------------------------------------------------------------------------- cancellation


async def test_cancel_in_the_middle_reaches_the_server(face, server):
    server.script.generate = endless
    stream = face.connect(server.target).generate("x")
    assert (await face.next(stream)).text == "x"
    stream.cancel()
    assert await asyncio.to_thread(server.script.ended.wait, 30)
    with pytest.raises(Cancelled) as failure:
        await face.deltas(stream)
    assert failure.value.code is grpc.StatusCode.CANCELLED
    assert failure.value.request_id == "made-by-server"
    with pytest.raises(Cancelled):
        await face.call(stream.result)


async def test_status_cancelled_from_the_server_is_an_error_not_a_cancelled_task(face, server):
    def generate(_request, context):
        context.abort(grpc.StatusCode.CANCELLED, "shutting down")

    server.script.generate = generate
    with pytest.raises(Cancelled, match="shutting down"):
        await face.deltas(face.connect(server.target).generate("x"))


def test_leaving_the_with_block_cancels(server):
    server.script.generate = endless
    with Client(server.target) as client, client.generate("x") as stream:
        next(stream)
    assert server.script.ended.wait(30)


async def test_leaving_the_async_with_block_cancels(server):
    server.script.generate = endless
    async with AsyncClient(server.target) as client:
        async with client.generate("x") as stream:
            await anext(stream)
        assert await asyncio.to_thread(server.script.ended.wait, 30)


def test_dropping_a_stream_cancels(server):
    server.script.generate = endless
    with Client(server.target) as client:
        for _ in client.generate("x"):
            break
        gc.collect()
        assert server.script.ended.wait(30)


async def test_cancelling_the_task_cancels_the_request(server):
    server.script.generate = endless
    async with AsyncClient(server.target) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("x").result()
        assert await asyncio.to_thread(server.script.ended.wait, 30)


async def test_closing_the_client_ends_its_streams(face, server):
    server.script.generate = endless
    client = face.connect(server.target)
    stream = client.generate("x")
    await face.next(stream)
    await face.call(client.close)
    with pytest.raises(Cancelled):
        await face.call(stream.result)
    assert await asyncio.to_thread(server.script.ended.wait, 30)


async def test_timeout_reaches_the_server_and_fails_the_call(face, server):
    server.script.generate = silent
    stream = face.connect(server.target).generate("x", timeout=1.0, request_id="mine")
    with pytest.raises(DeadlineExceeded) as failure:
        await face.deltas(stream)
    # The transport made this status: there are no details, and the id is the caller's own.
    assert failure.value.reason == "DEADLINE"
    assert failure.value.request_id == "mine"
    assert await asyncio.to_thread(server.script.ended.wait, 30)
    assert 0 < server.script.deadlines[0] < 5


async def test_without_timeout_there_is_no_deadline(face, server):
    await face.deltas(face.connect(server.target).generate("x"))
    # What gRPC calls no deadline is one in 292 billion years.
    assert server.script.deadlines[0] > 1e9


# ------------------------------------------------------------------------------------------------ requests


async def test_every_option_of_generate_reaches_its_field(face, server):
    stream = face.connect(server.target).generate(
        [5, 6, 7],
        model="tiny",
        n=2,
        priority=-3,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        frequency_penalty=-1.0,
        presence_penalty=1.5,
        repetition_penalty=2.0,
        seed=2**64 - 1,
        logit_bias={9: 4.0},
        max_tokens=10,
        min_tokens=0,
        stop="END",
        stop_token_ids=[3],
        ignore_eos=True,
        include_stop=True,
        time_limit=1.5,
        omit_text=True,
        keep_special_tokens=True,
        logprobs=0,
        prompt_logprobs=3,
        min_delta_tokens=8,
        skip_cache_read=True,
        cache_salt="mine",
    )
    await face.deltas(stream)
    # A zero that was given is present: it is not the default.
    assert server.script.requests == [
        pb.GenerateRequest(
            model="tiny",
            token_ids=pb.TokenIds(ids=[5, 6, 7]),
            n=2,
            priority=-3,
            sampling=pb.Sampling(
                temperature=0.0,
                top_p=0.5,
                top_k=0,
                min_p=0.25,
                frequency_penalty=-1.0,
                presence_penalty=1.5,
                repetition_penalty=2.0,
                seed=2**64 - 1,
                logit_bias={9: 4.0},
            ),
            stopping=pb.Stopping(
                max_tokens=10,
                min_tokens=0,
                strings=["END"],
                token_ids=[3],
                ignore_eos=True,
                include_match=True,
                time_limit=Duration(seconds=1, nanos=500_000_000),
            ),
            output=pb.OutputOptions(
                omit_text=True, keep_special_tokens=True, logprobs=0, prompt_logprobs=3, min_delta_tokens=8
            ),
            cache=pb.CacheOptions(skip_read=True, salt="mine"),
        )
    ]


async def test_options_that_are_not_given_or_none_stay_unset(face, server):
    client = face.connect(server.target)
    await face.deltas(client.generate("x"))
    await face.deltas(client.generate("x", model=None, temperature=None, stop=None, seed=None, priority=None))
    for request in server.script.requests:
        for group in ("sampling", "stopping", "output", "cache"):
            assert not getattr(request, group).ListFields()
            request.ClearField(group)
        assert request == pb.GenerateRequest(text="x")


async def test_chat_carries_messages_tools_and_template_variables(face, server):
    call = ToolCall("call-1", "weather", {"city": "Zürich"})
    stream = face.connect(server.target).chat(
        [
            {"role": "system", "content": "Be brief."},
            ChatMessage("user", "Weather?", name="Ann"),
            ChatMessage("assistant", tool_calls=[call]),
            {"role": "tool", "content": "", "tool_call_id": "call-1"},
            {"role": "assistant", "tool_calls": [{"id": "c", "name": "f", "arguments": '{"a": 1}'}]},
            {"role": "developer", "content": "Go on."},
        ],
        tools=[Tool("weather", "Looks outside.", {"type": "object"}), {"name": "time"}],
        template_kwargs={"enable_thinking": False},
        continue_final_message=True,
        max_tokens=5,
    )
    await face.deltas(stream)
    request = server.script.requests[0]
    assert request.stopping.max_tokens == 5
    assert request.chat == pb.Chat(
        messages=[
            pb.ChatMessage(role=pb.ROLE_SYSTEM, content="Be brief."),
            pb.ChatMessage(role=pb.ROLE_USER, content="Weather?", name="Ann"),
            pb.ChatMessage(
                role=pb.ROLE_ASSISTANT,
                tool_calls=[pb.ToolCall(id="call-1", name="weather", arguments_json='{"city": "Zürich"}')],
            ),
            pb.ChatMessage(role=pb.ROLE_TOOL, content="", tool_call_id="call-1"),
            pb.ChatMessage(
                role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(id="c", name="f", arguments_json='{"a": 1}')]
            ),
            pb.ChatMessage(role=pb.ROLE_DEVELOPER, content="Go on."),
        ],
        tools=[
            pb.Tool(name="weather", description="Looks outside.", parameters_json='{"type": "object"}'),
            pb.Tool(name="time"),
        ],
        template_kwargs_json='{"enable_thinking": false}',
        continue_final_message=True,
    )


async def test_chat_takes_a_text_for_one_message_of_the_user(face, server):
    await face.deltas(face.connect(server.target).chat("Hello?"))
    assert server.script.requests[0].chat == pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="Hello?")])


async def test_raw_request_is_sent_as_it_is(face, server):
    request = pb.GenerateRequest(text="x", n=1)
    await face.deltas(face.connect(server.target).generate_raw(request, request_id="raw"))
    assert server.script.requests == [request]
    assert server.script.metadata[0]["x-request-id"] == "raw"


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda c: c.generate("x", temprature=1.0), TypeError, "temprature"),
        (lambda c: c.generate_raw(pb.GenerateRequest(), temperature=1.0), TypeError, "temperature"),
        (lambda c: c.generate("x", n=-1), ValueError, "n is -1: "),
        (lambda c: c.generate("x", top_k=5, temperature="hot"), TypeError, "temperature is 'hot': "),
        (lambda c: c.generate("x", time_limit=1e30), ValueError, "time_limit is 1e\\+30: "),
        (lambda c: c.generate([-1]), ValueError, "the prompt is neither a text nor token ids: "),
        (lambda c: c.chat([{"role": "usr", "content": "x"}]), ValueError, "'usr'.*system, user"),
        (lambda c: c.chat([{"role": "user", "text": "x"}]), TypeError, "text"),
    ],
)
async def test_mistakes_that_no_request_can_carry_fail_at_once(face, server, use, error, message):
    client = face.connect(server.target)
    with pytest.raises(error, match=message):
        use(client)
    assert server.script.requests == []


async def test_metadata_says_who_and_where(face, server):
    client = face.connect(server.target, api_key="sesame")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await face.deltas(
        client.generate("x", request_id="mine", traceparent=trace, metadata={"x-team": "red", "x-raw-bin": b"\x00\xff"})
    )
    seen = server.script.metadata[0]
    assert seen["authorization"] == "Bearer sesame"
    assert seen["x-request-id"] == "mine"
    assert seen["traceparent"] == trace
    assert seen["x-team"] == "red"
    assert seen["x-raw-bin"] == b"\x00\xff"


@pytest.mark.parametrize(
    ("key", "options", "complaint"),
    [
        ("sesame\n", {}, "'authorization' must be printable ASCII"),
        (None, {"request_id": "Grüße"}, "'x-request-id' must be printable ASCII"),
        (None, {"metadata": {"X-Team": "red"}}, "key 'X-Team' must be of lower case"),
    ],
)
async def test_metadata_that_cannot_travel_is_named(face, server, key, options, complaint):
    client = face.connect(server.target, api_key=key)
    with pytest.raises(ValueError, match=complaint) as failure:
        client.generate("x", **options)
    assert "sesame" not in str(failure.value)


async def test_without_key_and_id_nothing_is_claimed(face, server):
    await face.deltas(face.connect(server.target).generate("x"))
    assert not {"authorization", "x-request-id", "traceparent"} & server.script.metadata[0].keys()


async def test_request_above_the_limit_is_refused_before_it_is_sent(face, server):
    client = face.connect(server.target)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_REQUEST_BYTES}") as failure:
        client.generate("x" * MAX_REQUEST_BYTES, request_id="big")
    assert (failure.value.reason, failure.value.request_id) == ("REQUEST_TOO_LARGE", "big")
    with pytest.raises(InvalidRequest):
        await face.call(client.tokenize, "x" * MAX_REQUEST_BYTES)
    assert server.script.requests == []


async def test_request_at_the_limit_arrives(face, server):
    largest = pb.GenerateRequest(text="x" * (MAX_REQUEST_BYTES - 5))
    assert largest.ByteSize() == MAX_REQUEST_BYTES
    await face.deltas(face.connect(server.target).generate_raw(largest))
    assert len(server.script.requests) == 1


# --------------------------------------------------------------------------------------------- unary calls


async def test_tokenize_and_detokenize(face, server):
    client = face.connect(server.target)
    server.script.unary = lambda _request, _context: model_pb2.TokenizeResponse(
        token_ids=[1, 2], tokens=[b"\xe2\x82", b"\xac"], text="€"
    )
    tokens = await face.call(client.tokenize, "€", model="tiny")
    assert (tokens.token_ids, tokens.tokens, tokens.text) == ((1, 2), (b"\xe2\x82", b"\xac"), "€")
    await face.call(client.tokenize, [{"role": "user", "content": "€"}], tools=[Tool("f")])
    server.script.unary = lambda _request, _context: model_pb2.DetokenizeResponse(text="€")
    assert await face.call(client.detokenize, [1, 2], keep_special_tokens=True) == "€"
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="€")], tools=[pb.Tool(name="f")])
    assert server.script.requests == [
        model_pb2.TokenizeRequest(model="tiny", text="€"),
        model_pb2.TokenizeRequest(chat=chat),
        model_pb2.DetokenizeRequest(token_ids=[1, 2], keep_special_tokens=True),
    ]
    with pytest.raises(TypeError, match="for messages"):
        await face.call(client.tokenize, "€", tools=[Tool("f")])


async def test_list_models(face, server):
    model = model_pb2.Model(
        name="tiny",
        create_time=Timestamp(seconds=7),
        max_context_tokens=128,
        vocab_size=300,
        eos_token_ids=[2, 3],
        default_sampling=pb.Sampling(temperature=1.0, top_p=1.0),
        max_draft_tokens=4,
        draft_sources=[pb.DRAFT_SOURCE_SUFFIX, pb.DRAFT_SOURCE_DRAFT_MODEL, 99],
        draft_model="tinier",
    )
    server.script.unary = lambda _request, _context: model_pb2.ListModelsResponse(models=[model])
    (listed,) = await face.call(face.connect(server.target).list_models)
    assert (listed.name, listed.max_context_tokens, listed.vocab_size, listed.eos_token_ids) == (
        "tiny",
        128,
        300,
        (2, 3),
    )
    assert listed.create_time == datetime.fromtimestamp(7, UTC)
    assert (listed.default_sampling.temperature, listed.default_sampling.seed) == (1.0, None)
    assert listed.draft_sources == (DraftSource.SUFFIX, DraftSource.DRAFT_MODEL, DraftSource.UNKNOWN)
    assert (listed.max_draft_tokens, listed.draft_model) == (4, "tinier")


async def test_admin_calls(face, server):
    client = face.connect(server.target, api_key="admin")
    server.script.unary = lambda _request, _context: admin_pb2.CancelResponse(cancelled=2)
    assert await face.call(client.cancel, "theirs", request_id="mine") == 2
    server.script.unary = lambda _request, _context: admin_pb2.ResetCacheResponse(freed_blocks=5)
    assert await face.call(client.reset_cache) == 5
    server.script.unary = lambda _request, _context: admin_pb2.GetStatsResponse(
        running=1,
        waiting=2,
        kv_blocks_total=100,
        prefix_hit_ratio=0.5,
        draft_acceptance_ratio=0.75,
        uptime=Duration(seconds=61),
    )
    stats = await face.call(client.get_stats)
    assert (stats.running, stats.waiting, stats.kv_blocks_total) == (1, 2, 100)
    assert (stats.prefix_hit_ratio, stats.draft_acceptance_ratio, stats.uptime_s) == (0.5, 0.75, 61.0)
    assert server.script.requests[0] == admin_pb2.CancelRequest(request_id="theirs")
    assert server.script.metadata[0]["x-request-id"] == "mine"
    assert {m["authorization"] for m in server.script.metadata} == {"Bearer admin"}


async def test_unary_call_takes_a_timeout(face, server):
    release = threading.Event()
    server.script.unary = lambda _request, _context: release.wait(30)
    with pytest.raises(DeadlineExceeded):
        await face.call(face.connect(server.target).list_models, timeout=0.2)
    release.set()


# -------------------------------------------------------------------------------------- threads, event loop


def test_threads_share_one_client(server):
    def generate(request, _context):
        yield started()
        for character in request.text:
            yield delta(text=character, token_ids=(1,))
        yield delta(finish_reason=pb.FINISH_REASON_LENGTH)
        yield finished(len(request.text))

    server.script.generate = generate
    texts = [f"text number {number}" for number in range(16)]
    seen: dict[str, str] = {}
    with Client(server.target) as client:

        def run(text: str) -> None:
            seen[text] = client.generate(text).result().text

        threads = [threading.Thread(target=run, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {text: text for text in texts}


class AsyncScript(Script):
    """The same script for an asyncio server."""

    async def Generate(self, request, context):
        for event in hello(request, context):
            await asyncio.sleep(0)
            yield event

    async def ListModels(self, _request, _context):
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])


async def test_both_clients_speak_to_an_asyncio_server(face):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    AsyncScript().register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = face.connect(f"127.0.0.1:{port}")
    streams = [client.generate("x") for _ in range(4)]
    results = await asyncio.gather(*(face.call(stream.result) for stream in streams))
    assert [result.text for result in results] == ["Hello"] * 4
    assert [model.name for model in await face.call(client.list_models)] == ["tiny"]
    await face.call(client.close)
    await server.stop(grace=None)


async def test_the_start_can_be_waited_for_alone(server):
    go_on = threading.Event()

    def generate(request, context):
        events = hello(request, context)
        yield next(events)
        assert go_on.wait(30)
        yield from events

    server.script.generate = generate
    async with AsyncClient(server.target) as client:
        stream = client.generate("x")
        assert (await stream.start()).request_id == "made-by-server"
        go_on.set()
        assert await stream.start() is stream.started
        assert (await stream.result()).text == "Hello"
        server.script.generate = lambda _request, context: context.abort(grpc.StatusCode.NOT_FOUND, "no")
        with pytest.raises(NotFound):
            await client.generate("x").start()
