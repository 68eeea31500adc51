"""The output of a response: items that grow one after the other, and the events that tell of it. Pure.

    Delta ─▶ reasoning ─▶ message ─▶ function_call* ─▶ ...      each: output_item.added, ..., output_item.done

A whole answer is one large delta.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import CallPiece, Completion, Delta, TokenLogprob
from openai.types.responses import (
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningTextDoneEvent,
    ResponseTextDoneEvent,
)
from openai.types.responses.response_content_part_added_event import PartReasoningText
from openai.types.responses.response_output_text import Logprob, LogprobTopLogprob
from openai.types.responses.response_reasoning_item import Content
from openai.types.responses.response_text_delta_event import Logprob as DeltaLogprob
from pydantic import BaseModel

from nanoserve_gateway.answer import new_id, text_of, unchecked

# The class of an event, or of those that come with every token the name; and its fields.
Event = tuple[type[BaseModel] | str, Mapping[str, Any]]


class _Item(abc.ABC):
    """One item. It is in progress until it has a status."""

    prefix: str

    def __init__(self, index: int) -> None:
        self.id, self.index = new_id(self.prefix), index
        self.status = "in_progress"
        self.text = ""

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}

    @property
    def part_place(self) -> dict[str, Any]:
        """Of the one part there is, in items that have any."""
        return {**self.place, "content_index": 0}

    def begin(self) -> Iterator[Event]:
        yield ResponseOutputItemAddedEvent, {"output_index": self.index, "item": self.model()}

    def end(self, status: str) -> Iterator[Event]:
        self.status = status
        yield ResponseOutputItemDoneEvent, {"output_index": self.index, "item": self.model()}

    @abc.abstractmethod
    def model(self) -> BaseModel:
        """As it stands."""


class _Reasoning(_Item):
    prefix = "rs_"

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield ResponseContentPartAddedEvent, {**self.part_place, "part": self._part()}

    def add(self, text: str) -> Iterator[Event]:
        self.text += text
        yield "response.reasoning_text.delta", {**self.part_place, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        yield ResponseReasoningTextDoneEvent, {**self.part_place, "text": self.text}
        yield ResponseContentPartDoneEvent, {**self.part_place, "part": self._part()}
        yield from super().end(status)

    def _part(self) -> PartReasoningText:
        return PartReasoningText(type="reasoning_text", text=self.text)

    def model(self) -> ResponseReasoningItem:
        content = [Content(type="reasoning_text", text=self.text)] if self.text else []
        return unchecked(
            ResponseReasoningItem, id=self.id, type="reasoning", summary=[], content=content, status=self.status
        )


class _Message(_Item):
    prefix = "msg_"

    def __init__(self, index: int, *, has_token_ids: bool) -> None:
        super().__init__(index)
        self._has_token_ids = has_token_ids
        self.logprobs: list[TokenLogprob] = []
        self.token_ids: list[int] = []

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield ResponseContentPartAddedEvent, {**self.part_place, "part": self._part()}

    def add(self, text: str, logprobs: Sequence[TokenLogprob], token_ids: Sequence[int]) -> Iterator[Event]:
        self.text += text
        self.logprobs += logprobs
        self.token_ids += token_ids
        if text or logprobs:
            told = {"delta": text, "logprobs": _short_logprobs(logprobs)}
            yield "response.output_text.delta", {**self.part_place, **told}

    def end(self, status: str) -> Iterator[Event]:
        logprobs = _short_logprobs(self.logprobs)
        yield ResponseTextDoneEvent, {**self.part_place, "text": self.text, "logprobs": logprobs}
        yield ResponseContentPartDoneEvent, {**self.part_place, "part": self._part()}
        yield from super().end(status)

    def _part(self) -> ResponseOutputText:
        extra: dict[str, Any] = {"token_ids": list(self.token_ids)} if self._has_token_ids else {}
        logprobs = [_logprob(token) for token in self.logprobs]
        return ResponseOutputText(type="output_text", text=self.text, annotations=[], logprobs=logprobs, **extra)

    def model(self) -> ResponseOutputMessage:
        content = [] if self.status == "in_progress" else [self._part()]
        return unchecked(
            ResponseOutputMessage, id=self.id, type="message", role="assistant", status=self.status, content=content
        )


class _Call(_Item):
    prefix = "fc_"

    def __init__(self, index: int, piece: CallPiece) -> None:
        super().__init__(index)
        self._number, self._call_id, self._name = piece.index, piece.id, piece.name
        self._is_complete = False

    def goes_on_with(self, piece: CallPiece) -> bool:
        return self._number == piece.index

    def add(self, piece: CallPiece) -> Iterator[Event]:
        self.text += piece.arguments
        self._is_complete = piece.is_complete
        if piece.arguments:
            yield "response.function_call_arguments.delta", {**self.place, "delta": piece.arguments}

    def end(self, status: str) -> Iterator[Event]:
        """Of a call that was cut off there is no event that clients take for all of its arguments."""
        status = "completed" if self._is_complete else "incomplete"
        if self._is_complete:
            yield ResponseFunctionCallArgumentsDoneEvent, {**self.place, "arguments": self.text}
        yield from super().end(status)

    def model(self) -> ResponseFunctionToolCall:
        return unchecked(
            ResponseFunctionToolCall,
            id=self.id,
            type="function_call",
            status=self.status,
            call_id=self._call_id,
            name=self._name,
            arguments=self.text,
        )


class Output:
    """The items so far. The last one may be in progress, and then goes on as long as its own kind comes."""

    def __init__(self, *, is_parsed: bool, has_logprobs: bool, has_token_ids: bool) -> None:
        """is_parsed: the service tells the parts apart."""
        self._is_parsed, self._has_logprobs, self._has_token_ids = is_parsed, has_logprobs, has_token_ids
        self._items: list[_Item] = []
        # Tokens for the next text of a message. They are of the whole output, whatever its parts, and stand with the
        # message: which token is of which part nobody tells.
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []

    def take(self, delta: Delta) -> Iterator[Event]:
        self._logprobs += delta.logprobs if self._has_logprobs else ()
        self._token_ids += delta.token_ids
        if delta.reasoning:
            reasoning = self._open(_Reasoning)
            if reasoning is None:
                reasoning = _Reasoning(len(self._items))
                yield from self._begin(reasoning)
            yield from reasoning.add(delta.reasoning)
        content = delta.content if self._is_parsed else delta.text
        message = self._open(_Message)
        if content and message is None:
            message = _Message(len(self._items), has_token_ids=self._has_token_ids)
            yield from self._begin(message)
        if message is not None:
            yield from message.add(content, self._logprobs, self._token_ids)
            self._logprobs, self._token_ids = [], []
        for piece in delta.tool_calls:
            call = self._open(_Call)
            if call is None or not call.goes_on_with(piece):
                call = _Call(len(self._items), piece)
                yield from self._begin(call)
            yield from call.add(piece)
            if piece.is_complete:
                yield from call.end("completed")

    def take_whole(self, completion: Completion) -> None:
        """All at once."""
        calls = [
            CallPiece(number, call.id, call.name, call.arguments, call.is_complete)
            for number, call in enumerate(completion.tool_calls)
        ]
        whole = Delta(
            index=0,
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            stop_string=completion.stop_string,
            stop_token_id=completion.stop_token_id,
            reasoning=completion.reasoning or "",
            content=completion.content or "",
            tool_calls=tuple(calls),
        )
        for _ in self.take(whole):
            pass

    def finish(self, status: str) -> Iterator[Event]:
        """No more will come. status: of what is not complete by itself. Without anything there is an empty message."""
        if not self._items:
            yield from self._begin(_Message(0, has_token_ids=self._has_token_ids))
        for message in reversed(self._items):
            if isinstance(message, _Message):
                message.logprobs += self._logprobs
                message.token_ids += self._token_ids
                break
        yield from self._end_last(status)

    @property
    def items(self) -> list[BaseModel]:
        return [item.model() for item in self._items]

    def _open(self, kind: type[Any]) -> Any:
        """The item that goes on, if it is of this kind."""
        last = self._items[-1] if self._items else None
        return last if isinstance(last, kind) and last.status == "in_progress" else None

    def _begin(self, item: _Item) -> Iterator[Event]:
        yield from self._end_last("completed")
        self._items.append(item)
        yield from item.begin()

    def _end_last(self, status: str) -> Iterator[Event]:
        if self._items and self._items[-1].status == "in_progress":
            yield from self._items[-1].end(status)


def _logprob(token: TokenLogprob) -> Logprob:
    top = [LogprobTopLogprob(token=text_of(t), bytes=list(t.token), logprob=t.logprob or 0.0) for t in token.top]
    return Logprob(token=text_of(token), bytes=list(token.token), logprob=token.logprob or 0.0, top_logprobs=top)


def _short_logprobs(tokens: Sequence[TokenLogprob]) -> list[DeltaLogprob]:
    """As events have them."""
    return [DeltaLogprob(**_logprob(token).model_dump(exclude={"bytes"})) for token in tokens]
