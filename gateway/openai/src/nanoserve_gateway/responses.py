"""/v1/responses: conversations that the gateway remembers, and a stream of typed events. Pure.

    response.created ─▶ (queued ─▶) in_progress ─▶ output_item.added ─▶ content_part.added ─▶ output_text.delta*
      ─▶ output_text.done ─▶ content_part.done ─▶ output_item.done ─▶ completed | incomplete

A response has one output item, the assistant's message, with one part, its text. In the background it is queued first.
"""

import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoserve_client import Delta, FinishReason, GenerateOptions, Result, Started, TokenLogprob
from nanoserve_client.requests import chat_prompt, generate_request
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseError,
    ResponseErrorEvent,
    ResponseFailedEvent,
    ResponseIncludable,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseQueuedEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_output_text import Logprob, LogprobTopLogprob
from openai.types.responses.response_text_delta_event import Logprob as DeltaLogprob
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel

from nanoserve_gateway.answer import WHOLE, chat_options, check, frame, new_id, options, text_of, unchecked
from nanoserve_gateway.background import Recording
from nanoserve_gateway.chat import content_of
from nanoserve_gateway.constraints import Constraint, outcome_of
from nanoserve_gateway.errors import Problem

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


@dataclass(slots=True)
class _Draft:
    """The text as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


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
        self._constraint = Constraint(fields)
        check(
            *self._constraint.rules,
            (bool(unknown), "include", f"{', '.join(unknown)} is not known; there are: {', '.join(INCLUDABLE)}"),
            ("top_logprobs" in fields and not self._has_logprobs, "top_logprobs", f"needs {LOGPROBS} in include"),
            (self.is_background and not self._is_kept, "background", "needs store"),
        )
        self.recording = Recording() if self.is_background and self.is_streamed else None
        self._items = items_of(fields["input"])
        self._messages = messages_after(self._items, previous)
        chosen: GenerateOptions = {**options(fields), **self._constraint.options}
        chosen["max_tokens"] = fields.get("max_output_tokens")
        if self._has_logprobs:
            chosen["logprobs"] = fields.get("top_logprobs", 0)
        prompt = chat_prompt(conversation(fields, self._messages), chat_options(fields))
        self.requests = [generate_request(prompt, chosen)]
        self._fields = fields
        self._has_token_ids = bool(fields.get("return_token_ids"))
        self._model, self._created = fields.get("model", ""), int(time.time())
        self.id, self._item_id = new_id("resp_"), new_id("msg_")
        self._draft = _Draft()
        self._number = -1

    @property
    def names(self) -> Mapping[str, str]:
        names = {"output.logprobs": "top_logprobs", "stopping.max_tokens": "max_output_tokens", "prompt": "input"}
        return {**names, **self._constraint.names, **places(self._fields, len(self._items), len(self._messages))}

    def queue(self) -> Iterator[bytes]:
        """Frames of a response in the background, before the service begins with it."""
        yield self._event(ResponseCreatedEvent, response=self.snapshot("queued"))
        yield self._event(ResponseQueuedEvent, response=self.snapshot("queued"))

    def begun(self, started: Started) -> Response:
        """What is kept of it until it has ended, in the background."""
        self._model = started.model
        return self.snapshot("in_progress")

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._model = starts[0].model
        if not self.is_background:
            yield self._event(ResponseCreatedEvent, response=self.snapshot("in_progress"))
        yield self._event(ResponseInProgressEvent, response=self.snapshot("in_progress"))
        yield self._event(ResponseOutputItemAddedEvent, output_index=0, item=self._item("in_progress", []))
        yield self._event(ResponseContentPartAddedEvent, **self._place, part=self._part(_Draft()))

    def delta(self, _prompt: int, delta: Delta) -> Iterator[bytes]:
        self._take(delta.text, delta.logprobs, delta.token_ids, delta.finish_reason)
        if delta.text or (self._has_logprobs and delta.logprobs):
            name = "response.output_text.delta"
            event = {"type": name, "sequence_number": self._next_number(), **self._place, "delta": delta.text}
            yield frame({**event, "logprobs": _short_logprobs(delta.logprobs)}, name)

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        response = self._finish(results[0])
        part = self._part(self._draft)
        logprobs = _short_logprobs(self._draft.logprobs)
        yield self._event(ResponseTextDoneEvent, **self._place, text=part.text, logprobs=logprobs)
        yield self._event(ResponseContentPartDoneEvent, **self._place, part=part)
        yield self._event(ResponseOutputItemDoneEvent, output_index=0, item=response.output[0])
        last = ResponseCompletedEvent if response.status == "completed" else ResponseIncompleteEvent
        yield self._event(last, response=response)

    def fail(self, problem: Problem) -> Iterator[bytes]:
        yield self._event(ResponseErrorEvent, code=problem.code, message=problem.message, param=problem.param)
        yield self._event(ResponseFailedEvent, response=self.failed(problem))

    def whole(self, results: Sequence[Result]) -> Response:
        completion = results[0].completions[0]
        self._take(completion.text, completion.logprobs, completion.token_ids, completion.finish_reason)
        self._model = results[0].started.model
        return self._finish(results[0])

    def remembered(self, response: Response) -> Remembered:
        answer = {"role": "assistant", "content": response.output_text}
        messages = [*self._messages, answer] if response.output else self._messages
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
            parallel_tool_calls=self._fields.get("parallel_tool_calls", False),
            text={"format": (self._fields.get("text") or {}).get("format", {"type": "text"})},
            tool_choice="none",
            tools=[],
            truncation="disabled",
            **{"output": [], "error": None, "incomplete_details": None, "usage": None, **repeated, **fields},
        )

    def failed(self, problem: Problem) -> Response:
        return self._end(self.snapshot("failed", error=ResponseError(code="server_error", message=problem.message)))

    def _take(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob],
        token_ids: Sequence[int],
        reason: FinishReason | None,
    ) -> None:
        self._draft.text += text
        self._draft.logprobs += logprobs
        self._draft.token_ids += token_ids
        self._draft.finish_reason = reason

    def _finish(self, result: Result) -> Response:
        is_whole = self._draft.finish_reason in WHOLE
        status = "completed" if is_whole else "incomplete"
        response = self.snapshot(
            status,
            output=[self._item(status, [self._part(self._draft)])],
            incomplete_details=None if is_whole else IncompleteDetails(reason="max_output_tokens"),
            completed_at=time.time() if is_whole else None,
            usage=_usage(result),
            **outcome_of(result, 0),
        )
        return self._end(response)

    def _end(self, response: Response) -> Response:
        if self._is_kept:
            self._keep(self.remembered(response))
        return response

    def _item(self, status: str, content: list[ResponseOutputText]) -> ResponseOutputMessage:
        return unchecked(
            ResponseOutputMessage, id=self._item_id, type="message", role="assistant", status=status, content=content
        )

    def _part(self, draft: _Draft) -> ResponseOutputText:
        extra: dict[str, Any] = {"token_ids": list(draft.token_ids)} if self._has_token_ids else {}
        logprobs = [_logprob(token) for token in draft.logprobs]
        return ResponseOutputText(type="output_text", text=draft.text, annotations=[], logprobs=logprobs, **extra)

    @property
    def _place(self) -> dict[str, Any]:
        """Of the one part there is."""
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, event: type[BaseModel], **fields: Any) -> bytes:
        name = event.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
        return frame(unchecked(event, type=name, sequence_number=self._next_number(), **fields), name)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def items_of(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The input as items that can be listed; a text is one message of the user."""
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_item_of(message) for message in messages]


def messages_after(items: Sequence[Mapping[str, Any]], previous: Remembered | None) -> list[Mapping[str, Any]]:
    """Of what was said before, and of the items."""
    return [*(previous.messages if previous else ()), *map(_message, items)]


def conversation(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, below the instructions."""
    instructions = fields.get("instructions")
    return [*([{"role": "system", "content": instructions}] if instructions else []), *messages]


def places(fields: Mapping[str, Any], num_items: int, num_messages: int) -> dict[str, str]:
    """What callers call the messages of the contract, which counts instructions and what was said before too. Of the
    messages the last ones are the request's items."""
    before = ["instructions"] if fields.get("instructions") else []
    before += ["previous_response_id"] * (num_messages - num_items)
    given = fields.get("input", ())
    texts = [*before, "input"] if isinstance(given, str) else before
    items = range(0 if isinstance(given, str) else num_items)
    return {
        "chat.messages": "input",
        **{f"chat.messages[{place}].content": name for place, name in enumerate(texts)},
        **{f"chat.messages[{len(before) + place}]": f"input[{place}]" for place in items},
    }


def page_of(items: Sequence[Mapping[str, Any]], query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of a list. query: as INPUT_ITEMS.parse returns it. Raises BadRequest."""
    ordered = list(items) if query.get("order") == "asc" else list(reversed(items))
    begin = 0
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in ordered]
        check((after not in ids, "after", f"there is no item {after!r}"))
        begin = ids.index(after) + 1
    page = ordered[begin : begin + query.get("limit", 20)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(ordered),
    }


def _item_of(message: Mapping[str, Any]) -> dict[str, Any]:
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    content = message["content"]
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else list(content)
    return {"id": new_id("msg_"), "status": "completed", **message, "type": "message", "content": parts}


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": item["role"], "content": content_of(item["content"])}


def _logprob(token: TokenLogprob) -> Logprob:
    top = [LogprobTopLogprob(token=text_of(t), bytes=list(t.token), logprob=t.logprob or 0.0) for t in token.top]
    return Logprob(token=text_of(token), bytes=list(token.token), logprob=token.logprob or 0.0, top_logprobs=top)


def _short_logprobs(tokens: Sequence[TokenLogprob]) -> list[DeltaLogprob]:
    """As events have them."""
    return [DeltaLogprob(**_logprob(token).model_dump(exclude={"bytes"})) for token in tokens]


def _usage(result: Result) -> ResponseUsage:
    usage = result.usage
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
