"""What goes wrong, as OpenAI's clients want to hear it: a status code, headers and {"error": {...}}.

The gRPC service decides; the table here says only what its answer is called in HTTP. Pure.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from nanoserve_client import NanoserveError
from nanoserve_client.requests import OPTION_NAMES
from starlette.exceptions import HTTPException

from nanoserve_gateway.schema import BadRequest

# The code of what breaks a rule for requests, of the service's or of the gateway's own.
INVALID = "invalid_request"
# Violations that are told.
MAX_VIOLATIONS = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is an error."""

    status: int
    # OpenAI's word for the kind.
    type: str
    # What programs tell errors apart by.
    code: str
    message: str
    # The field that is wrong; of several the first.
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class Refused(Exception):
    """The request is turned away, with this answer."""

    def __init__(self, problem: Problem, *, is_own: bool = True) -> None:
        """is_own: by the gateway, not the service."""
        super().__init__(problem.message)
        self.problem, self.is_own = problem, is_own


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: str
    # Where OpenAI has a name for it; else the server's own reason.
    code: str | None = None
    # Seconds after which another attempt makes sense, if the server does not say. None = it makes none.
    retry_after_s: float | None = None


# OpenAI's clients repeat 408, 409, 429 and whatever is 500 or above, unless told otherwise.
_TABLE = {
    grpc.StatusCode.INVALID_ARGUMENT: _Row(400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: _Row(400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: _Row(401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: _Row(403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: _Row(404, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _Row(429, "rate_limit_error", "rate_limit_exceeded", retry_after_s=1),
    grpc.StatusCode.UNAVAILABLE: _Row(503, "server_error", retry_after_s=1),
    # A server that stops ends so what came in its last moment.
    grpc.StatusCode.CANCELLED: _Row(503, "server_error", "unavailable", retry_after_s=1),
    grpc.StatusCode.DEADLINE_EXCEEDED: _Row(504, "timeout_error"),
    grpc.StatusCode.ABORTED: _Row(409, "cancelled_error"),
    grpc.StatusCode.INTERNAL: _Row(500, "server_error"),
}
# What the contract calls otherwise; an index or key that follows is kept.
_NAMES = {
    **OPTION_NAMES,
    "token_ids.ids": "prompt",
    "text": "prompt",
    "output.prompt_logprobs": "logprobs",
    "chat.messages": "messages",
    "adapter": "model",
    # Of an adapter that is read when it is first asked for.
    "path": "model",
    "chat.template_kwargs_json": "chat_template_kwargs",
}
# Within a message.
_CALL = re.compile(r"(\.tool_calls\[\d+\])\.(name|arguments)(_json)?$")
_SECTION = re.compile(r"^(sampling|stopping|output|chat)\.")
# What calls fail with that the service never saw, besides errors without a reason.
_TOO_LARGE = "REQUEST_TOO_LARGE"


def problem_of(error: Exception, names: Mapping[str, str] | None = None, num_prompts: int = 1) -> Problem:
    """The answer for an exception. names: what the API calls fields of the contract that have other names there.
    num_prompts: that the request has."""
    if isinstance(error, Refused):
        return error.problem
    if isinstance(error, HTTPException):
        code = f"http_{error.status_code}"
        return Problem(error.status_code, "invalid_request_error", code, error.detail, headers=error.headers or {})
    if isinstance(error, BadRequest):
        return _bad_request([(v.param, v.message) for v in error.violations], len(error.violations), INVALID)
    if not isinstance(error, NanoserveError):
        return Problem(500, "server_error", "internal_error", "the gateway failed", headers={"x-should-retry": "false"})
    if error.violations:
        count = int(error.metadata.get("violations", len(error.violations)))
        code = (error.reason or INVALID).lower()
        return _bad_request([(rest_name(f, names or {}), d) for f, d in error.violations], count, code)
    if num_prompts > (most := int(error.metadata.get("max_waiting", num_prompts))):
        # However often it is tried again.
        return bad_request("prompt", f"has {num_prompts} prompts; the server lets {most} requests wait (--max-waiting)")
    row = _TABLE.get(error.code, _Row(500, "server_error"))
    is_of_adapter = (error.reason or "").startswith("ADAPTER_")  # OpenAI has no names for those
    code = row.code if row.code and not is_of_adapter else (error.reason or error.code.name).lower()
    return Problem(row.status, row.type, code, error.message or error.code.name.lower(), headers=_headers(error, row))


def is_own(error: Exception) -> bool:
    """Whether the gateway says so, and not the service, which has a line in its log for each call that it refuses."""
    if isinstance(error, Refused):
        return error.is_own
    return not isinstance(error, NanoserveError) or error.reason in (None, _TOO_LARGE)


def refused(error: NanoserveError, names: Mapping[str, str], num_prompts: int = 1) -> Refused:
    """The error in the words of the API that was called. The others as problem_of takes them."""
    return Refused(problem_of(error, names, num_prompts), is_own=is_own(error))


def names_of_prompt(number: int | None, num_prompts: int) -> Mapping[str, str]:
    """What one of several prompts is called. number: None = it is not known which."""
    if number is None or num_prompts == 1:
        return {}
    return dict.fromkeys(("prompt", "text", "token_ids.ids"), f"prompt[{number}]")


def bad_request(param: str | None, message: str, *, status: int = 400, code: str = INVALID) -> Problem:
    return Problem(status, "invalid_request_error", code, message, param)


def _bad_request(violations: list[tuple[str, str]], count: int, code: str) -> Problem:
    told = [f"{param}: {message}" for param, message in violations[:MAX_VIOLATIONS]]
    if count > len(told):
        told.append(f"and {count - len(told)} more")
    return bad_request(violations[0][0], "; ".join(told), code=code)


def _headers(error: NanoserveError, row: _Row) -> dict[str, str]:
    if row.retry_after_s is not None:
        # OpenAI's clients read milliseconds if they are there; others read whole seconds.
        retry_after_s = row.retry_after_s if error.retry_after is None else error.retry_after
        return {"retry-after": str(max(1, round(retry_after_s))), "retry-after-ms": str(round(retry_after_s * 1000))}
    if row.status == 401:
        return {"www-authenticate": "Bearer"}
    return {"x-should-retry": "false"} if row.status in (409, 500, 504) else {}


def rest_name(path: str, names: Mapping[str, str]) -> str:
    """A field of the contract as the API's callers know it."""
    if path == "chat":  # as a whole, as when the template refuses it
        path = "chat.messages"
    # The longest that fits: a message may be known otherwise than all of them.
    for ours, theirs in sorted({**_NAMES, **names}.items(), key=lambda name: -len(name[0])):
        if path == ours or path.startswith((f"{ours}[", f"{ours}.")):
            return theirs + _CALL.sub(r"\1.function.\2", path[len(ours) :]).replace(".content_parts", ".content")
    return _SECTION.sub("", path)
