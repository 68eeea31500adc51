"""A server of the contract that does what a test says, by assigning functions to its script."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from nanoserve_client.v1 import (
    admin_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
)
from nanoserve_client.v1 import generation_pb2 as pb

Events = Iterator[pb.GenerateResponse]


def started(**fields: Any) -> pb.GenerateResponse:
    values = {"request_id": "made-by-server", "model": "tiny", "prompt_tokens": 4, **fields}
    return pb.GenerateResponse(started=pb.Started(**values))


def delta(index: int = 0, text: str = "", token_ids: tuple[int, ...] = (), **fields: Any) -> pb.GenerateResponse:
    """Of an output that is all content, unless fields say otherwise."""
    fields = {"content": text, **fields}
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=token_ids, **fields))


def finished(completion_tokens: int = 0, **fields: Any) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=completion_tokens)
    timing = pb.Timing(queue=Duration(seconds=1, nanos=500_000_000), decode=Duration(seconds=2), preemptions=3)
    return pb.GenerateResponse(finished=pb.Finished(usage=usage, timing=timing, **fields))


def hello(_request: pb.GenerateRequest, _context: grpc.ServicerContext) -> Events:
    """A short stream that ends well."""
    yield started()
    yield delta(text="Hel", token_ids=(1,))
    yield delta(text="lo", token_ids=(2, 3), finish_reason=pb.FINISH_REASON_EOS, stop_token_id=3)
    yield finished(3)


@dataclass(frozen=True)
class RichStatus(grpc.Status):
    """A status dressed as the server dresses it."""

    code: grpc.StatusCode
    details: str = ""
    packed: tuple[Any, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        status = status_pb2.Status(code=self.code.value[0], message=self.details)
        for message in self.packed:
            anything = any_pb2.Any()
            anything.Pack(message)
            status.details.append(anything)
        return (("grpc-status-details-bin", status.SerializeToString()), *self.extra)


def overloaded(pushback_ms: int) -> RichStatus:
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="nanoserve")
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=pushback_ms // 1000, nanos=250_000_000))
    pushback = ("grpc-retry-pushback-ms", str(pushback_ms))
    return RichStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", (info, retry), (pushback,))


@dataclass
class Script(
    generation_pb2_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    admin_pb2_grpc.AdminServiceServicer,
):
    """What the server does, and what it saw. Its threads write, the test reads after the call."""

    generate: Callable[[Any, Any], Events] = hello
    unary: Callable[[Any, Any], Any] | None = None
    # WatchEngine.
    watch: Callable[[Any, Any], Iterator[Any]] | None = None
    # Every attempt at a call, in order.
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    # Seconds that each caller leaves.
    deadlines: list[float] = field(default_factory=list)
    # Set when a Generate call ends for any reason.
    ended: threading.Event = field(default_factory=threading.Event)

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())

    def Generate(self, request: Any, context: Any) -> Events:
        context.add_callback(self.ended.set)
        self._note(request, context)
        yield from self.generate(request, context)

    def _answer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        assert self.unary is not None, "the test expects no unary call"
        return self.unary(request, context)

    Tokenize = Detokenize = CheckConstraint = ListModels = Cancel = ResetCache = GetStats = ExplainRequest = _answer
    LoadAdapter = UnloadAdapter = ListAdapters = _answer

    def WatchEngine(self, request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.ended.set)
        self._note(request, context)
        assert self.watch is not None, "the test expects no watch"
        yield from self.watch(request, context)

    def register(self, server: Any) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, server)
