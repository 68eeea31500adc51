"""A server that answers as it is asked, or as a test says."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import model_pb2
from scripted_server import Events, Script, delta, finished, started

VOCAB_SIZE = 50
MAX_CONTEXT_TOKENS = 200


def obey(request: Any, _context: Any) -> Events:
    """As many tokens as are asked for, one a Delta."""
    yield started()
    for i in range(request.stopping.max_tokens):
        is_last = i + 1 == request.stopping.max_tokens
        yield delta(token_ids=(7,), finish_reason=pb.FINISH_REASON_LENGTH if is_last else None)
    yield finished(request.stopping.max_tokens)


def list_models(_request: Any, _context: Any) -> model_pb2.ListModelsResponse:
    model = model_pb2.Model(name="tiny", max_context_tokens=MAX_CONTEXT_TOKENS, vocab_size=VOCAB_SIZE)
    return model_pb2.ListModelsResponse(models=[model])


def is_warm_up(request: Any) -> bool:
    return len(request.token_ids.ids) == 16 and request.stopping.max_tokens == 4


@dataclass(frozen=True)
class Target:
    address: str
    script: Script

    @property
    def generate_requests(self) -> list[Any]:
        """Those that are measured."""
        return [r for r in self.script.requests if isinstance(r, pb.GenerateRequest) and not is_warm_up(r)]


@pytest.fixture
def start_server() -> Iterator[Callable[..., Target]]:
    """Starts a server; it is stopped at the end of the test."""
    servers: list[grpc.Server] = []

    def start(credentials: grpc.ServerCredentials | None = None) -> Target:
        server = grpc.server(ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
        script = Script(generate=obey, unary=list_models)
        script.register(server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return Target(f"127.0.0.1:{port}", script)

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def target(start_server: Callable[..., Target]) -> Target:
    return start_server()
