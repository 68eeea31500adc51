"""Errors as callers see them: the one table from exception to gRPC status.

Every status carries a google.rpc.Status with ErrorInfo{reason, domain "nanoserve"}, RequestInfo, and for some errors
more. Whatever the caller sent, the trailers stay under MAX_TRAILER_BYTES: proxies and clients drop larger ones, and the
status with them. An exception that is no RequestError is a fault of ours: it is logged whole, and the caller reads
only that the engine failed.
"""

import base64
import logging
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from nanoserve.errors import (
    AdapterInUse,
    AdapterInvalid,
    AdapterMemoryFull,
    AdapterNotFound,
    CancelledByOperator,
    ConstraintInvalid,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    NotRecorded,
    Overloaded,
    PermissionDenied,
    RequestError,
    RequestNotFound,
    Unauthenticated,
)

DOMAIN = "nanoserve"
# Violations that travel; ErrorInfo.metadata "violations" has the count of all.
MAX_VIOLATIONS = 16
# Status message and trailing metadata together, as HTTP/2 counts them (32 bytes an entry besides key and value).
MAX_TRAILER_BYTES = 4096
# Texts are cut to the first of these lengths, in bytes of UTF-8, with which the trailers fit. The last always does.
_TEXT_LIMITS = (1000, 400, 200, 100, 50)
# ASCII that the status message carries as it is; the rest is percent-encoded.
_PLAIN_MESSAGE_BYTES = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How an RPC fails."""

    code: grpc.StatusCode
    # ErrorInfo.reason.
    reason: str
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


_TABLE: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ConstraintInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    AdapterInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterInUse: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterMemoryFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledByOperator: grpc.StatusCode.ABORTED,
    EngineFailure: grpc.StatusCode.INTERNAL,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    RequestNotFound: grpc.StatusCode.NOT_FOUND,
    NotRecorded: grpc.StatusCode.UNIMPLEMENTED,
}


def status_of(error: Exception, request_id: str) -> ErrorStatus:
    """The status for an exception. For one that is no RequestError it is that of EngineFailure."""
    if not isinstance(error, RequestError):
        logger.error("request %s: unexpected error", request_id, exc_info=error)
        error = EngineFailure()
    for limit in _TEXT_LIMITS:
        status = _build(error, request_id, limit)
        if _wire_size(status) <= MAX_TRAILER_BYTES:
            break
    return status


def _build(error: RequestError, request_id: str, limit: int) -> ErrorStatus:
    code = _TABLE[type(error)]
    status = status_pb2.Status(code=code.value[0], message=_cut(str(error), limit))
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata={name: str(fact) for name, fact in error.facts.items()}
        ),
        error_details_pb2.RequestInfo(request_id=_cut(request_id, limit)),
        *_details(error, limit),
    ]
    trailers: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(delay.ToMilliseconds())))
    for detail in details:
        status.details.add().Pack(detail)
    trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return ErrorStatus(code, error.reason, status.message, tuple(trailers))


def _details(error: RequestError, limit: int) -> Iterator[Message]:
    """What only this kind of error has."""
    match error:
        case InvalidRequest() | ConstraintInvalid() | AdapterInvalid():
            violations = [
                {"field": _cut(each.field, limit), "description": _cut(each.description, limit)}
                for each in error.violations[:MAX_VIOLATIONS]
            ]
            yield error_details_pb2.BadRequest(field_violations=violations)
        case ModelNotFound():
            yield error_details_pb2.ResourceInfo(
                resource_type="model", resource_name=_cut(error.name, limit), description="no such served model"
            )
        case AdapterNotFound():
            yield error_details_pb2.ResourceInfo(
                resource_type="adapter", resource_name=_cut(error.name, limit), description="no such adapter"
            )
        case RequestNotFound():
            name = _cut(error.request_id, limit)
            yield error_details_pb2.ResourceInfo(
                resource_type="request", resource_name=name, description="no such request is known"
            )


def _cut(text: str, limit: int) -> str:
    """At most so many bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode("utf-8", "ignore") + "..."


def _wire_size(status: ErrorStatus) -> int:
    """Bytes of the trailers before HPACK: the message percent-encoded, binary values in base64."""
    message = urllib.parse.quote(status.message, safe=_PLAIN_MESSAGE_BYTES)
    entries = [("grpc-status", "16"), ("grpc-message", message), *status.trailers]
    values = [base64.b64encode(v) if isinstance(v, bytes) else v for _, v in entries]
    return sum(len(k) + len(v) + 32 for (k, _), v in zip(entries, values, strict=True))
