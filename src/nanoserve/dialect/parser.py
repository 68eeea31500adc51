"""Reads what a model writes: reasoning, content, and calls with their arguments as JSON.

    push('Well.\\n<tool_call>\\n{"na')           ──▶ Content("Well.")
    push('me": "f", "arguments": {"a"')        ──▶ CallBegun(0, "f"), Arguments(0, '{"a"')
    push(": 1}}\\n</tool_call>")                ──▶ Arguments(0, ": 1}"), CallEnded(0)

It follows the same table as the grammar does. What may be the beginning of a marker, of a call whose name has not come,
or of a value whose type is not decided is held; anything else goes out at once.

What looks like a call and is none is content. A call that turns out wrong after its name was told never ends, and what
follows is content. Where something cuts the output off, a call that was opened and has no name yet is left out, and so
is the beginning of what would close a call.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nanoserve.dialect.calls import CallReader
from nanoserve.dialect.formats import Dialect, ReasoningFormat
from nanoserve.dialect.source import Markers, Source, Steps, Unread
from nanoserve.dialect.tools import Tool


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool, once for each."""

    # Counts the calls of an output, from 0.
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of a call. Joined, those of a call that ended are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is complete. One that has no such event is not, and is not to be made."""

    index: int


Event: TypeAlias = Reasoning | Content | CallBegun | Arguments | CallEnded
_SPACE = " \t\r\n"


class OutputParser:
    """Reads one output, in any cut, with special tokens spelled out and without the EOS token. One thread at a time.

    Whitespace that only stands between is part of nothing: around a block of reasoning, between reasoning and what
    follows, between calls, and before a call that nothing else comes before; so is the one line break that some formats
    put between content and a call. Other content is as it was written.
    """

    def __init__(self, dialect: Dialect, tools: Sequence[Tool] | None, *, is_reasoning: bool) -> None:
        """tools: that a call may name; a call of any other is content. None = they are not known, and any may be.
        is_reasoning: the prompt has opened a block of reasoning.
        """
        self._source = Source()
        self._reasoning = dialect.reasoning
        calls = dialect.calls if tools is None or tools else None
        self._calls = CallReader(calls, tools, self._source) if calls else None
        triggers: set[str] = set(calls.triggers) if calls else set()
        self._lead = calls.lead if calls else ""
        frames: set[str] = set()
        if reasoning := dialect.reasoning:
            frames = {*reasoning.frames, reasoning.turn, reasoning.answer} - {""}
        start = {reasoning.start} if reasoning else set()
        self._frames = frames
        # What counts before any content, and what counts anywhere.
        self._at_first = Markers(start | frames | triggers)
        self._later = Markers(
            (start if reasoning and reasoning.is_repeated else set())
            | frames
            | (set() if calls is None or calls.is_at_start else triggers | {self._lead + each for each in triggers})
        )
        self._is_first = True
        # At an edge whitespace waits for what follows it; behind reasoning it is dropped in any case.
        self._is_edge = True
        self._is_behind_reasoning = False
        self._space: list[str] = []
        self._num_calls = 0
        self._events: list[Event] = []
        # What comes next is reasoning.
        self.is_reasoning = is_reasoning and reasoning is not None
        self._steps = self._read(is_reasoning)
        self._advance()

    def push(self, text: str) -> list[Event]:
        """More of the output. Returns what is certain by now."""
        self._source.add(text)
        return self._advance()

    def finish(self, *, is_complete: bool) -> list[Event]:
        """No more will come. is_complete: the model ended it, and nothing cut it off."""
        self._source.is_over = True
        self._source.is_complete = is_complete
        return self._advance()

    # ------------------------------------------------------------------------------------------------- reading

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        events, self._events = self._events, []
        return _merged(events)

    def _read(self, is_reasoning: bool) -> Steps[None]:
        source = self._source
        if is_reasoning and self._reasoning:
            yield from self._read_reasoning(self._reasoning)
        while (yield from source.more()):
            marker = ""
            if self._is_first:
                self._say((yield from source.space()))
                marker = yield from source.one_of(self._at_first)
                self._is_first = bool(marker)
            if not marker:
                marker = yield from source.until(self._later, self._say)
            if not marker:
                self._say(source.rest())
            if marker in self._frames:
                self._is_first = True
            elif self._reasoning and marker == self._reasoning.start:
                yield from self._read_reasoning(self._reasoning)
            elif marker and self._calls:
                yield from self._read_calls(self._calls, marker)
        if self._num_calls == 0 and not self._is_behind_reasoning:
            self._events += [Content(text) for text in self._space]

    def _read_reasoning(self, reasoning: ReasoningFormat) -> Steps[None]:
        """Read to the end of a block that was opened."""
        self._space.clear()
        # Of the block: its beginning.
        self._is_edge = self.is_reasoning = True
        if not (yield from self._source.until(Markers([reasoning.end]), self._think)):
            self._think(self._source.rest())
        self._space.clear()
        self.is_reasoning = False
        self._is_first = self._is_edge = self._is_behind_reasoning = True

    def _read_calls(self, calls: CallReader, trigger: str) -> Steps[None]:
        """Read calls, of which the trigger was read. If they are none, this was content."""
        source = self._source
        with source.held(len(trigger)) as mark:
            source.back(mark)
            if self._lead and trigger.startswith(self._lead):
                source.forward(mark, len(self._lead))
            name: str | None
            try:
                name = yield from calls.first()
            except Unread as wrong:
                if calls.has_markers and source.is_cut_off_by(wrong):
                    self._space.clear()
                    return
                source.forward(mark, len(trigger))
                self._is_first = False
                self._say(source.since(mark))
                return
        self._space.clear()
        while name is not None:
            index = self._num_calls
            self._num_calls += 1
            self._events.append(CallBegun(index, name))
            try:
                yield from calls.arguments(functools.partial(self._write, index))
            except Unread as wrong:
                source.is_cut_off_by(wrong)
                break
            self._events.append(CallEnded(index))
            name = yield from calls.next()
        self._is_edge, self._is_first, self._is_behind_reasoning = True, False, False

    # ------------------------------------------------------------------------------------------------- writing

    def _say(self, text: str) -> None:
        """Content."""
        if self._is_edge:
            rest = text.lstrip(_SPACE)
            self._space.append(text[: len(text) - len(rest)])
            if not rest:
                return
            text = rest if self._is_behind_reasoning else "".join([*self._space, rest])
            self._space.clear()
            self._is_edge = self._is_first = False
        self._events.append(Content(text))

    def _write(self, index: int, text: str) -> None:
        """Arguments of a call."""
        self._events.append(Arguments(index, text))

    def _think(self, text: str) -> None:
        """Reasoning, of which the whitespace at both ends is dropped."""
        if self._is_edge:
            text = text.lstrip(_SPACE)
            self._is_edge = text == ""
        rest = text.rstrip(_SPACE)
        if rest:
            self._events.append(Reasoning("".join([*self._space, rest])))
            self._space.clear()
        self._space.append(text[len(rest) :])


def _merged(events: list[Event]) -> list[Event]:
    """With pieces of one text that follow each other as one event, and without empty ones."""
    merged: list[Event] = []
    for _, group in itertools.groupby(events, lambda each: (type(each), getattr(each, "index", None))):
        same = list(group)
        text = "".join(each.text for each in same if not isinstance(each, CallBegun | CallEnded))
        match same[0]:
            case CallBegun() | CallEnded():
                merged += same
            case first if text:
                merged.append(dataclasses.replace(first, text=text))
    return merged
