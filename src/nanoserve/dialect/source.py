"""Text that comes in pieces, for readers that are written as if all of it were there.

A reader is a generator: where it needs text that has not come yet it yields, and goes on when there is more. How the
text was cut can therefore not change what it reads. What it may still have to give back, it holds.

    ·····│ held │ read │ not yet read │           come later
         └ the first mark                └ a reader that gets here yields
"""

import functools
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from nanoserve.dialect.formats import OPEN

T = TypeVar("T")
Steps = Generator[None, None, T]

# Characters that are held while it is open what they are.
MAX_HELD = 1 << 16
# Whitespace where the format puts some, and a model may write more.
MAX_SPACE = 64
_SPACE = re.compile(r"[ \t\r\n]+")
_ID = re.compile(r"[A-Za-z0-9_\-]+")


@functools.cache
def _parts(text: str) -> list[str]:
    """Of a text of a format: whitespace, what is left open, and what stands between."""
    return [part for part in re.split(rf"(\s+|{OPEN})", text) if part]


class Unread(Exception):
    """What stands here is not what is expected."""


class Over(Unread):
    """The text ended before what is expected."""


@dataclass(eq=False, slots=True)
class Mark:
    """A place to come back to."""

    at: int


class Markers:
    """Some texts that are looked for at once; the longest counts where one begins with another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(set(texts), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        self._firsts = {text[0] for text in self._texts}
        self._max_chars = max(map(len, self._texts), default=0)

    def match(self, text: str, at: int) -> str:
        """The one that stands here; empty if none does."""
        found = self._any.match(text, at)
        return found[0] if found else ""

    def search(self, text: str, at: int) -> tuple[int, str]:
        """Where the first one stands; the end of the text if none does."""
        found = self._any.search(text, at)
        return (found.start(), found[0]) if found else (len(text), "")

    def may_grow(self, text: str, at: int) -> bool:
        """All that is there from here on is the beginning of one."""
        rest = text[at : at + self._max_chars]
        return at + len(rest) == len(text) and any(len(i) > len(rest) and i.startswith(rest) for i in self._texts)

    def begun(self, text: str, at: int) -> int:
        """Where at the end of the text one may have begun; its length if none has."""
        for start in range(max(at, len(text) - self._max_chars + 1), len(text)):
            if text[start] in self._firsts and self.may_grow(text, start):
                return start
        return len(text)


class Source:
    """What has come and is not read yet. One thread at a time."""

    def __init__(self) -> None:
        # Begins with what is held.
        self._text = ""
        self._at = 0
        # Where to come back to, outermost first.
        self._marks: list[Mark] = []
        # No more will come; the model ended it itself.
        self.is_over = False
        self.is_complete = False

    def add(self, text: str) -> None:
        """More has come."""
        read = min([self._at, *(mark.at for mark in self._marks)])
        self._text = self._text[read:] + text
        self._at -= read
        for mark in self._marks:
            mark.at -= read

    @property
    def is_cut_off(self) -> bool:
        """No more will come, and the model did not end it."""
        return self.is_over and not self.is_complete

    def is_cut_off_by(self, wrong: Unread) -> bool:
        """Whether that is why something was not read. Then the rest, of which it is the beginning, is read."""
        if not (self.is_cut_off and isinstance(wrong, Over)):
            return False
        self.rest()
        return True

    # ------------------------------------------------------------------------------------------------- holding

    @contextmanager
    def held(self, num_chars: int = 0) -> Iterator[Mark]:
        """Inside, one can come back to here, or to some characters before, which were read just now. Whoever reads on
        after MAX_HELD characters gets Unread."""
        mark = Mark(self._at - num_chars)
        self._marks.append(mark)
        try:
            yield mark
        finally:
            self._marks.remove(mark)

    def since(self, mark: Mark) -> str:
        return self._text[mark.at : self._at]

    def back(self, mark: Mark) -> None:
        self._at = mark.at

    def forward(self, mark: Mark, num_chars: int) -> None:
        """To some characters behind a mark, if it is not there already."""
        self._at = max(self._at, mark.at + num_chars)

    # ------------------------------------------------------------------------------------------------- reading

    def more(self) -> Steps[bool]:
        """Whether there is another character."""
        if self._room() <= 0:
            raise Unread
        while self._at == len(self._text):
            if self.is_over:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character. Raises Over."""
        if not (yield from self.more()):
            raise Over
        return self._text[self._at]

    def take(self) -> Steps[str]:
        char = yield from self.peek()
        self._at += 1
        return char

    def run(self, pattern: re.Pattern[str]) -> str:
        """What there is by now of a run of characters; it may go on."""
        found = pattern.match(self._text, self._at, min(len(self._text), self._at + max(0, self._room())))
        text = found[0] if found else ""
        self._at += len(text)
        return text

    def whole_run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """A run of characters, to the character that ends it."""
        parts: list[str] = []
        while (yield from self.more()):
            part = self.run(pattern)
            if not part:
                break
            parts.append(part)
        return "".join(parts)

    def space(self) -> Steps[str]:
        """Whitespace, however much there is."""
        return (yield from self.whole_run(_SPACE))

    def literal(self, text: str) -> Steps[None]:
        """Read a text of the format, with any whitespace where it has some. Raises Unread, and is back where it was."""
        with self.held() as mark:
            try:
                for part in _parts(text):
                    if part == OPEN:
                        yield from self.whole_run(_ID)
                    else:
                        yield from self._some_space() if part.isspace() else self._exactly(part)
            except Unread:
                self.back(mark)
                raise

    def first_of(self, texts: Iterable[str]) -> Steps[str]:
        """Read the first of some texts of the format that stands here. Raises Unread, and is back where it was."""
        was_over = False
        with self.held() as mark:
            for text in texts:
                try:
                    yield from self.literal(text)
                except Unread as wrong:
                    was_over = was_over or isinstance(wrong, Over)
                    continue
                if was_over and self.is_cut_off:
                    # It may have become one of those before.
                    break
                return text
            self.back(mark)
        raise Over if was_over else Unread

    def one_of(self, markers: Markers) -> Steps[str]:
        """Read the marker that stands here; empty if none does."""
        while not self.is_over and markers.may_grow(self._text, self._at):
            yield
        found = markers.match(self._text, self._at)
        self._at += len(found)
        return found

    def until(self, markers: Markers, write: Callable[[str], None]) -> Steps[str]:
        """Write all before the next marker, and read it. Empty if the text ends before; what may have become a marker
        is then left unread."""
        while True:
            start, found = markers.search(self._text, self._at)
            begun = markers.begun(self._text, self._at)
            stop = start if found and self.is_over else min(start, begun)
            if stop > self._at:
                write(self._text[self._at : stop])
                self._at = stop
            if found and (start < begun or self.is_over):
                self._at += len(found)
                return found
            if self.is_over:
                return ""
            yield

    def rest(self) -> str:
        """Read all that is there."""
        text = self._text[self._at :]
        self._at = len(self._text)
        return text

    def _room(self) -> int:
        """Characters that may be read before too many are held."""
        return self._marks[0].at + MAX_HELD - self._at if self._marks else MAX_HELD + len(self._text)

    def _some_space(self) -> Steps[None]:
        for _ in range(MAX_SPACE):
            if not (yield from self.more()) or self._text[self._at] not in " \t\r\n":
                return
            self._at += 1

    def _exactly(self, text: str) -> Steps[None]:
        while True:
            there = self._text[self._at : self._at + len(text)]
            if not text.startswith(there):
                raise Unread
            if there == text:
                self._at += len(text)
                return
            if self.is_over:
                raise Over
            yield
