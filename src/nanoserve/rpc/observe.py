"""Tells observers of each RPC to nanoserve's services: one interceptor, before the one that asks for keys.

How an RPC ended is read where its caller reads it, in status and trailers; only a call that was cut off has none.
"""

import itertools
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from nanoserve_client.transport import REQUEST_ID_HEADER

from nanoserve.observer import CallRecord, Observers
from nanoserve.rpc.call import Metadata, header

# Probes and reflection are no work.
OBSERVED = "/nanoserve."
# A cancelled RPC with less time than this left was ended by its deadline, not by its caller.
DEADLINE_MARGIN_S = 0.1
# Of any version: version, trace id, parent id, flags (https://www.w3.org/TR/trace-context/).
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")
_Context = grpc.aio.ServicerContext[Any, Any]


class ObserverInterceptor(grpc.aio.ServerInterceptor):
    """Makes a CallRecord of each call. Event loop thread."""

    def __init__(self, observers: Observers) -> None:
        self._observers = observers
        self._numbers = itertools.count(1)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[_Asked, _Answered] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[_Asked, _Answered] | None":
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OBSERVED):
            return handler  # type: ignore[no-any-return]
        kind: str = next(name for name in _KINDS if getattr(handler, name) is not None)
        serve = self._observed(getattr(handler, kind), method, list(handler_call_details.invocation_metadata))
        return _KINDS[kind](serve, handler.request_deserializer, handler.response_serializer)

    def _observed(
        self, serve: Callable[[Any, _Context], Awaitable[Any]], method: str, metadata: Metadata
    ) -> Callable[[Any, _Context], Awaitable[Any]]:
        async def observed(request: Any, context: _Context) -> Any:
            traceparent = header(metadata, "traceparent") or ""
            call = CallRecord(
                method=method.removeprefix("/"),
                request_id=header(metadata, REQUEST_ID_HEADER) or "",
                start_s=time.monotonic(),
                number=next(self._numbers),
                traceparent=traceparent,
                tracestate=header(metadata, "tracestate") or "",
                trace_id=traceparent.split("-")[1] if _TRACEPARENT.fullmatch(traceparent) else "",
            )
            self._observers.call_started(call)
            outcome = {"code": grpc.StatusCode.OK.name}
            try:
                return await serve(request, context)
            except BaseException as error:
                outcome = _failure(error, context)
                raise
            finally:
                self._observers.call_ended(**outcome)

        return observed


_KINDS: dict[str, Callable[..., "grpc.RpcMethodHandler[Any, Any]"]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    # Calls without the right key.
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _failure(error: BaseException, context: _Context) -> dict[str, str]:
    """What the call's record says of it at the end."""
    left_s = context.time_remaining()
    if isinstance(error, grpc.aio.AbortError):
        code: Any = context.code()
        found = {"code": _CODE_NAMES[code] if isinstance(code, int) else code.name}
        for key, value in context.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                found |= _details(status_pb2.Status.FromString(value))
        return found
    if left_s is not None and left_s < DEADLINE_MARGIN_S:
        return {"code": grpc.StatusCode.DEADLINE_EXCEEDED.name, "reason": "DEADLINE"}
    return {"code": grpc.StatusCode.CANCELLED.name}


def _details(status: Any) -> dict[str, str]:
    found = {}
    error, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    for detail in status.details:
        if detail.Unpack(error):
            found["reason"] = error.reason
        elif detail.Unpack(request):
            found["request_id"] = request.request_id
    return found
