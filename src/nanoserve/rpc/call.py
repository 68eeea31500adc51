"""One RPC as a servicer sees it, and how a servicer's methods become gRPC handlers.

    bytes ─ parse ─▶ message, or why it is none ─▶ servicer method(message, Call) ─▶ reply, or an exception ─▶ status

Servicers only raise; what is common to all RPCs (the request id, a message that does not parse, errors, and what
observers are told) is here.
"""

import asyncio
import hashlib
import itertools
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from nanoserve_client.transport import MAX_REQUEST_ID_CHARS, REQUEST_ID_CHARS, REQUEST_ID_HEADER

from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.errors import InvalidRequest, Violation
from nanoserve.observer import CallRecord, Observers
from nanoserve.rpc.errors import status_of

# Smaller messages are checked and converted on the event loop; a thread would cost more than it saves.
_LARGE_MESSAGE_BYTES = 64 * 1024
# A cancelled RPC with less time than this left was ended by its deadline, not by its caller.
_DEADLINE_MARGIN_S = 0.1
# Of any version: version, trace id, parent id, flags (https://www.w3.org/TR/trace-context/).
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]
_Asked = TypeVar("_Asked", bound=Message)
_Wanted = TypeVar("_Wanted")


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC in progress: who calls, under which name, and the stream to write to. Event loop thread."""

    # The caller's x-request-id, or a new one. Not unique.
    request_id: str
    # Names the API key without revealing it; empty without a key.
    principal: str
    context: Context


class Calls:
    """Answers the RPCs to nanoserve's services, and tells observers of each. Event loop thread."""

    def __init__(self, observers: Observers) -> None:
        self._observers = observers
        self._numbers = itertools.count(1)

    def handler(self, service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
        """Serve each method of the service by the servicer's coroutine of the same name.

        The generated registration cannot be used: its deserializers raise.
        """
        methods = {m.name: self._method_handler(m, getattr(servicer, m.name)) for m in service.methods}
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _method_handler(
        self, method: MethodDescriptor, serve: Callable[[Any, Call], Awaitable[Any]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        request_class = GetMessageClass(method.input_type)
        name = f"{method.containing_service.full_name}/{method.name}"

        def parse(data: bytes) -> Message | DecodeError:
            try:
                return request_class.FromString(data)
            except DecodeError as error:
                return error  # if it were raised here, gRPC would call it INTERNAL

        async def serve_checked(request: Any, call: Call) -> Any:
            _check_call(method, request, call)
            return await serve(request, call)

        async def handle(request: Any, context: Context) -> Any:
            return await self.answer(name, request, context, serve_checked)

        kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        return kind(handle, parse, GetMessageClass(method.output_type).SerializeToString)

    async def answer(
        self, method: str, request: Any, context: Context, serve: Callable[[Any, Call], Awaitable[Any]]
    ) -> Any:
        """Serve one RPC, or end it with the status for what is raised. method: as in CallRecord."""
        metadata = list(context.invocation_metadata() or ())
        call = Call(_request_id(metadata), principal_of(metadata), context)
        self._observers.call_started(self._record(method, metadata))
        # How it ended, for its record. Empty = it was cut off.
        outcome: dict[str, str] = {}
        try:
            reply = await serve(request, call)
            outcome = {"code": grpc.StatusCode.OK.name}
            return reply
        except grpc.aio.BaseError:
            raise  # the connection is gone, or the server stops: gRPC deals with its own
        except Exception as error:
            status = status_of(error, call.request_id)
            outcome = {"code": status.code.name, "reason": status.reason, "request_id": call.request_id}
            await context.abort(status.code, status.message, status.trailers)
        finally:
            self._observers.call_ended(**(outcome or _cut_off(context)))

    def _record(self, method: str, metadata: Metadata) -> CallRecord:
        traceparent = _header(metadata, "traceparent") or ""
        return CallRecord(
            method=method,
            request_id=_header(metadata, REQUEST_ID_HEADER) or "",
            start_s=time.monotonic(),
            number=next(self._numbers),
            traceparent=traceparent,
            tracestate=_header(metadata, "tracestate") or "",
            trace_id=traceparent.split("-")[1] if _TRACEPARENT.fullmatch(traceparent) else "",
        )


async def off_loop(
    convert: Callable[[_Asked, ServedModel, Callable[[str], bool]], _Wanted], message: _Asked, engine: Engine
) -> _Wanted:
    """What a message asks for; it is converted on a thread if it is so large that other streams would wait for it."""
    if message.ByteSize() < _LARGE_MESSAGE_BYTES:
        return convert(message, engine.model, engine.has_adapter)
    return await asyncio.to_thread(convert, message, engine.model, engine.has_adapter)


def principal_of(metadata: Metadata) -> str:
    """The digest of the API key in `authorization: Bearer KEY`; empty without a key."""
    scheme, _, key = (_header(metadata, "authorization") or "").partition(" ")
    return digest(key.strip()) if scheme.lower() == "bearer" and key.strip() else ""


def digest(key: str) -> str:
    """Names an API key without revealing it."""
    return hashlib.sha256(key.encode()).hexdigest()


def _header(metadata: Metadata, key: str) -> str | None:
    """The first value of a text header."""
    return next((v for k, v in metadata if k == key and isinstance(v, str)), None)


def _request_id(metadata: Metadata) -> str:
    """The caller's label, or a new one.

    The label goes into headers, trailers and logs, so one that is too long or not printable ASCII is refused, and the
    refusal bears what of it is fit to print.
    """
    label = _header(metadata, REQUEST_ID_HEADER)
    if not label:
        return str(uuid.uuid4())
    return "".join(c for c in label[:MAX_REQUEST_ID_CHARS] if c in REQUEST_ID_CHARS)


def _check_call(method: MethodDescriptor, request: Any, call: Call) -> None:
    """Raise InvalidRequest for bytes that are no message and for a label that cannot be echoed."""
    if isinstance(request, DecodeError):
        raise InvalidRequest([Violation(method.input_type.full_name, str(request))])
    label = _header(call.context.invocation_metadata() or (), REQUEST_ID_HEADER)
    if label and label != call.request_id:
        allowed = f"1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters are allowed"
        raise InvalidRequest([Violation(f"metadata {REQUEST_ID_HEADER}", allowed)])


def _cut_off(context: Context) -> dict[str, str]:
    """How an RPC ended that got no status: its deadline passed, or its caller went away."""
    left_s = context.time_remaining()
    if left_s is not None and left_s < _DEADLINE_MARGIN_S:
        return {"code": grpc.StatusCode.DEADLINE_EXCEEDED.name, "reason": "DEADLINE"}
    return {"code": grpc.StatusCode.CANCELLED.name}
