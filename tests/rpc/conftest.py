"""A server on a free port with the fake engine behind it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from failure import Failure, failure
from fake_engine import FakeEngine
from nanoserve_client.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc

from nanoserve.config import ServerConfig
from nanoserve.rpc.server import Server


@dataclass
class Served:
    """A running server, and a channel to it."""

    engine: FakeEngine
    server: Server
    port: int
    channel: grpc.aio.Channel

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def model(self) -> model_pb2_grpc.ModelServiceStub:
        return model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def served(engine: FakeEngine) -> AsyncIterator[Served]:
    server = Server(ServerConfig(grpc_port=0, drain_timeout_s=0.0), engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(engine, server, port, channel)
    await server.stop()


@pytest.fixture
def failure_of():
    """Reads a call, unary or streaming, that must fail, and says how."""

    async def run(call) -> Failure:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(call)
        return failure(caught.value)

    async def read(call) -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    return run
