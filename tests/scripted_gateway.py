"""A gateway in front of a scripted server of the contract, with every answer under the test's control."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import httpx
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.server import GatewayServer, listen
from scripted_server import Script


@dataclass
class Scripted:
    """A gateway with a scripted server behind it."""

    url: str
    # What the server does.
    script: Script
    server: grpc.Server
    http: httpx.Client

    def stop_server(self):
        self.server.stop(grace=None).wait()


@contextlib.contextmanager
def running_gateway(**config):
    """Serves on a thread of its own; gives its URL."""
    listener = listen("127.0.0.1", 0)
    started = threading.Event()
    servers = []

    async def serve():
        server = GatewayServer(GatewayConfig(**config), takes_signals=False)
        servers.append((server, asyncio.get_running_loop()))
        started.set()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server, loop = servers[0]
        loop.call_soon_threadsafe(server.stop)
        thread.join()
        listener.close()


@contextlib.contextmanager
def scripted_gateway(**config):
    script = Script()
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
    script.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with running_gateway(target=f"127.0.0.1:{port}", **config) as url, httpx.Client(base_url=url) as http:
            yield Scripted(url, script, server, http)
    finally:
        server.stop(grace=None).wait()
