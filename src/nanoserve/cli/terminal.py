"""What a command writes: answers to standard output, everything else to standard error; colours only on a terminal."""

import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from nanoserve.config import environment

FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TERMINAL_FORMAT = "%(message)s"
TO_LINE_START = "\r\x1b[K"


class CommandError(Exception):
    """The command cannot go on; the message is one line for the person who gave it."""


def write(text: str) -> None:
    """Put text on standard output at once. Raises BrokenPipeError if its reader is gone, else CommandError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What could not be written is still in the buffer, and would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"cannot write to standard output: {error.strerror}") from None


def write_error(text: str) -> None:
    """Put text on standard error at once; if that fails there is nobody to tell."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def is_screen(stream: TextIO) -> bool:
    """Whether it is a terminal on which the cursor can be moved."""
    return stream.isatty() and environment().get("TERM", "dumb") != "dumb"


def has_colour(stream: TextIO) -> bool:
    """Whether colours are wanted there (https://no-color.org)."""
    return is_screen(stream) and not environment().get("NO_COLOR")


@contextlib.contextmanager
def on_signals(action: Callable[[], object], *numbers: int) -> Iterator[None]:
    """In the block these signals do this, instead of ending the program."""
    before = {number: signal.signal(number, lambda *_: action()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StatusLine(logging.StreamHandler[TextIO]):
    """Log lines on a terminal, and below them one line that changes. Any thread; the handler's lock guards both."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._status = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock held."""
        self._put(TO_LINE_START if self._status else "")
        super().emit(record)
        self._put(self._status)

    def show(self, status: str) -> None:
        """Replace the line; an empty one takes it away."""
        self.acquire()
        try:
            width = shutil.get_terminal_size().columns - 1
            self._put(TO_LINE_START + status[:width])
            self._status = status[:width]
        finally:
            self.release()

    def _put(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def start_logging(level: int) -> StatusLine | None:
    """Log to standard error: with time and place for a file, for a terminal what a person wants to see.

    Returns the terminal's line for progress, None if there is no terminal.
    """
    status_line = StatusLine() if sys.stderr.isatty() else None
    if status_line is None:
        logging.basicConfig(level=level, format=FILE_FORMAT)
    else:
        logging.basicConfig(level=level, format=TERMINAL_FORMAT, handlers=[status_line])
    return status_line
