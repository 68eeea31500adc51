"""What a call raises: one exception type, with a subclass for each status that callers treat differently.

`from_status` is pure and serves both clients. The server dresses its errors with google.rpc details; a status that the
transport makes by itself (a lost connection, a proxy's refusal) has none, and every field then has its empty value. A
deadline is noticed by both ends at the same time, so it has its reason and words whichever of them was first.
"""

from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

Metadata = Iterable[tuple[str, str | bytes]]


class NanoserveError(Exception):
    """A call failed.

    Attributes:
        code: The gRPC status code.
        message: What happened, for a person.
        reason: The server's own name of the condition, such as "OVERLOADED" or "CONTEXT_LENGTH_EXCEEDED"; None if the
            transport made the error, a deadline's apart.
        request_id: The request's id as the server knows it, else the one the caller gave; None if there is neither.
        violations: (field, description) of each thing wrong with the request, the field by its path in the contract,
            such as "stopping.strings". The server names at most 16.
        retry_after: Seconds after which the server says a retry makes sense; None if it does not say.
        metadata: Further facts about the condition, such as {"max_context_tokens": "4096"}.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str | None = None,
        request_id: str | None = None,
        violations: Iterable[tuple[str, str]] = (),
        retry_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = reason
        self.request_id = request_id
        self.violations = list(violations)
        self.retry_after = retry_after
        self.metadata = metadata or {}

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.code.name}{reason}: {self.message}"


class InvalidRequest(NanoserveError):
    """INVALID_ARGUMENT: the request breaks the contract, or its prompt does not fit the context."""


class Unauthenticated(NanoserveError):
    """UNAUTHENTICATED: no API key, or a wrong one."""


class PermissionDenied(NanoserveError):
    """PERMISSION_DENIED: the API key has no admin rights."""


class NotFound(NanoserveError):
    """NOT_FOUND: no served model and no adapter has this name, or no request that is known has this id."""


class Overloaded(NanoserveError):
    """RESOURCE_EXHAUSTED: the server's queue or its memory for adapters is full, and stayed so through every retry."""


class Unavailable(NanoserveError):
    """UNAVAILABLE: the server is starting, draining or unreachable; or the connection broke in the middle."""


class DeadlineExceeded(NanoserveError):
    """DEADLINE_EXCEEDED: `timeout` passed."""


class Cancelled(NanoserveError):
    """CANCELLED or ABORTED: the caller, the connection or the operator ended the request."""


class EngineFailure(NanoserveError):
    """INTERNAL: the server failed to compute the request."""


_BY_CODE: dict[grpc.StatusCode, type[NanoserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: Cancelled,
    grpc.StatusCode.INTERNAL: EngineFailure,
}


def from_status(
    code: grpc.StatusCode,
    message: str | None,
    trailers: Metadata | None,
    request_id: str | None,
) -> NanoserveError:
    """The exception for a status that is not OK. `request_id` stands in where the details name none."""
    details = _details(trailers or ())
    reason = None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not details:
        reason, message = "DEADLINE", "the request did not end within its time limit"
    error = _BY_CODE.get(code, NanoserveError)(code, message or "", reason=reason, request_id=request_id)
    for detail in details:
        _dress(error, detail)
    return error


def _details(trailers: Metadata) -> list[Any]:
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                # A proxy's or a broken server's. The status itself still says what happened.
                return []
    return []


def _dress(error: NanoserveError, detail: Any) -> None:
    """Take what one detail says into `error`; a detail of an unknown type, or one that does not parse, says nothing."""
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.RequestInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    try:
        if detail.Unpack(info):
            error.reason = info.reason
            error.metadata = dict(info.metadata)
        elif detail.Unpack(request):
            error.request_id = request.request_id
        elif detail.Unpack(bad):
            error.violations = [(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            error.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    except DecodeError:
        return
