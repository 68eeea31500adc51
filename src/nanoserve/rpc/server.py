"""The gRPC server: ports, keys, health, reflection, and the way down.

    loading ── set_engine ──▶ serving ── SIGTERM, SIGINT or stop() ──▶ draining ──▶ stopped
    NOT_READY                 ready      refuses new requests,
    to every request                     finishes the running ones

It may be up before there is an engine, so that probes get an answer while a model loads. Health knows two things:
liveness, the empty service name, SERVING for as long as the process answers; and readiness, the names of the services,
SERVING while the engine says that it is well.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from nanoserve_client.transport import MAX_REQUEST_BYTES
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

from nanoserve.config import ConfigError, ServerConfig, address_of
from nanoserve.engine.engine import Engine
from nanoserve.errors import NotReady
from nanoserve.observer import Observers
from nanoserve.rpc.admin import AdminService, Recorder
from nanoserve.rpc.auth import ApiKeyInterceptor, ApiKeys, read_api_keys, read_tls_credentials
from nanoserve.rpc.call import Calls
from nanoserve.rpc.generation import GenerationService
from nanoserve.rpc.model import ModelService

OPTIONS: tuple[tuple[str, Any], ...] = (
    # A second server on the port fails, instead of taking every other connection.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # However many calls come at once, it is the engine's queue that refuses, and says so. Of more than a thousand that
    # wait for the event loop gRPC would by default end some, anyone's, as CANCELLED, which no client tries again.
    ("grpc.server.max_pending_requests", 2**31 - 1),
    ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
    # Clients may ping through a long silence (a queue, a long prompt), at any pace; by default two pings within
    # five minutes end the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Finds callers that are gone without a word, so that their requests end.
    ("grpc.keepalive_time_ms", 60_000),
)
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    model_pb2.DESCRIPTOR.services_by_name["ModelService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
HEALTH_POLL_S = 0.5
# After the drain, for last messages on their way and streams that have no end of their own (health's Watch).
STOP_GRACE_S = 1.0

logger = logging.getLogger(__name__)


class Server:
    """One listening port and what is served on it. Event loop thread."""

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine | None = None,
        *,
        keys: ApiKeys | None = None,
        observers: Observers | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Raises ConfigError if a key or certificate file cannot be used. Inside a running event loop.

        keys: None = those of the config's files. observers: of the calls; None = nobody watches. recorder: for
        AdminService; None = it has no records.
        """
        self._config = config
        self._engine = engine
        self._is_draining = False
        self._credentials = read_tls_credentials(config)
        calls = Calls(observers or Observers())
        asks_for_keys = ApiKeyInterceptor(keys or read_api_keys(config), calls)
        self._grpc = grpc.aio.server(interceptors=[asks_for_keys], options=OPTIONS)
        servicers = (
            GenerationService(self._ready_engine),
            ModelService(self._ready_engine),
            AdminService(self._ready_engine, recorder),
        )
        self._grpc.add_generic_rpc_handlers(list(map(calls.handler, SERVICES, servicers)))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = [s.full_name for s in SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)
        self._health_poll: asyncio.Task[None] | None = None
        # Takes the socket's folder away.
        self._leaving = contextlib.ExitStack()

    async def start(self) -> int:
        """Listen; returns the port. Raises ConfigError if it cannot."""
        port = self._listen()
        await self._refresh_health()
        await self._grpc.start()
        self._health_poll = asyncio.create_task(self._poll_health())
        return port

    def listen_on_socket(self) -> str:
        """Besides the port, and without TLS, on a socket of the file system that this user alone can reach. Returns its
        address. Before start()."""
        folder = self._leaving.enter_context(tempfile.TemporaryDirectory(prefix="nanoserve-"))
        address = f"unix:{folder}/grpc"
        self._grpc.add_insecure_port(address)
        return address

    def set_engine(self, engine: Engine) -> None:
        """The engine is loaded; health follows within HEALTH_POLL_S."""
        self._engine = engine

    async def stop(self) -> None:
        """Refuse new requests, let the running ones finish within drain_timeout_s, then close the port."""
        self._is_draining = True
        await self._refresh_health()
        if self._engine is not None:
            await self._engine.drain(self._config.drain_timeout_s)
        await self._grpc.stop(STOP_GRACE_S)
        self._leaving.close()
        if self._health_poll is not None:
            self._health_poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_poll

    def end_process(self, code: int) -> NoReturn:
        """End the process now, whatever runs, with this exit code."""
        self._leaving.close()
        logging.shutdown()
        os._exit(code)

    async def run_until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT, then stop(). A second one ends the process at once, with 128 + its number."""
        loop = asyncio.get_running_loop()
        first = asyncio.Event()

        def on_signal(number: int) -> None:
            if first.is_set():
                logger.warning("second signal: not waiting for running requests")
                self.end_process(128 + number)
            first.set()

        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, on_signal, number)
        try:
            await first.wait()
            logger.info("draining for up to %g s; signal again to end now", self._config.drain_timeout_s)
            await self.stop()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _ready_engine(self) -> Engine:
        """For the servicers. A loaded engine says itself whether it takes requests."""
        if self._engine is None:
            raise NotReady("draining" if self._is_draining else "loading")
        return self._engine

    def address(self, port: int) -> str:
        """As clients take it."""
        return address_of(self._config.host, port)

    def _listen(self) -> int:
        host, port = self._config.host, self._config.grpc_port
        address = self.address(port)
        try:
            _try_to_bind(host, port)
            if self._credentials is None:
                return self._grpc.add_insecure_port(address)
            return self._grpc.add_secure_port(address, self._credentials)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot listen on {address}: {why}; --grpc-port and --host choose where") from None

    async def _poll_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_POLL_S)
            await self._refresh_health()

    async def _refresh_health(self) -> None:
        is_ready = self._engine is not None and not self._is_draining and self._engine.health() is None
        statuses = health_pb2.HealthCheckResponse
        for service in SERVICES:
            await self._health.set(service.full_name, statuses.SERVING if is_ready else statuses.NOT_SERVING)


def _try_to_bind(host: str, port: int) -> None:
    """Raise OSError if the address cannot be had: gRPC would not say why."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        # As gRPC does; else connections that are on their way down would count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
