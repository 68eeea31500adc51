"""A caller for tests of a server process: what it asks, without the client's retries and checks, and how it went."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from failure import Failure, failure
from nanoserve_client import Client
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import generation_pb2_grpc
from serve_process import ServeProcess

GENERATE = "/nanoserve.v1.GenerationService/Generate"
OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.max_send_message_length", -1),
    # A channel looks often whether its server is back.
    ("grpc.max_reconnect_backoff_ms", 200),
)
TIMEOUT_S = 60
Metadata = tuple[tuple[str, str], ...]
# The events of a stream that ended well, or how it failed.
Outcome = list[pb.GenerateResponse] | Failure


def endless(**fields: Any) -> pb.GenerateRequest:
    """Goes on for as long as the context lasts."""
    return pb.GenerateRequest(**{"text": "Hello!", "stopping": pb.Stopping(ignore_eos=True), **fields})


def short(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "Hello!", "stopping": pb.Stopping(max_tokens=4, ignore_eos=True), **fields})


class Caller:
    """Calls Generate, without the client's retries and checks. Event loop thread."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str = "") -> None:
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)
        self._raw = channel.unary_stream(GENERATE)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def stream(self, request: pb.GenerateRequest, metadata: Metadata = ()) -> Any:
        metadata = (*self._metadata, *metadata)
        return self._stub.Generate(request, timeout=TIMEOUT_S, metadata=metadata, wait_for_ready=True)

    async def run(self, request: pb.GenerateRequest, metadata: Metadata = ()) -> Outcome:
        try:
            return [event async for event in self.stream(request, metadata)]
        except grpc.aio.AioRpcError as error:
            return failure(error)

    async def refusal(self, data: bytes, compression: grpc.Compression | None = None) -> Failure:
        """How a request of these bytes fails, which may be no message."""
        try:
            await self._raw(data, timeout=TIMEOUT_S, compression=compression).read()
        except grpc.aio.AioRpcError as error:
            return failure(error)
        raise AssertionError("the request was served")

    async def is_served(self) -> bool:
        events = await self.run(short())
        return not isinstance(events, Failure) and num_tokens(events) == 4


@contextlib.asynccontextmanager
async def occupied(caller: Caller) -> AsyncIterator[None]:
    """All sequences that the server runs at once are the caller's, and overtaken by nobody's."""
    stream = caller.stream(endless(n=128, priority=2))
    assert (await anext(aiter(stream))).HasField("started")
    yield
    stream.cancel()


def num_tokens(events: list[pb.GenerateResponse]) -> int:
    return sum(len(event.delta.token_ids) for event in events)


def code_of(outcome: Outcome) -> str:
    return outcome.code.name if isinstance(outcome, Failure) else "OK"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S / 2):
        while not holds():
            await asyncio.sleep(0.02)


def is_idle(server: ServeProcess, api_key: str | None = None) -> bool:
    with Client(server.address, api_key=api_key) as client:
        stats = client.get_stats()
    return not (stats.running or stats.waiting or stats.kv_blocks_used)


def port_of(server: ServeProcess) -> int:
    return int(server.address.rsplit(":", 1)[1])


def num_live(server: ServeProcess) -> int:
    with Client(server.address) as client:
        stats = client.get_stats()
    return stats.running + stats.waiting


def chat(role: int) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content="Hello!")])  # type: ignore[arg-type]
