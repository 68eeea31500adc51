"""What the three APIs share: from fields to a request of the contract, and the shape of an answer. Pure.

fields ─▶ Answer.requests ─▶ Generate ─▶ Started* Delta* Result* ─▶ begin, delta, end: frames of a stream
                                                                 └▶ whole: one object
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

import pydantic_core
from nanoserve_client import (
    CallOptions,
    ChatOptions,
    Completion,
    Delta,
    DraftSource,
    FinishReason,
    GenerateOptions,
    Result,
    Started,
    TokenizeOptions,
    TokenLogprob,
)
from nanoserve_client.requests import Messages
from nanoserve_client.v1 import generation_pb2 as pb
from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from nanoserve_gateway.constraints import outcome_of
from nanoserve_gateway.errors import Problem
from nanoserve_gateway.schema import BadRequest, Violation

_Model = TypeVar("_Model", bound=BaseModel)

DONE = b"data: [DONE]\n\n"
# They end no line of an event, but many clients' line readers think so.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
# What ends a sequence that was not cut off, as OpenAI sees it.
WHOLE = (FinishReason.EOS, FinishReason.STOP, FinishReason.COMPLETE)
# Options that a field of the same name gives, as far as an API has one; `logprobs` means a different thing in each.
_SAME = GenerateOptions.__optional_keys__ - CallOptions.__optional_keys__ - {"logprobs"}
# Fields that ChatOptions has, and what it calls them.
OF_CHAT = {
    "chat_template_kwargs": "template_kwargs",
    "continue_final_message": "continue_final_message",
    "add_generation_prompt": "add_generation_prompt",
    "parse_special_tokens": "parse_special_tokens",
}
# Chats have it under this name, and so have the templates that know it; responses have it in `reasoning`.
EFFORT = "reasoning_effort"


@dataclass(slots=True)
class Prompt:
    """One prompt of an answer, and what the service tells of it, which whoever calls the service notes here."""

    # A text, a conversation's messages, or token ids.
    given: Messages | Sequence[int]
    # With which it is tokenized.
    options: TokenizeOptions
    # The answer tells its token ids.
    is_told: bool
    # Set before `begin` if they are told. None = they are not known.
    token_ids: Sequence[int] | None = None
    # Of its tokens, as far as they were asked for; set before the first `delta`.
    logprobs: Sequence[TokenLogprob] = ()


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
    chosen = {name: value for name, value in fields.items() if name in _SAME}
    if "seed" in fields:
        chosen["seed"] = fields["seed"] % 2**64
    if fields.get("top_k") == -1:
        chosen["top_k"] = 0
    chosen["keep_special_tokens"] = not fields.get("skip_special_tokens", True)
    chosen["include_stop"] = fields.get("include_stop_str_in_output")
    return cast(GenerateOptions, chosen)


def chat_options(fields: Mapping[str, Any]) -> ChatOptions:
    """What a conversation has besides its messages, for the client."""
    chosen = {ours: fields[name] for name, ours in OF_CHAT.items() if name in fields}
    if (effort := _effort(fields)) is not None:
        chosen["template_kwargs"] = {**chosen.get("template_kwargs", {}), EFFORT: effort}
    return cast(ChatOptions, chosen)


def effort_rules(fields: Mapping[str, Any]) -> Sequence[tuple[bool, str, str]]:
    """For `check`."""
    is_twice = _effort(fields) is not None and EFFORT in fields.get("chat_template_kwargs", {})
    return [(is_twice, f"chat_template_kwargs.{EFFORT}", f"is given by {_effort_name(fields)} too")]


def effort_names(fields: Mapping[str, Any]) -> Mapping[str, str]:
    """What a caller calls the variables of the template who gave the effort alone."""
    is_alone = _effort(fields) is not None and not fields.get("chat_template_kwargs")
    return {"chat.template_kwargs_json": _effort_name(fields)} if is_alone else {}


def _effort(fields: Mapping[str, Any]) -> str | None:
    effort: str | None = fields.get(EFFORT, (fields.get("reasoning") or {}).get("effort"))
    return effort


def _effort_name(fields: Mapping[str, Any]) -> str:
    return EFFORT if EFFORT in fields else "reasoning.effort"


def is_parsed(fields: Mapping[str, Any]) -> bool:
    """Whether the service is to tell reasoning, content and calls of a chat apart. What keeps the marks between them is
    told as it is."""
    return bool(fields.get("skip_special_tokens", True))


def tokenize_options(fields: Mapping[str, Any]) -> TokenizeOptions:
    """How a prompt is tokenized, for the client."""
    own = {name: fields[name] for name in ("model", "add_special_tokens") if name in fields}
    return cast(TokenizeOptions, {**own, **chat_options(fields)})


def check(*rules: tuple[bool, str, str]) -> None:
    """Raise BadRequest with every rule, (is broken, field, what is wrong), that is broken."""
    if broken := [Violation(param, message) for is_broken, param, message in rules if is_broken]:
        raise BadRequest(broken)


def stream_rules(fields: Mapping[str, Any]) -> Sequence[tuple[bool, str, str]]:
    """What chat and completions refuse of a stream, or without one."""
    is_streamed, asked = bool(fields.get("stream")), fields.get("stream_options", {})
    is_lonely = bool(asked.get("continuous_usage_stats") and not asked.get("include_usage"))
    return (
        (any(asked.values()) and not is_streamed, "stream_options", "is for stream only"),
        (is_lonely, "stream_options.continuous_usage_stats", "is for include_usage only"),
        (is_streamed and "prompt_logprobs" in fields, "prompt_logprobs", "come with a whole answer only, not a stream"),
    )


def model_of(started: Started) -> str:
    """What serves a request, by the name that its caller may have called it by: an adapter is a model of its own."""
    return started.adapter or started.model


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

    def __init__(self, kind: str, id: str, created: int, fields: Mapping[str, Any], *, has_outcomes: bool) -> None:
        """has_outcomes: of a constraint; what became of it is known at the end alone."""
        self._has_outcomes = has_outcomes
        # Last chunks of choices that wait for it: the prompt's number, the sequence's, and the choice.
        self._last: list[tuple[int, int, Mapping[str, Any]]] = []
        self._head = {"id": id, "object": kind, "created": created, "model": fields.get("model", "")}
        asked = fields.get("stream_options", {})
        self._has_usage = bool(asked.get("include_usage"))
        self._has_usage_so_far = bool(asked.get("continuous_usage_stats"))
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    def begin(self, starts: Sequence[Started]) -> None:
        """From now on they name the model that serves."""
        self._head["model"] = model_of(starts[0])
        self._prompt_tokens = sum(started.prompt_tokens for started in starts)
        self._cached_tokens = sum(started.cached_tokens for started in starts)

    def count(self, delta: Delta) -> None:
        """Its tokens are part of the usage from now on."""
        self._completion_tokens += len(delta.token_ids)

    def chunk(self, choice: Mapping[str, Any], fields: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        """fields: what stands beside the choices."""
        chunk = {**self._head, "choices": [choice], **fields}
        if self._has_usage:
            chunk["usage"] = self._usage_so_far() if self._has_usage_so_far else None
        return frame(chunk)

    def last(self, prompt: int, sequence: int, choice: Mapping[str, Any]) -> Iterator[bytes]:
        """A choice's last chunk, unless it has to wait."""
        if self._has_outcomes:
            self._last.append((prompt, sequence, choice))
        else:
            yield self.chunk(choice)

    def end(self, results: Sequence[Result], names: Mapping[str, str] = MappingProxyType({})) -> Iterator[bytes]:
        """names: as those of an Answer."""
        for prompt, sequence, choice in self._last:
            yield self.chunk({**choice, **outcome_of(results[prompt], sequence, names)})
        if self._has_usage:
            yield frame({**self._head, "choices": [], "usage": usage_of(results).model_dump(exclude_unset=True)})
        yield DONE

    def _usage_so_far(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def to_json(answer: BaseModel) -> str:
    """What was set of it, null too. No warnings: openai's types have no null where its API does, as for the first
    token's log-probability."""
    return answer.model_dump_json(exclude_unset=True, warnings=False)


def error_frame(problem: Problem) -> bytes:
    return frame(problem.as_json(), "error")


def unchecked(kind: type[_Model], **fields: Any) -> _Model:
    """An object of openai's as it is: its check refuses what its own API has, and its way around the check converts all
    that is within, which costs more than the rest of a chunk."""
    construct: Any = BaseModel.__dict__["model_construct"]
    made: _Model = construct.__func__(kind, **fields)
    return made


def finish_reason(reason: FinishReason) -> str:
    """OpenAI knows whether the model came to an end or was cut off."""
    return "stop" if reason in WHOLE else "length"


def stop_reason(end: Delta | Completion) -> str | int | None:
    """The stop string or stop token that ended a choice. EOS is none of them, as vLLM has it."""
    if end.finish_reason is not FinishReason.STOP:
        return None
    return end.stop_token_id if end.stop_string is None else end.stop_string


def text_of(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", "replace")


def naming(fields: Mapping[str, Any], name: Callable[[TokenLogprob], str]) -> Callable[[TokenLogprob], str]:
    """What tokens are called in log-probabilities: by `name`, unless the caller wants their ids."""
    return _id_of if fields.get("return_tokens_as_token_ids") else name


def _id_of(token: TokenLogprob) -> str:
    return f"token_id:{token.token_id}"


def prompt_logprobs_of(tokens: Sequence[TokenLogprob], count: int) -> list[dict[str, Any] | None]:
    """As vLLM has them: of each token of the prompt itself and `count` alternatives, by id. None for the first, which
    nothing predicts."""
    return [None if token.logprob is None else _by_id((token, *token.top[:count])) for token in tokens]


def _by_id(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        str(token.token_id): {"logprob": token.logprob, "rank": token.rank, "decoded_token": text_of(token)}
        for token in tokens
    }


def usage_of(results: Sequence[Result]) -> CompletionUsage:
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    cached = sum(result.usage.cached_tokens for result in results)
    predictions = [u for result in results if (u := result.usage.drafts.get(DraftSource.PREDICTION)) is not None]
    accepted = sum(usage.accepted_tokens for usage in predictions)
    reasoning = sum(result.usage.reasoning_tokens for result in results)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=reasoning,
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=sum(usage.tokens for usage in predictions) - accepted,
        ),
    )
