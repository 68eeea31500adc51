"""A gateway in front of a scripted server; and one that `nanoserve serve` opened, with the built-in model behind it."""

import asyncio

import httpx
import pytest
from caller import until
from scripted_gateway import scripted_gateway
from serve_process import free_port, serving


@pytest.fixture
def scripted():
    with scripted_gateway() as gateway:
        yield gateway


@pytest.fixture(scope="package")
def served():
    """The process, with `url` the gateway's; in float32, where greedy answers do not depend on the batch."""
    port = free_port()
    with serving("--dtype", "float32", "--no-compile", "--http-port", str(port)) as server:
        server.url = f"http://127.0.0.1:{port}"
        # It follows the engine with a delay.
        asyncio.run(until(lambda: httpx.get(f"{server.url}/health").status_code == 200))
        yield server
