"""The server that `nanoserve serve` runs, inside this process, for the command line and the Python API.

It listens on a free port of the loopback, so that every caller goes the same way.
"""

import asyncio
import atexit
import secrets
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from nanoserve_client import AsyncClient, Client

from nanoserve.checkpoint import check_path
from nanoserve.config import Options, ServerConfig
from nanoserve.request import Report, Stage

LOOPBACK = "127.0.0.1"

T = TypeVar("T")


class LocalServer:
    """A server whose event loop has a thread of its own: the caller's is free. Any thread may use it.

    Any process of the machine can reach the port, so it asks for a key that only this process knows.
    """

    def __init__(self, options: Options, report: Report | None = None) -> None:
        """Load the model and serve it. Raises ConfigError."""
        self._options = options
        self._report = report
        self._api_key = secrets.token_urlsafe()
        # Set once it serves, or why it does not.
        self._address: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="nanoserve-server", daemon=True)
        self._thread.start()
        self.address = self._address.result()
        # A thread that still serves while the interpreter goes down would take the process with it.
        atexit.register(self.stop)

    def client(self) -> Client:
        """A new client of this server; its owner closes it."""
        return Client(self.address, api_key=self._api_key)

    def async_client(self) -> AsyncClient:
        """The same for the event loop that runs."""
        return AsyncClient(self.address, api_key=self._api_key)

    def submit(self, task: Callable[[], Coroutine[Any, Any, T]]) -> "Future[T]":
        """Run it on the server's event loop; cancelling the future cancels it."""
        if self._loop.is_closed():
            raise RuntimeError("the model was closed")
        return asyncio.run_coroutine_threadsafe(task(), self._loop)

    def stop(self) -> None:
        """End what runs, and wait until the port is closed. May be called again."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._is_over.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except Exception as error:
                if self._address.done():
                    raise
                self._address.set_exception(error)

    async def _serve(self) -> None:
        check_path(self._options.model)
        if self._report is not None:
            self._report(Stage("importing torch and transformers"))
        from nanoserve.build import build_engine, log_facts
        from nanoserve.rpc.auth import ApiKeys
        from nanoserve.rpc.server import Server

        engine = build_engine(self._options, report=self._report or log_facts)
        config = ServerConfig(host=LOOPBACK, grpc_port=0, drain_timeout_s=0)
        server = Server(config, engine, keys=ApiKeys([self._api_key], None))
        engine.start()
        self._address.set_result(f"{LOOPBACK}:{await server.start()}")
        await self._is_over.wait()
        await server.stop()
        await engine.close()
