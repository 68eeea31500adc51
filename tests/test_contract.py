"""The contract of the stream, line by line, through a real channel, whatever engine is behind it.

The numbers are those of the architecture's list. An engine joins by a name in ENGINES; tests/rpc has what needs an
engine that does as a test says (errors in mid-stream, drain, deadlines).
"""

import asyncio
import functools
import math
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from failure import failure
from fake_engine import FakeEngine
from nanoserve_client.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from nanoserve_client.v1 import generation_pb2 as pb
from raw_http2 import DATA, END_STREAM, HEADERS, RawConnection

from nanoserve.build import assemble
from nanoserve.config import CacheOptions, ModelOptions, Options, ServerConfig
from nanoserve.engine.engine import Engine
from nanoserve.engine.text import TextCodec
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.rpc.server import Server


@functools.cache
def built_in_model() -> tuple[LoadedModel, TextCodec]:
    model = load_model(ModelOptions(device="cpu", dtype="float32"))
    return model, TextCodec.load(model.facts.folder)


def real_engine() -> Engine:
    model, codec = built_in_model()
    built = assemble(model, codec, Options(cache=CacheOptions(kv_memory_bytes=8 << 20)))
    engine = Engine(built.core, built.codec, built.model, max_waiting=64, step_timeout_s=60)
    engine.start()
    return engine


ENGINES: dict[str, Callable[[], Any]] = {"fake": FakeEngine, "built-in": real_engine}
GENERATE = "/nanoserve.v1.GenerationService/Generate"
PROMPT = "Once upon a time, a"
# Enough variety that a cut in the wrong place shows, and the same at every run.
SEEDED = pb.Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=7)
UNKNOWN = b"\xd0\x3e\x01"  # field 1002, varint 1


class Contract:
    """A client of the server under test."""

    def __init__(self, channel: grpc.aio.Channel, port: int) -> None:
        self.channel, self.port = channel, port
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.model = model_pb2_grpc.ModelServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    async def generate(self, **fields: Any) -> "Answer":
        """Run a request to its end; by default the seeded one."""
        prompt = {} if {"text", "token_ids", "chat"} & set(fields) else {"text": PROMPT}
        fields = {"sampling": SEEDED, "stopping": pb.Stopping(max_tokens=24, ignore_eos=True), **prompt, **fields}
        return Answer([event async for event in self.generation.Generate(pb.GenerateRequest(**fields))])

    async def refusal(self, data: bytes):
        """The failure that a request of these bytes ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.channel.unary_stream(GENERATE)(data).read()
        return failure(caught.value)

    async def text_of(self, token_ids: list[int]) -> str:
        return (await self.model.Detokenize(model_pb2.DetokenizeRequest(token_ids=token_ids))).text


class Answer:
    """The events of a stream that ended well."""

    def __init__(self, events: list[pb.GenerateResponse]) -> None:
        self.kinds = [event.WhichOneof("event") for event in events]
        self.started = events[0].started
        self.prompt_logprobs = [t for event in events for t in event.prompt_logprobs.tokens]
        self.deltas = [event.delta for event in events if event.HasField("delta")]
        self.finished = events[-1].finished

    def of(self, index: int) -> list[pb.Delta]:
        return [delta for delta in self.deltas if delta.index == index]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.of(index))

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.of(index) for token in delta.token_ids]

    def logprobs(self, index: int = 0) -> list[pb.TokenLogprob]:
        return [token for delta in self.of(index) for token in delta.logprobs]

    def last(self, index: int = 0) -> pb.Delta:
        return self.of(index)[-1]


@pytest.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    engine = ENGINES[request.param]()
    yield engine
    if isinstance(engine, Engine):
        await engine.close()


@pytest.fixture
async def contract(engine: Engine) -> AsyncIterator[Contract]:
    server = Server(ServerConfig(grpc_port=0, drain_timeout_s=5.0), engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Contract(channel, port)
    await server.stop()


# ----------------------------------------------------------------------------------------- 1. what and when


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt_logprobs", [None, 2])
async def test_1_a_stream_is_started_prompt_logprobs_deltas_finished(contract, n, prompt_logprobs):
    output = pb.OutputOptions(prompt_logprobs=prompt_logprobs)
    answer = await contract.generate(n=n, output=output)
    order = r"started (prompt_logprobs )+(delta )+finished" if prompt_logprobs else r"started (delta )+finished"
    assert re.fullmatch(order, " ".join(answer.kinds))
    assert len(answer.prompt_logprobs) == (answer.started.prompt_tokens if prompt_logprobs else 0)


async def test_1_started_lets_the_run_be_repeated(contract):
    first = await contract.generate(sampling=None)
    fields = {field.name for field, _ in first.started.sampling.ListFields()}
    assert {field.name for field in pb.Sampling.DESCRIPTOR.fields} - fields <= {"logit_bias"}
    again = await contract.generate(sampling=first.started.sampling)
    assert again.token_ids() == first.token_ids()


async def test_1_started_counts_the_prompt_as_tokenize_does(contract):
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="What is a cache?")])
    for prompt in ({"text": PROMPT}, {"chat": chat}):
        tokenized = await contract.model.Tokenize(model_pb2.TokenizeRequest(**prompt))
        answer = await contract.generate(**prompt)
        assert answer.started.prompt_tokens == len(tokenized.token_ids) == answer.finished.usage.prompt_tokens
        ids = pb.TokenIds(ids=tokenized.token_ids)
        assert (await contract.generate(token_ids=ids)).token_ids() == answer.token_ids()


# ------------------------------------------------------------------------------------ 2. rejections are bare


async def test_2_a_rejection_is_one_frame_of_trailers(contract):
    (model,) = (await contract.model.ListModels(model_pb2.ListModelsRequest())).models
    too_long = pb.TokenIds(ids=[1] * model.max_context_tokens)
    rejected = {
        "INVALID_ARGUMENT": [
            pb.GenerateRequest(),
            pb.GenerateRequest(token_ids=too_long),
            pb.GenerateRequest(text="x", n=129),
        ],
        "NOT_FOUND": [pb.GenerateRequest(text="x", model="no such model")],
    }
    connection = await RawConnection.open(contract.port)
    for code, requests in rejected.items():
        for request in requests:
            data = request.SerializeToString()
            assert (await contract.refusal(data)).code.name == code
            stream = connection.call(GENERATE, data, x_request_id="r-1")
            (frame,) = await connection.answer(stream)
            assert (frame.kind, frame.flags & END_STREAM) == (HEADERS, END_STREAM)
    await connection.close()


async def test_2_a_success_begins_with_headers_and_started(contract):
    connection = await RawConnection.open(contract.port)
    request = pb.GenerateRequest(text=PROMPT, stopping=pb.Stopping(max_tokens=2))
    frames = await connection.answer(connection.call(GENERATE, request.SerializeToString()))
    await connection.close()
    kinds = [frame.kind for frame in frames]
    assert (kinds[0], kinds[-1], set(kinds[1:-1])) == (HEADERS, HEADERS, {DATA})
    assert pb.GenerateResponse.FromString(message_of(frames[1].payload)).HasField("started")


def message_of(payload: bytes) -> bytes:
    """The first message in a DATA frame: a flag, its length, itself."""
    return payload[5 : 5 + int.from_bytes(payload[1:5])]


async def test_2_trailers_stay_under_4_kib_whatever_was_sent(contract):
    biases = {token: math.nan for token in range(1000)}
    request = pb.GenerateRequest(text="x", model="", sampling=pb.Sampling(logit_bias=biases))
    messages = [pb.ChatMessage(role=99, tool_call_id="x", tool_calls=[pb.ToolCall()])] * 500
    requests = [
        request,
        pb.GenerateRequest(chat=pb.Chat(messages=messages)),
        pb.GenerateRequest(text="x", model="ü%" * 100_000),
        pb.GenerateRequest(chat=pb.Chat(template_kwargs_json="{" + "\N{GRINNING FACE}" * 10_000)),
    ]
    connection = await RawConnection.open(contract.port)
    for request in requests:
        data = request.SerializeToString()
        (frame,) = await connection.answer(connection.call(GENERATE, data, x_request_id="x" * 120))
        assert frame.kind == HEADERS
        assert len(frame.payload) < 4096
        assert (await contract.refusal(data)).reason in ("INVALID_REQUEST", "MODEL_NOT_FOUND")
    await connection.close()


# --------------------------------------------------------------------------------- 3. 4. 5. text and tokens


async def test_3_only_the_last_delta_of_a_sequence_has_a_finish_reason(contract):
    answer = await contract.generate(n=3)
    assert {delta.index for delta in answer.deltas} == {0, 1, 2}
    for index in range(3):
        *before, last = answer.of(index)
        assert {delta.finish_reason for delta in before} <= {pb.FINISH_REASON_UNSPECIFIED}
        assert last.finish_reason != pb.FINISH_REASON_UNSPECIFIED


async def test_3_the_joined_text_is_the_detokenized_tokens(contract):
    answer = await contract.generate(n=2)
    for index in range(2):
        assert answer.text(index) == await contract.text_of(answer.token_ids(index))


async def test_3_a_sequence_ends_at_max_tokens_and_at_the_context(contract):
    answer = await contract.generate(stopping=pb.Stopping(max_tokens=3, ignore_eos=True))
    assert (len(answer.token_ids()), answer.last().finish_reason) == (3, pb.FINISH_REASON_LENGTH)
    (model,) = (await contract.model.ListModels(model_pb2.ListModelsRequest())).models
    prompt = pb.TokenIds(ids=[1] * (model.max_context_tokens - 3))
    answer = await contract.generate(token_ids=prompt, stopping=pb.Stopping(ignore_eos=True))
    assert (len(answer.token_ids()), answer.last().finish_reason) == (3, pb.FINISH_REASON_CONTEXT)


async def test_3_a_stop_string_is_cut_off_and_no_part_of_it_leaks(contract):
    text = (await contract.generate()).text()
    for start in range(2, 9):
        stop = text[start : start + 4]
        end = text.index(stop)
        stopping = pb.Stopping(max_tokens=24, strings=["never\N{BELL}there", stop])
        answer = await contract.generate(stopping=stopping)
        assert answer.text() == text[:end]
        last = answer.last()
        assert (last.finish_reason, last.stop_string) == (pb.FINISH_REASON_STOP, stop)
        # The tokens of the stop string are reported.
        assert (await contract.text_of(answer.token_ids())).startswith(text[: end + len(stop)])
        stopping.include_match = True
        assert (await contract.generate(stopping=stopping)).text() == text[: end + len(stop)]


async def test_3_without_text_the_tokens_are_the_same(contract):
    answer = await contract.generate(output=pb.OutputOptions(omit_text=True))
    assert answer.text() == ""
    assert answer.token_ids() == (await contract.generate()).token_ids()


async def test_4_the_usage_is_the_sum_of_all_deltas(contract):
    answer = await contract.generate(n=3)
    assert answer.finished.usage.completion_tokens == sum(len(delta.token_ids) for delta in answer.deltas)


async def test_5_the_cut_into_deltas_never_changes_the_output(contract):
    text = (await contract.generate()).text()
    middle = len(text) // 2
    stopping = pb.Stopping(max_tokens=24, ignore_eos=True, strings=[text[middle : middle + 3]])
    outputs = []
    for size in (0, 1, 2, 7, 1000):
        output = pb.OutputOptions(min_delta_tokens=size, logprobs=1)
        answer = await contract.generate(n=2, stopping=stopping, output=output)
        outputs.append([(answer.text(i), answer.token_ids(i), answer.last(i).stop_string) for i in range(2)])
        for index in range(2):
            assert all(len(delta.token_ids) >= size for delta in answer.of(index)[:-1])
            assert [t.token_id for t in answer.logprobs(index)] == answer.token_ids(index)
    assert all(output == outputs[0] for output in outputs)


# ------------------------------------------------------------------------------------------ 6. 7. the caller


async def test_6_a_caller_that_leaves_frees_its_blocks(contract):
    request = pb.GenerateRequest(text=PROMPT, n=4, stopping=pb.Stopping(ignore_eos=True))
    call = contract.generation.Generate(request)
    await call.read()
    call.cancel()
    async with asyncio.timeout(30):
        while True:
            stats = await contract.admin.GetStats(admin_pb2.GetStatsRequest())
            if stats.running == stats.kv_blocks_used == 0:
                break
            await asyncio.sleep(0.02)


async def test_7_the_callers_label_is_echoed_and_need_not_be_unique(contract):
    request = pb.GenerateRequest(text=PROMPT, stopping=pb.Stopping(max_tokens=5))

    async def run() -> str:
        call = contract.generation.Generate(request, metadata=(("x-request-id", "twice"),))
        answer = Answer([event async for event in call])
        assert dict(await call.initial_metadata())["x-request-id"] == "twice"
        return answer.started.request_id

    assert await asyncio.gather(run(), run()) == ["twice", "twice"]


# ----------------------------------------------------------------------------------------------- 8. logprobs


async def test_8_logprobs_do_not_depend_on_how_tokens_are_drawn(contract):
    tops = []
    for sampling in (
        pb.Sampling(temperature=0),
        pb.Sampling(temperature=5, seed=1, logit_bias={5: 50}, repetition_penalty=2),
        pb.Sampling(temperature=0.1, top_k=1, min_p=0.5),
    ):
        output = pb.OutputOptions(logprobs=5)
        answer = await contract.generate(sampling=sampling, stopping=pb.Stopping(max_tokens=1), output=output)
        (token,) = answer.logprobs()
        assert token.logprob <= 0
        tops.append([(t.token_id, pytest.approx(t.logprob, abs=1e-4), t.rank, t.token) for t in token.top])
    assert tops[0] == tops[1] == tops[2]
    assert [rank for _, _, rank, _ in tops[0]] == [1, 2, 3, 4, 5]


async def test_8_each_token_has_one_logprob_with_the_alternatives_asked_for(contract):
    for count in (0, 3):
        answer = await contract.generate(output=pb.OutputOptions(logprobs=count, prompt_logprobs=count))
        assert [t.token_id for t in answer.logprobs()] == answer.token_ids()
        assert {len(t.top) for t in answer.logprobs()} == {count}
        for token in answer.logprobs() + answer.prompt_logprobs[1:]:
            assert math.isfinite(token.logprob)
            assert token.rank >= 1
    assert (await contract.generate()).logprobs() == []


# ----------------------------------------------------------------------------------------- 9. unknown fields


def nested(number: int, *content: bytes) -> bytes:
    """A message or string field."""
    joined = b"".join(content)
    return bytes([number << 3 | 2, len(joined)]) + joined


TEXT, USER = nested(3, b"x"), b"\x08\x02" + nested(2, b"hi")
TOOL_CALL = nested(2, b"f") + nested(3, b"{}")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (TEXT + UNKNOWN, "1002"),
        (TEXT + nested(6, UNKNOWN), "sampling.1002"),
        (nested(5, nested(1, USER, UNKNOWN)), "chat.messages[0].1002"),
        (
            nested(5, nested(1, b"\x08\x03", nested(5, TOOL_CALL, UNKNOWN))),
            "chat.messages[0].tool_calls[0].1002",
        ),
    ],
    ids=["top", "depth 1", "depth 2", "depth 3"],
)
async def test_9_a_field_that_the_server_does_not_know_is_refused_at_any_depth(contract, data, path):
    refusal = await contract.refusal(data)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(refusal.violations) == [path]
    assert re.fullmatch(r"field number 1002 of nanoserve\.v1\.\w+ is not known", refusal.violations[path])


async def test_all_violations_arrive_at_once(contract):
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="x"), pb.ChatMessage(content="x")]),
        sampling=pb.Sampling(temperature=math.nan, top_p=2, logit_bias={3: 101}),
        stopping=pb.Stopping(strings=["ok", "ok", "ok", ""]),
    )
    refusal = await contract.refusal(request.SerializeToString() + UNKNOWN)
    assert sorted(refusal.violations) == [
        "1002",
        "chat.messages[1].role",
        "sampling.logit_bias[3]",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.strings[3]",
    ]
