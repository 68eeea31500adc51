"""What the three APIs share: from fields to a request of the contract, and the shape of an answer. Pure.

fields ─▶ Answer.requests ─▶ Generate ─▶ Started* Delta* Result* ─▶ begin, delta, end: frames of a stream
                                                                 └▶ whole: one object
"""

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import pydantic_core
from nanoserve_client import Delta, FinishReason, GenerateOptions, Result, Started, TokenLogprob
from nanoserve_client.v1 import generation_pb2 as pb
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from nanoserve_gateway.errors import Problem
from nanoserve_gateway.schema import BadRequest, Violation

_Model = TypeVar("_Model", bound=BaseModel)

DONE = b"data: [DONE]\n\n"
# They end no line of an event, but many clients' line readers think so.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
# Fields that GenerateOptions has under the same name.
_SAME = frozenset(
    {"model", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"}
    | {"repetition_penalty", "logit_bias", "stop", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"}
    | {"priority", "cache_salt"}
)


class Answer(Protocol):
    """One request of an API and its answer, as it grows."""

    @property
    def requests(self) -> Sequence[pb.GenerateRequest]:
        """One for each prompt."""

    @property
    def is_streamed(self) -> bool: ...

    @property
    def names(self) -> Mapping[str, str]:
        """What the API calls fields of the contract that have other names there."""

    def begin(self, starts: Sequence[Started]) -> Iterable[bytes]:
        """Frames before the first token."""

    def delta(self, prompt: int, delta: Delta) -> Iterable[bytes]:
        """Frames for new output of one prompt."""

    def end(self, results: Sequence[Result]) -> Iterable[bytes]:
        """The last frames."""

    def fail(self, problem: Problem) -> Iterable[bytes]:
        """The last frames of a stream that cannot go on."""

    def whole(self, results: Sequence[Result]) -> BaseModel:
        """The answer that is not streamed."""


def options(fields: Mapping[str, Any]) -> GenerateOptions:
    """The fields that all APIs have, for the client."""
    chosen = {name: fields[name] for name in _SAME if name in fields}
    if "seed" in fields:
        chosen["seed"] = fields["seed"] % 2**64
    return cast(GenerateOptions, chosen)


def check(*rules: tuple[bool, str, str]) -> None:
    """Raise BadRequest with every rule, (is broken, field, what is wrong), that is broken."""
    if broken := [Violation(param, message) for is_broken, param, message in rules if is_broken]:
        raise BadRequest(broken)


def stream_rules(fields: Mapping[str, Any]) -> tuple[bool, str, str]:
    return "stream_options" in fields and not fields.get("stream"), "stream_options", "is for stream only"


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def frame(event: BaseModel | Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event. What comes with every token is a mapping: objects of openai's take five times as long."""
    head = f"event: {name}\n" if name else ""
    text = to_json(event) if isinstance(event, BaseModel) else pydantic_core.to_json(event).decode()
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    return f"{head}data: {text}\n\n".encode()


class Chunks:
    """The frames of a streamed chat or completion: objects with one head, the usage if it was asked for, and DONE."""

    def __init__(self, kind: str, id: str, created: int, fields: Mapping[str, Any]) -> None:
        self._head = {"id": id, "object": kind, "created": created, "model": fields["model"]}
        self._has_usage = bool(fields.get("stream_options", {}).get("include_usage"))

    def begin(self, started: Started) -> None:
        """From now on they name the model that serves."""
        self._head["model"] = started.model

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        chunk = {**self._head, "choices": [choice]}
        return frame({**chunk, "usage": None} if self._has_usage else chunk)

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        if self._has_usage:
            yield frame({**self._head, "choices": [], "usage": usage_of(results).model_dump(exclude_unset=True)})
        yield DONE


def to_json(answer: BaseModel) -> str:
    """What was set of it, null too. No warnings: openai's types have no null where its API does, as for the first
    token's log-probability."""
    return answer.model_dump_json(exclude_unset=True, warnings=False)


def error_frame(problem: Problem) -> bytes:
    return f"event: error\ndata: {json.dumps(problem.as_json())}\n\n".encode()


def unchecked(kind: type[_Model], **fields: Any) -> _Model:
    """An object of openai's as it is: its check refuses what its own API has, and its way around the check converts all
    that is within, which costs more than the rest of a chunk."""
    construct: Any = BaseModel.__dict__["model_construct"]
    made: _Model = construct.__func__(kind, **fields)
    return made


def finish_reason(reason: FinishReason) -> str:
    """OpenAI knows whether the model came to an end or was cut off."""
    return "stop" if reason in (FinishReason.EOS, FinishReason.STOP) else "length"


def text_of(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", "replace")


def usage_of(results: Sequence[Result]) -> CompletionUsage:
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    cached = sum(result.usage.cached_tokens for result in results)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
