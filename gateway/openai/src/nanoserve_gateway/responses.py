"""/v1/responses: conversations that the gateway remembers, and a stream of typed events. Pure.

    response.created ─▶ (queued ─▶) in_progress ─▶ events of each item of the output ─▶ completed | incomplete
    of a message: output_item.added ─▶ content_part.added ─▶ output_text.delta* ─▶ output_text.done
      ─▶ content_part.done ─▶ output_item.done

The output is reasoning, the assistant's message, and calls of tools, as far as there are any. In the background a
response is queued first.
"""

import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoserve_client import ChatOptions, Delta, GenerateOptions, Result, Started
from nanoserve_client.requests import chat_prompt, generate_request
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseError,
    ResponseErrorEvent,
    ResponseFailedEvent,
    ResponseIncludable,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseQueuedEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel

from nanoserve_gateway.answer import (
    WHOLE,
    chat_options,
    check,
    effort_names,
    effort_rules,
    frame,
    is_parsed,
    model_of,
    new_id,
    options,
    unchecked,
)
from nanoserve_gateway.background import Recording
from nanoserve_gateway.constraints import Constraint, outcome_of
from nanoserve_gateway.errors import Problem
from nanoserve_gateway.items import conversation, items_of, places, turns_of
from nanoserve_gateway.output import Event, Output
from nanoserve_gateway.tools import Tools

LOGPROBS = "message.output_text.logprobs"
# What may be asked for beside it names what is never made here.
INCLUDABLE = typing.get_args(ResponseIncludable)
# Fields of a request that its response repeats.
_REPEATED = (
    *("instructions", "max_output_tokens", "metadata", "previous_response_id", "prompt_cache_key"),
    *("safety_identifier", "temperature", "top_logprobs", "top_p", "user"),
)


@dataclass(frozen=True, slots=True)
class Remembered:
    """A response that is kept, with what it takes to go on from it."""

    response: Response
    # The input of its request, each item with an id.
    items: Sequence[Mapping[str, Any]]
    # All messages up to its answer, without instructions.
    messages: Sequence[Mapping[str, Any]]
    # Of its events, if it was streamed in the background.
    recording: Recording | None = None

    def all_items(self) -> dict[str, Mapping[str, Any]]:
        """Of its input and its output, by id."""
        outputs = [item.model_dump(exclude_unset=True, warnings=False) for item in self.response.output]
        return {item["id"]: item for item in (*self.items, *outputs)}


class ResponseAnswer:
    """The answer to one request of a response: an Answer."""

    def __init__(
        self, fields: Mapping[str, Any], previous: Remembered | None, keep: Callable[[Remembered], object]
    ) -> None:
        """fields: as RESPONSES.parse returns them. previous: what previous_response_id names. keep: told of the
        response when it has ended, unless the request says not to store it. Raises BadRequest.
        """
        self.is_streamed = bool(fields.get("stream"))
        self.is_background = bool(fields.get("background"))
        self._is_kept = fields.get("store", True)
        self._keep = keep
        self._has_logprobs = LOGPROBS in fields.get("include", ())
        unknown = [name for name in fields.get("include", ()) if name not in INCLUDABLE]
        self._constraint, self._tools = Constraint(fields), Tools(fields, strict=True)
        check(
            *self._constraint.rules,
            *self._tools.rules,
            *effort_rules(fields),
            (bool(unknown), "include", f"{', '.join(unknown)} is not known; there are: {', '.join(INCLUDABLE)}"),
            ("top_logprobs" in fields and not self._has_logprobs, "top_logprobs", f"needs {LOGPROBS} in include"),
            (self.is_background and not self._is_kept, "background", "needs store"),
        )
        self.recording = Recording() if self.is_background and self.is_streamed else None
        self._items = items_of(fields["input"])
        self._turns, before = turns_of(self._items), previous.messages if previous else ()
        self._num_before = len(before)
        self._messages = [*before, *(turn.message for turn in self._turns)]
        chosen: GenerateOptions = {**options(fields), **self._constraint.options, "parse": is_parsed(fields)}
        chosen["max_tokens"] = fields.get("max_output_tokens")
        if self._has_logprobs:
            chosen["logprobs"] = fields.get("top_logprobs", 0)
        more: ChatOptions = {**chat_options(fields), **self._tools.options}
        prompt = chat_prompt(conversation(fields, self._messages), more)
        self._tools.choose(prompt)
        self.requests = [generate_request(prompt, chosen)]
        self._fields = fields
        self._model, self._created = fields.get("model", ""), int(time.time())
        self.id = new_id("resp_")
        self._output = Output(
            is_parsed=is_parsed(fields),
            has_logprobs=self._has_logprobs,
            has_token_ids=bool(fields.get("return_token_ids")),
        )
        self._number = -1

    @property
    def names(self) -> Mapping[str, str]:
        names = {"output.logprobs": "top_logprobs", "stopping.max_tokens": "max_output_tokens", "prompt": "input"}
        names |= {**self._constraint.names, **self._tools.names, "output.parse": "skip_special_tokens"}
        names |= effort_names(self._fields)
        return {**names, **places(self._fields, self._num_before, self._turns)}

    def queue(self) -> Iterator[bytes]:
        """Frames of a response in the background, before the service begins with it."""
        yield self._event(ResponseCreatedEvent, response=self.snapshot("queued"))
        yield self._event(ResponseQueuedEvent, response=self.snapshot("queued"))

    def begun(self, started: Started) -> Response:
        """What is kept of it until it has ended, in the background."""
        self._model = model_of(started)
        return self.snapshot("in_progress")

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._model = model_of(starts[0])
        if not self.is_background:
            yield self._event(ResponseCreatedEvent, response=self.snapshot("in_progress"))
        yield self._event(ResponseInProgressEvent, response=self.snapshot("in_progress"))

    def delta(self, _prompt: int, delta: Delta) -> Iterator[bytes]:
        return map(self._told, self._output.take(delta))

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        yield from map(self._told, self._output.finish(_status(results[0])))
        response = self._finish(results[0])
        last = ResponseCompletedEvent if response.status == "completed" else ResponseIncompleteEvent
        yield self._event(last, response=response)

    def fail(self, problem: Problem) -> Iterator[bytes]:
        yield self._event(ResponseErrorEvent, code=problem.code, message=problem.message, param=problem.param)
        yield self._event(ResponseFailedEvent, response=self.failed(problem))

    def whole(self, results: Sequence[Result]) -> Response:
        self._output.take_whole(results[0].completions[0])
        for _ in self._output.finish(_status(results[0])):
            pass
        self._model = model_of(results[0].started)
        return self._finish(results[0])

    def remembered(self, response: Response) -> Remembered:
        output = [item.model_dump(exclude_unset=True, warnings=False) for item in response.output]
        # Nobody can answer a call that was cut off, and its arguments are no JSON.
        said = [item for item in output if not (item["type"] == "function_call" and item["status"] == "incomplete")]
        messages = [*self._messages, *(turn.message for turn in turns_of(said))]
        return Remembered(response, self._items, messages, self.recording)

    def snapshot(self, status: str, **fields: Any) -> Response:
        """The response as it stands."""
        repeated = {name: self._fields.get(name) for name in _REPEATED}
        return unchecked(
            Response,
            id=self.id,
            object="response",
            created_at=self._created,
            status=status,
            model=self._model,
            background=self.is_background,
            store=self._is_kept,
            parallel_tool_calls=self._fields.get("parallel_tool_calls", bool(self._tools)),
            text={"format": (self._fields.get("text") or {}).get("format", {"type": "text"})},
            tool_choice=self._fields.get("tool_choice", "auto" if self._tools else "none"),
            tools=[{"parameters": None, "strict": True, **tool} for tool in self._fields.get("tools", ())],
            truncation="disabled",
            **{"output": [], "error": None, "incomplete_details": None, "usage": None, **repeated, **fields},
        )

    def failed(self, problem: Problem) -> Response:
        return self._end(self.snapshot("failed", error=ResponseError(code="server_error", message=problem.message)))

    def _finish(self, result: Result) -> Response:
        status = _status(result)
        is_whole = status == "completed"
        response = self.snapshot(
            status,
            output=self._output.items,
            incomplete_details=None if is_whole else IncompleteDetails(reason="max_output_tokens"),
            completed_at=time.time() if is_whole else None,
            usage=_usage(result),
            **outcome_of(result, 0, self.names),
        )
        return self._end(response)

    def _end(self, response: Response) -> Response:
        if self._is_kept:
            self._keep(self.remembered(response))
        return response

    def _told(self, event: Event) -> bytes:
        kind, fields = event
        if not isinstance(kind, str):
            return self._event(kind, **fields)
        return frame({"type": kind, "sequence_number": self._next_number(), **fields}, kind)

    def _event(self, event: type[BaseModel], **fields: Any) -> bytes:
        name = event.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
        return frame(unchecked(event, type=name, sequence_number=self._next_number(), **fields), name)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _status(result: Result) -> str:
    return "completed" if result.completions[0].finish_reason in WHOLE else "incomplete"


def _usage(result: Result) -> ResponseUsage:
    usage = result.usage
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
