"""Errors as callers see them: the one table from exception to gRPC status.

Every status carries a google.rpc.Status with ErrorInfo{reason, domain "nanoserve"} and RequestInfo, and what the table
adds. Whatever the caller sent, the trailers stay under MAX_TRAILER_BYTES: proxies and clients drop larger ones, and the
status with them. An exception that the table does not know is a fault of ours: it is logged whole, and the caller reads
only that the engine failed.
"""

import base64
import logging
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from nanoserve.config import ConfigError
from nanoserve.request import (
    CancelledByOperator,
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


class ServerError(ConfigError):
    """The server cannot start."""


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How an RPC fails."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


# Cuts a text of the caller's to what the trailers have room for.
_Cut = Callable[[str], str]


def _violations(error: InvalidRequest, cut: _Cut) -> Any:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=cut(v.field), description=cut(v.description))
        for v in error.violations[:MAX_VIOLATIONS]
    ]
    return error_details_pb2.BadRequest(field_violations=violations)


def _model(error: ModelNotFound, cut: _Cut) -> Any:
    return error_details_pb2.ResourceInfo(
        resource_type="model", resource_name=cut(error.name), description="no such served model"
    )


def _request(error: RequestNotFound, cut: _Cut) -> Any:
    return error_details_pb2.ResourceInfo(
        resource_type="request", resource_name=cut(error.request_id), description="no such request is known"
    )


@dataclass(frozen=True, slots=True)
class _Row:
    code: grpc.StatusCode
    # Makes one more google.rpc message of the error, whose packages have no types.
    detail: Callable[[Any, _Cut], Any] | None = None


_TABLE: dict[type[RequestError], _Row] = {
    InvalidRequest: _Row(grpc.StatusCode.INVALID_ARGUMENT, _violations),
    ContextLengthExceeded: _Row(grpc.StatusCode.INVALID_ARGUMENT),
    ModelNotFound: _Row(grpc.StatusCode.NOT_FOUND, _model),
    Overloaded: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED),
    NotReady: _Row(grpc.StatusCode.UNAVAILABLE),
    DeadlineExceeded: _Row(grpc.StatusCode.DEADLINE_EXCEEDED),
    CancelledByOperator: _Row(grpc.StatusCode.ABORTED),
    EngineFailure: _Row(grpc.StatusCode.INTERNAL),
    Unauthenticated: _Row(grpc.StatusCode.UNAUTHENTICATED),
    PermissionDenied: _Row(grpc.StatusCode.PERMISSION_DENIED),
    RequestNotFound: _Row(grpc.StatusCode.NOT_FOUND, _request),
    NotRecorded: _Row(grpc.StatusCode.UNIMPLEMENTED),
}


def status_of(error: Exception, request_id: str) -> ErrorStatus:
    """The status for an exception; for one that the table does not know, that of EngineFailure."""
    known = error if isinstance(error, RequestError) and type(error) in _TABLE else EngineFailure()
    for limit in _TEXT_LIMITS:
        status = _build(known, request_id, limit)
        if _wire_size(status) <= MAX_TRAILER_BYTES:
            break
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, request_id: str) -> NoReturn:
    """End the RPC with the status for the error. Raises AbortError, as gRPC wants it."""
    status = status_of(error, request_id)
    if type(error) not in _TABLE:
        logger.error("request %s: unexpected error", request_id, exc_info=error)
    await context.abort(status.code, status.message, status.trailers)
    raise AssertionError("abort() returned")


def _build(error: RequestError, request_id: str, limit: int) -> ErrorStatus:
    def cut(text: str) -> str:
        return _cut_text(text, limit)

    row = _TABLE[type(error)]
    status = status_pb2.Status(code=row.code.value[0], message=cut(str(error)))
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata={name: str(fact) for name, fact in error.facts.items()}
        ),
        error_details_pb2.RequestInfo(request_id=cut(request_id)),
    ]
    if row.detail is not None:
        details.append(row.detail(error, cut))
    trailers: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(delay.ToMilliseconds())))
    for detail in details:
        status.details.add().Pack(detail)
    trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return ErrorStatus(row.code, status.message, tuple(trailers))


def _cut_text(text: str, limit: int) -> str:
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
