"""A gRPC server before an engine over simulated KV memory, with observers, and a client of it."""

import asyncio
import contextlib

from engine_bench import SECONDS, running
from nanoserve_client import AsyncClient

from nanoserve.config import ServerConfig
from nanoserve.observer import Observers
from nanoserve.rpc.server import Server


@contextlib.asynccontextmanager
async def watched(*observers, **options):
    """A bench with a gRPC server before it, and a client."""
    everyone = Observers(*observers)
    async with running(observers=everyone, **options) as bench:
        server = Server(ServerConfig(grpc_port=0, drain_timeout_s=0), bench.engine, observers=everyone)
        port = await server.start()
        async with AsyncClient(f"127.0.0.1:{port}", retries=False) as client:
            yield bench, client
        await server.stop()


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.005)
