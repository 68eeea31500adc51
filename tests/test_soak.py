"""Long runs against a real server: memory, and requests that nobody would write by hand. `make soak`."""

import asyncio
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from nanoserve_client import AsyncClient, Client
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import generation_pb2_grpc
from serve_process import serving

pytestmark = pytest.mark.soak

NUM_REQUESTS = 10_000
CONCURRENCY = 64
# Of what the server has at its peak; at single moments it has up to 45 MiB less, as malloc gives memory back. Most of
# what it takes after the start are kernels of oneDNN (model/cpu.py) and what freed ones leave between them, 165 MiB.
MAX_WORKING_BYTES = 250 << 20
# That is complete after a few thousand requests; what grows in the second half is a leak. Six kilobytes leaked in each
# request showed as 22 MiB, none as 2 to 7.
MAX_GROWTH_BYTES = 20 << 20

NUM_FUZZED = 5_000
# At once. They wait for each other's steps, but a step over many sequences takes little longer than one over few.
NUM_FUZZING = 16
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}


def test_memory_is_flat_over_ten_thousand_requests():
    rng = random.Random(0)
    with serving("--kv-memory", "16MiB") as server:

        async def one(client):
            prompt = [rng.randrange(5, 1000) for _ in range(rng.randrange(1, 60))]
            stream = client.generate(prompt, max_tokens=rng.randrange(1, 12), n=rng.choice([1, 1, 1, 3]))
            if rng.random() < 0.2:
                await anext(aiter(stream))
                stream.cancel()
            else:
                await stream.result()

        async def some(client, count):
            gate = asyncio.Semaphore(CONCURRENCY)

            async def gated():
                async with gate:
                    await one(client)

            await asyncio.gather(*(gated() for _ in range(count)))

        async def run():
            async with AsyncClient(server.address) as client:
                peaks = [server.peak_bytes()]
                for _ in range(2):
                    await some(client, NUM_REQUESTS // 2)
                    peaks.append(server.peak_bytes())
                return peaks

        start, middle, end = asyncio.run(run())
        assert end - start < MAX_WORKING_BYTES, f"{(end - start) / 2**20:.1f} MiB more than at the start"
        assert end - middle < MAX_GROWTH_BYTES, f"{(end - middle) / 2**20:.1f} MiB more in the second half"
        with Client(server.address) as client:
            stats = client.get_stats()
            assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)


def test_no_request_whatever_its_fields_fails_inside_the_server():
    rng = random.Random(1)
    with serving("--kv-memory", "8MiB", "--max-context-tokens", "512") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)

            def status(request):
                try:
                    for _ in stub.Generate(request, timeout=5):
                        pass
                except grpc.RpcError as error:
                    if error.code() not in REFUSALS:
                        pytest.fail(f"{error.code()}: {error.details()}\n{request}")
                    return error.code()
                return grpc.StatusCode.OK

            with ThreadPoolExecutor(NUM_FUZZING) as pool:
                outcomes = Counter(pool.map(status, (fuzzed(rng) for _ in range(NUM_FUZZED))))
        assert outcomes[grpc.StatusCode.OK] > 50, outcomes
        assert outcomes[grpc.StatusCode.INVALID_ARGUMENT] > 50, outcomes
        with Client(server.address) as client:
            assert client.chat("Hello!", max_tokens=4).result().usage.completion_tokens > 0
            assert client.get_stats().kv_blocks_used == 0


def fuzzed(rng):
    request = pb.GenerateRequest()
    fill(request, rng, depth=0)
    if rng.random() < 0.7:
        make_plausible(request, rng)
    return request


INTEGERS = [0, 1, 2, 3, 5, 16, 17, 20, 21, 64, 128, 129, 511, 512, 1024, 2**31 - 1]
FLOATS = [0.0, -0.0, 1.0, 0.5, -1.0, 2.0, -2.0, 2.1, 100.0, 1e-38, 1e30, -1e30, float("inf"), float("nan")]
STRINGS = ["", "a", "Hello!", "{}", "[1]", '{"a": 1}', "nanoserve-builtin", "\x00", "é😀", "<|im_end|>", "x" * 2000]


def scalar(field, rng):
    kinds = FieldDescriptor
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return rng.choice([*FLOATS, rng.uniform(0, 2)])
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return rng.choice(STRINGS)
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        return rng.randrange(0, 8)
    value = rng.choice([*INTEGERS, rng.randrange(0, 600)])
    is_signed = field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64)
    return -value if is_signed and rng.random() < 0.3 else value


def fill(message, rng, depth):
    """Set some fields of a message to odd values."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > (0.5 if depth else 0.35):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            for _ in range(rng.randrange(3)):
                key = scalar(field.message_type.fields_by_name["key"], rng)
                getattr(message, field.name)[key] = scalar(field.message_type.fields_by_name["value"], rng)
        elif field.message_type and field.is_repeated:
            for _ in range(rng.randrange(3)):
                fill(getattr(message, field.name).add(), rng, depth + 1)
        elif field.message_type:
            child = getattr(message, field.name)
            child.SetInParent()
            fill(child, rng, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, rng) for _ in range(rng.randrange(4)))
        else:
            setattr(message, field.name, scalar(field, rng))


def make_plausible(request, rng):
    """Mend what refuses almost every random request, so that many are served with the odd rest."""
    request.ClearField("model")
    request.text = rng.choice(["Hello!", "é😀", "a b c " * 50])
    for group in (request.sampling, request.stopping, request.output, request.cache):
        for field in list(group.DESCRIPTOR.fields):
            if rng.random() < 0.8:
                group.ClearField(field.name)
    request.stopping.max_tokens = rng.randrange(1, 20)
    request.stopping.ClearField("min_tokens")
    request.n = rng.randrange(1, 4)
    request.priority = rng.randrange(-3, 4)
