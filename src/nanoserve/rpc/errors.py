"""Errors as callers see them: the one table from exception to gRPC status.

Every status carries a google.rpc.Status with ErrorInfo{reason, domain "nanoserve"} and RequestInfo, and what the table
adds. Whatever the caller sent, the trailers stay under MAX_TRAILER_BYTES: proxies and clients drop larger ones, and the
status with them. An exception that the table does not know is a fault of ours: it is logged whole, and the caller reads
only that the engine failed.
"""

import base64
import logging
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    Overloaded,
    RequestError,
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


class Unauthenticated(RequestError):
    """The call bears no API key, or one that is not known."""


class PermissionDenied(RequestError):
    """The API key is good, but not for this service."""


class RequestNotFound(RequestError):
    """No request with this id runs, waits, or is still remembered."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"no request {request_id!r} runs or waits, and none of the last ones was called so")
        self.request_id = request_id


class NotRecorded(RequestError):
    """The server keeps no records of its steps and requests; `nanoserve serve` does."""

    def __init__(self) -> None:
        super().__init__("this server keeps no records of its steps and requests")


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How an RPC fails."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class _Extra:
    """What an error says besides its reason and message."""

    # Of ErrorInfo.
    metadata: dict[str, str] = field(default_factory=dict)
    # google.rpc messages.
    details: Sequence[Message] = ()
    # When another attempt is worth it. None = the error does not say.
    retry_after_s: float | None = None


# Cuts a text of the caller's to what the trailers have room for.
_Cut = Callable[[str], str]


def _no_extra(_error: RequestError, _cut: _Cut) -> _Extra:
    return _Extra()


def _invalid_request(error: InvalidRequest, cut: _Cut) -> _Extra:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=cut(v.field), description=cut(v.description))
        for v in error.violations[:MAX_VIOLATIONS]
    ]
    return _Extra(
        metadata={"violations": str(len(error.violations))},
        details=[error_details_pb2.BadRequest(field_violations=violations)],
    )


def _context_length(error: ContextLengthExceeded, _cut: _Cut) -> _Extra:
    return _Extra(
        metadata={
            "prompt_tokens": str(error.num_prompt_tokens),
            "max_context_tokens": str(error.max_context_tokens),
        }
    )


def _model_not_found(error: ModelNotFound, cut: _Cut) -> _Extra:
    resource = error_details_pb2.ResourceInfo(
        resource_type="model", resource_name=cut(error.name), description="no such served model"
    )
    return _Extra(details=[resource])


def _request_not_found(error: RequestNotFound, cut: _Cut) -> _Extra:
    resource = error_details_pb2.ResourceInfo(
        resource_type="request", resource_name=cut(error.request_id), description="no such request is known"
    )
    return _Extra(details=[resource])


def _overloaded(error: Overloaded, _cut: _Cut) -> _Extra:
    # A caller who sends more at once than may wait learns that another attempt is of no use.
    return _Extra(metadata={"max_waiting": str(error.max_waiting)}, retry_after_s=error.retry_after_s)


def _not_ready(error: NotReady, _cut: _Cut) -> _Extra:
    return _Extra(retry_after_s=error.retry_after_s)


def _deadline(error: DeadlineExceeded, _cut: _Cut) -> _Extra:
    return _Extra(metadata={"phase": error.phase, "completion_tokens": str(error.num_completion_tokens)})


@dataclass(frozen=True, slots=True)
class _Row:
    code: grpc.StatusCode
    # ErrorInfo.reason: what programs tell errors apart by.
    reason: str
    extra: Callable[[Any, _Cut], _Extra] = _no_extra


_TABLE: dict[type[RequestError], _Row] = {
    InvalidRequest: _Row(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", _invalid_request),
    ContextLengthExceeded: _Row(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", _context_length),
    ModelNotFound: _Row(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", _model_not_found),
    Overloaded: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", _overloaded),
    NotReady: _Row(grpc.StatusCode.UNAVAILABLE, "NOT_READY", _not_ready),
    DeadlineExceeded: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE", _deadline),
    CancelledByOperator: _Row(grpc.StatusCode.ABORTED, "CANCELLED_BY_OPERATOR"),
    EngineFailure: _Row(grpc.StatusCode.INTERNAL, "ENGINE_FAILURE"),
    Unauthenticated: _Row(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDenied: _Row(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    RequestNotFound: _Row(grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND", _request_not_found),
    NotRecorded: _Row(grpc.StatusCode.UNIMPLEMENTED, "NOT_RECORDED"),
}


def status_of(error: Exception, request_id: str) -> ErrorStatus:
    """The status for an exception; for one that the table does not know, that of EngineFailure."""
    known = error if isinstance(error, RequestError) and type(error) in _TABLE else EngineFailure()
    for limit in _TEXT_LIMITS:
        status = _build(known, request_id, limit)
        if _wire_size(status) <= MAX_TRAILER_BYTES:
            break
    return status


def reason_of(error: RequestError) -> str:
    """ErrorInfo.reason, as its caller reads it."""
    return (_TABLE.get(type(error)) or _TABLE[EngineFailure]).reason


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
    extra = row.extra(error, cut)
    status = status_pb2.Status(code=row.code.value[0], message=cut(str(error)))
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=extra.metadata),
        error_details_pb2.RequestInfo(request_id=cut(request_id)),
        *extra.details,
    ]
    trailers: list[tuple[str, str | bytes]] = []
    if extra.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(extra.retry_after_s * 1000)))
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
