"""What stands behind Envoy where a test is about Envoy: servers without a model, which do what the test says."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
from scripted_server import Script


@dataclass
class StandIn:
    """An HTTP server in place of the OpenAI module. Its threads write, the test reads after the answer."""

    port: int = 0
    # What it answers, but for health checks.
    status: int = 200
    # Requests in order, but for health checks: method, path, headers by lower case name.
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)


@contextlib.contextmanager
def standing_in() -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            is_probe = self.headers.get("user-agent") == "Envoy/HC"
            if not is_probe:
                stand_in.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            body = json.dumps({"stand_in": stand_in.port}).encode()
            self.send_response(200 if is_probe else stand_in.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = do_OPTIONS = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stand_in.port = server.server_address[1]
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Scripted:
    """A gRPC server of the contract. It knows no health checks, so Envoy takes it for ill, and uses it if all are."""

    script: Script
    port: int


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    server = grpc.server(
        ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    )
    script = Script()
    script.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Scripted(script, port)
    finally:
        server.stop(None).wait()
