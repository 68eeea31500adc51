"""One RPC as a servicer sees it, and how a servicer's methods become gRPC handlers.

    bytes ─ parse ─▶ message or Unparsable ─▶ servicer method(message, Call) ─▶ reply, or an exception ─▶ errors.abort

Servicers only raise; what is common to all RPCs (the request id, a message that does not parse, errors) is here.
"""

import asyncio
import hashlib
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from nanoserve_client.transport import MAX_REQUEST_ID_CHARS, REQUEST_ID_CHARS, REQUEST_ID_HEADER

from nanoserve.request import InvalidRequest, Violation
from nanoserve.rpc.errors import abort

# Smaller messages are checked and converted on the event loop; a thread would cost more than it saves.
_LARGE_MESSAGE_BYTES = 64 * 1024

Metadata = Iterable[tuple[str, str | bytes]]
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC in progress: who calls, under which name, and the stream to write to. Event loop thread."""

    # The caller's x-request-id, or a new one. Not unique.
    request_id: str
    # Names the API key without revealing it; empty without a key.
    principal: str
    context: grpc.aio.ServicerContext[Any, Any]


class Unparsable:
    """What the deserializer returns for bytes that are no message; gRPC would call an exception there INTERNAL."""

    def __init__(self, why: str) -> None:
        self.why = why


def header(metadata: Metadata, key: str) -> str | None:
    """The first value of a text header."""
    return next((v for k, v in metadata if k == key and isinstance(v, str)), None)


def bearer_key(metadata: Metadata) -> str | None:
    """The API key in `authorization: Bearer KEY`."""
    scheme, _, key = (header(metadata, "authorization") or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def request_id(metadata: Metadata) -> str:
    """The caller's label, or a new one.

    The label goes into headers, trailers and logs, so one that is too long or not printable ASCII is refused, and the
    refusal bears what of it is fit to print.
    """
    label = header(metadata, REQUEST_ID_HEADER)
    if not label:
        return str(uuid.uuid4())
    return "".join(c for c in label[:MAX_REQUEST_ID_CHARS] if c in REQUEST_ID_CHARS)


def service_handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """Serve each method of the service by the servicer's coroutine of the same name.

    The generated registration cannot be used: its deserializers raise.
    """
    methods = {m.name: _method_handler(m, getattr(servicer, m.name)) for m in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


async def off_loop(
    convert: Callable[Concatenate[Any, _P], _R],
    message: Message,
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> _R:
    """convert(message, ...), on a thread if the message is so large that other streams would wait for it."""
    if message.ByteSize() < _LARGE_MESSAGE_BYTES:
        return convert(message, *args, **kwargs)
    return await asyncio.to_thread(convert, message, *args, **kwargs)


def _method_handler(
    method: MethodDescriptor, serve: Callable[[Any, Call], Awaitable[Any]]
) -> "grpc.RpcMethodHandler[Any, Any]":
    request_class = GetMessageClass(method.input_type)

    def parse(data: bytes) -> Message | Unparsable:
        try:
            return request_class.FromString(data)
        except DecodeError as error:
            return Unparsable(str(error))

    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        metadata = list(context.invocation_metadata() or ())
        call = Call(request_id(metadata), _principal(metadata), context)
        try:
            _check_call(method, request, metadata, call)
            return await serve(request, call)
        except grpc.aio.BaseError:
            raise  # the connection is gone, or the server stops: gRPC deals with its own
        except Exception as error:
            await abort(context, error, call.request_id)

    kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return kind(handle, parse, GetMessageClass(method.output_type).SerializeToString)


def _check_call(method: MethodDescriptor, request: Any, metadata: Metadata, call: Call) -> None:
    """Raise InvalidRequest for bytes that are no message and for a label that cannot be echoed."""
    if isinstance(request, Unparsable):
        raise InvalidRequest([Violation(method.input_type.full_name, request.why)])
    label = header(metadata, REQUEST_ID_HEADER)
    if label and label != call.request_id:
        allowed = f"1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters are allowed"
        raise InvalidRequest([Violation(f"metadata {REQUEST_ID_HEADER}", allowed)])


def _principal(metadata: Metadata) -> str:
    key = bearer_key(metadata)
    return hashlib.sha256(key.encode()).hexdigest() if key else ""
