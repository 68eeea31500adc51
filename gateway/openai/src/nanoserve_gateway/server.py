"""The HTTP server: uvicorn, in a process of its own as `nanoserve-gateway`, or beside a gRPC server."""

import argparse
import asyncio
import contextlib
import functools
import logging
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from nanoserve_client import Tls, transport
from starlette.routing import BaseRoute
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanoserve_gateway.app import build_app
from nanoserve_gateway.config import GatewayConfig

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

# For streams that are still open when the process is told to stop.
STOP_GRACE_S = 30
# Of a connection between two requests. Proxies keep theirs for 60 to 90 s: who closes first must not be the server, or
# a request meets a connection that is just closing.
IDLE_TIMEOUT_S = 120
# Of a request before its body.
MAX_HEAD_BYTES = 64 * 1024
DESCRIPTION = """OpenAI's REST API in front of a nanoserve server: a translation, and nothing else."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError if the address cannot be had."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


class _Connection(HttpToolsProtocol):
    """A caller's connection, as uvicorn has it, on which the head of a request must end, in size and in time; and so
    must a body that was answered before it came, which uvicorn would skip for ever. All other bodies the application
    reads."""

    def __init__(self, *arguments: Any, receive_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receive_timeout_s = receive_timeout_s
        # None while no head is awaited.
        self._head_bytes: int | None = None
        # While the connection waits for one of the two.
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is not None and self.cycle.more_body:
            self._start_timer()

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of the request has more than {MAX_HEAD_BYTES} bytes.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._receive_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class GatewayServer(uvicorn.Server):
    """Serves one listening socket. Event loop thread."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        takes_signals: bool,
        routes: Sequence[BaseRoute] = (),
        meter_provider: "MeterProvider | None" = None,
    ) -> None:
        """takes_signals: whether SIGTERM and SIGINT end it, rather than stop(). The others as build_app takes them."""
        self._takes_signals = takes_signals
        self._app = build_app(config, routes, meter_provider)
        settings = uvicorn.Config(
            self._app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            http=functools.partial(_Connection, receive_timeout_s=config.receive_timeout_s),  # type: ignore[arg-type]
            ws="none",
            lifespan="on",
            timeout_keep_alive=IDLE_TIMEOUT_S,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        super().__init__(settings)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if self._takes_signals:
            with super().capture_signals():
                yield
        else:
            yield

    def stop(self) -> None:
        """Take no more requests, and end when the running ones have."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """After stop() or a signal; uvicorn calls it."""
        self._app.state.is_stopping.set()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> None:
    """`nanoserve-gateway`: serve until a signal."""
    parser = _parser()
    given = parser.parse_args(arguments)
    files = (given.tls_ca, given.client_cert, given.client_key)
    tls = Tls(*files) if given.tls or any(files) else None
    try:
        if tls is not None:
            transport.credentials(tls)
    except ValueError:
        parser.error("--client-cert and --client-key go together")
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = GatewayConfig(
        target=given.target,
        tls=tls,
        host=given.host,
        cors_origins=tuple(given.cors_origin),
        max_body_bytes=given.max_body,
        timeout_s=given.timeout,
    )
    try:
        listener = listen(given.host, given.port)
    except OSError as error:
        raise SystemExit(f"nanoserve-gateway: cannot listen on {given.host}:{given.port}: {error.strerror}") from None
    host, port = listener.getsockname()[:2]
    logging.getLogger(__name__).info("listening on http://%s:%d, for %s", host, port, config.target)
    with listener:
        asyncio.run(GatewayServer(config, takes_signals=True).serve([listener]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanoserve-gateway", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    defaults = GatewayConfig(target="")
    port = _number("a port, 0 to 65535", int, 0, 65535)
    size = _number("a number of bytes, at least 1", int, 1, math.inf)
    seconds = _number("seconds, above 0", float, 0.001, 2**31 - 1)
    add("--target", required=True, metavar="ADDRESS", help="the gRPC service, such as 127.0.0.1:50051")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=port, default=8000, metavar="N", help="0 = any free port (default: %(default)s)")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="whose pages may call; * = all")
    help = "largest request (default: %(default)s)"
    add("--max-body", type=size, default=defaults.max_body_bytes, metavar="BYTES", help=help)
    help = "of a request without x-request-timeout (default: %(default)s)"
    add("--timeout", type=seconds, default=defaults.timeout_s, metavar="SECONDS", help=help)
    add("--tls", action="store_true", help="speak TLS with the gRPC service; the files turn it on too")
    add("--tls-ca", type=Path, metavar="FILE", help="PEM file that its certificate is checked against")
    add("--client-cert", type=Path, metavar="FILE", help="PEM file of the certificate to show, with --client-key")
    add("--client-key", type=Path, metavar="FILE", help="PEM file of its key")
    return parser


def _number(wanted: str, kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """Reads a number within these bounds; `wanted` says what they are."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be {wanted}")
        return value

    return read
