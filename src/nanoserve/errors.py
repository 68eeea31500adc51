"""Why a request is not served: what callers are told, as plain picklable data. rpc/errors.py makes these a status."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request."""

    # Path of the field in the contract, such as "stopping.strings[0]" or "chat.messages[0].role".
    field: str
    # What is wrong and what is allowed.
    description: str


class RequestError(Exception):
    """A request cannot be served. rpc/errors.py holds the one table that makes these a status."""

    # ErrorInfo.reason: what programs tell errors apart by.
    reason: ClassVar[str]
    # When another attempt is worth it. None = the error does not say.
    retry_after_s: float | None = None
    # ErrorInfo.metadata: what programs may want to know besides.
    facts: Mapping[str, object] = MappingProxyType({})

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels between processes as it is: what was made of the arguments is not made again."""
        return _arrived, (type(self), self.args, self.__dict__)


def _arrived(kind: type[RequestError], args: tuple[object, ...], state: Mapping[str, object]) -> RequestError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class Rejection(RequestError):
    """The request is turned away; an engine that fails, a deadline and an operator's hand are no rejections."""


class InvalidRequest(Rejection):
    """One or more fields break the contract."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations
        self.facts = {"violations": len(violations)}


@dataclass(frozen=True, slots=True)
class ConstraintProblem:
    """One thing in a constraint that cannot be enforced."""

    # JSON pointer to the part of it that is meant; empty = the whole.
    pointer: str
    # Of that part, such as "uniqueItems"; empty if it is none.
    keyword: str
    # What is wrong and what is allowed.
    description: str

    def __str__(self) -> str:
        place = f"{self.pointer}/{self.keyword}" if self.keyword else self.pointer
        # A place can be as long as the constraint.
        return " ".join(filter(None, [place[-MAX_PLACE_CHARS:], self.description]))


# Of a place in a constraint, as an error shows it.
MAX_PLACE_CHARS = 200


class ConstraintInvalid(Rejection):
    """A constraint cannot be enforced. `pointer` and `keyword` tell the first place that is in the way."""

    reason = "CONSTRAINT_INVALID"

    def __init__(self, field: str, problems: list[ConstraintProblem]) -> None:
        """field: path of the constraint in the contract. problems: at least one."""
        self.field = field
        self.problems = problems
        self.violations = [Violation(field, str(problem)) for problem in problems]
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))
        first = problems[0]
        self.facts = {
            "pointer": first.pointer[-MAX_PLACE_CHARS:],
            "keyword": first.keyword[:MAX_PLACE_CHARS],
            "violations": len(problems),
        }


class ContextLengthExceeded(Rejection):
    """The prompt leaves no room for a single new token."""

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(self, num_prompt_tokens: int, max_context_tokens: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens; with at least one new token "
            f"it must fit the context of {max_context_tokens}"
        )
        self.facts = {"prompt_tokens": num_prompt_tokens, "max_context_tokens": max_context_tokens}


class ModelNotFound(Rejection):
    """No served model has this name."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, name: str, served: list[str]) -> None:
        super().__init__(f"model {name!r} is not served; served: {', '.join(served)}; ListModels names adapters too")
        self.name = name


class AdapterNotFound(Rejection):
    """No adapter has this name."""

    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no adapter {name!r}; ListModels names those that there are, and LoadAdapter loads one more"
        )
        self.name = name


class AdapterInvalid(Rejection):
    """An adapter cannot be served: its folder is not what it must be. All that is wrong with it is told."""

    reason = "ADAPTER_INVALID"

    def __init__(self, name: str, problems: list[str]) -> None:
        """problems: at least one, each a clause that names the file, tensor or setting."""
        super().__init__(f"adapter {name!r} cannot be served: {'; '.join(problems)}")
        self.name = name
        self.problems = problems
        self.violations = [Violation("path", problem) for problem in problems]
        self.facts = {"adapter": name, "violations": len(problems)}


class AdapterInUse(Rejection):
    """The name has other weights already, or requests run with it."""

    reason = "ADAPTER_IN_USE"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"adapter {name!r} {why}")
        self.name = name
        self.facts = {"adapter": name}


class AdapterMemoryFull(Rejection):
    """There is no room for the weights of one more adapter."""

    reason = "ADAPTER_MEMORY_FULL"

    def __init__(self, name: str, num_bytes: int, max_bytes: int) -> None:
        """num_bytes: what it takes. max_bytes: of all adapters together."""
        super().__init__(
            f"adapter {name!r} takes {num_bytes} bytes; adapters that are in use leave less of --adapter-memory"
            f" ({max_bytes} bytes)"
        )
        self.name, self.num_bytes, self.max_bytes = name, num_bytes, max_bytes
        self.facts = {"adapter": name, "bytes": num_bytes, "max_bytes": max_bytes}


class Overloaded(Rejection):
    """The queue is full."""

    reason = "OVERLOADED"

    def __init__(self, max_waiting: int, retry_after_s: float | None = 1.0, why: str = "") -> None:
        """why: what is told instead of the number of those that wait."""
        super().__init__(f"{why or f'the queue is full ({max_waiting} requests wait)'}; retry later")
        self.max_waiting = max_waiting
        self.retry_after_s = retry_after_s
        # A caller who sends more at once than may wait learns that another attempt is of no use.
        self.facts = {"max_waiting": max_waiting}


class NotReady(Rejection):
    """The engine is starting, draining, or dead."""

    reason = "NOT_READY"

    def __init__(self, why: str, retry_after_s: float = 2.0) -> None:
        super().__init__(f"the server is not ready: {why}")
        self.retry_after_s = retry_after_s


class Unauthenticated(Rejection):
    """The call bears no API key, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(Rejection):
    """The API key is good, but not for this service."""

    reason = "PERMISSION_DENIED"


class DeadlineExceeded(RequestError):
    """The caller's deadline passed."""

    reason = "DEADLINE"

    def __init__(self, phase: str, num_completion_tokens: int) -> None:
        """phase: "waiting" or "running"."""
        super().__init__(f"the deadline passed while {phase}")
        self.facts = {"phase": phase, "completion_tokens": num_completion_tokens}


class CancelledByOperator(RequestError):
    """AdminService.Cancel ended the request."""

    reason = "CANCELLED_BY_OPERATOR"

    def __init__(self) -> None:
        super().__init__("the operator cancelled the request")


class EngineFailure(RequestError):
    """A step failed, of which the server's log has the details, or gave NaN."""

    reason = "ENGINE_FAILURE"

    def __init__(self, why: str = "the engine failed to compute this request") -> None:
        super().__init__(why)


class RequestNotFound(RequestError):
    """No request with this id runs, waits, or is still remembered."""

    reason = "REQUEST_NOT_FOUND"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"no request {request_id!r} runs or waits, and none of the last ones was called so")
        self.request_id = request_id


class NotRecorded(RequestError):
    """The server keeps no records of its steps and requests; `nanoserve serve` does."""

    reason = "NOT_RECORDED"

    def __init__(self) -> None:
        super().__init__("this server keeps no records of its steps and requests")
