"""A gRPC server before an engine over simulated KV memory, with observers, and a client of it."""

import asyncio
import contextlib

import pytest
from engine_bench import SECONDS, running
from nanoserve_client import AsyncClient, NanoserveError

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
        try:
            async with AsyncClient(f"127.0.0.1:{port}", retries=False) as client:
                yield bench, client
        finally:
            await server.stop()


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


async def miss_deadline(request, was_noticed):
    """Let a request run into its deadline, on a server that does not get to it.

    request(timeout_s) sends one; a call whose time is up on the way never reaches the server, so it may take several.
    """
    for timeout_s in (0.3, 1, 3, 10):
        with pytest.raises(NanoserveError):
            await request(timeout_s).result()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not was_noticed():
                    await asyncio.sleep(0.005)
        if was_noticed():
            return
    raise AssertionError("no request reached the server in time")
