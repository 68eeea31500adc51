"""A scripted server, and one face for both clients, so that every scenario runs through each."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nanoserve_client import AsyncClient, Client
from scripted_server import Script


@dataclass(frozen=True)
class ScriptedServer:
    target: str
    script: Script


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts a server; it is stopped at the end of the test."""
    servers: list[grpc.Server] = []

    def start(credentials: grpc.ServerCredentials | None = None) -> ScriptedServer:
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 * 2**20)]
        server = grpc.server(ThreadPoolExecutor(max_workers=8), options=options)
        script = Script()
        script.register(server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return ScriptedServer(f"127.0.0.1:{port}", script)

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def server(serve: Callable[..., ScriptedServer]) -> ScriptedServer:
    return serve()


class SyncFace:
    """The synchronous client, each blocking call on a thread."""

    client_type = Client

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(method, *args, **options)

    async def next(self, stream: Any) -> Any:
        return await asyncio.to_thread(next, stream, None)

    async def deltas(self, stream: Any) -> list[Any]:
        return await asyncio.to_thread(list, stream)


class AsyncFace:
    """The asyncio client."""

    client_type = AsyncClient

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await method(*args, **options)

    async def next(self, stream: Any) -> Any:
        return await anext(stream, None)

    async def deltas(self, stream: Any) -> list[Any]:
        return [item async for item in stream]


@pytest.fixture(params=[SyncFace, AsyncFace], ids=["sync", "asyncio"])
async def face(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """One of the two clients. `face.connect(target, ...)` makes it; it is closed at the end of the test."""
    face = request.param()
    clients: list[Any] = []

    def connect(target: str, **options: Any) -> Any:
        clients.append(face.client_type(target, **options))
        return clients[-1]

    face.connect = connect
    yield face
    for client in clients:
        await face.call(client.close)
