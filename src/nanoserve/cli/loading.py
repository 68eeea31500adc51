"""What a person sees while a model loads: a bar on a terminal, else a log line a stage; then the facts of the start."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from nanoserve.cli.terminal import StatusLine

BAR_WIDTH = 30
REDRAW_S = 0.1

logger = logging.getLogger(__name__)


class Loading:
    """Takes the reports of build.py, on any thread, and shows them as they come.

    A thread of its own redraws the bar, so that the clock goes on while a stage says nothing.
    """

    def __init__(self, status_line: StatusLine | None) -> None:
        self._status_line = status_line
        # Name, share done or None, and time.monotonic() of its begin: one tuple, because two threads use it.
        self._stage: tuple[str, float | None, float] = ("starting", None, time.monotonic())
        self._facts: list[tuple[str, str]] = []
        self._has_ended = threading.Event()
        self._drawer = threading.Thread(target=self._draw, name="nanoserve-progress", daemon=True)

    def stage(self, name: str, share: float | None = None) -> None:
        """What is being done; share: how much of it is, 0 to 1, if that is known."""
        if name != self._stage[0]:
            if self._status_line is None:
                logger.info(name)
            self._stage = (name, share, time.monotonic())
        else:
            self._stage = (name, share, self._stage[2])

    def fact(self, name: str, value: str) -> None:
        """Something to know of what was loaded."""
        self._facts.append((name, value))

    def summary(self) -> str:
        """The facts in two columns."""
        width = max((len(name) for name, _ in self._facts), default=0)
        indent = "\n" + " " * (width + 4)
        return "\n".join(f"  {name:{width}}  {value.replace(chr(10), indent)}" for name, value in self._facts)

    def __enter__(self) -> Self:
        if self._status_line is not None:
            self._drawer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended.set()
        if self._status_line is not None:
            self._drawer.join()
            self._status_line.show("")

    def _draw(self) -> None:
        assert self._status_line is not None
        while not self._has_ended.wait(REDRAW_S):
            name, share, begin_s = self._stage
            num_done = round(BAR_WIDTH * (share or 0))
            bar = "" if share is None else f" [{'#' * num_done}{'.' * (BAR_WIDTH - num_done)}] {share:4.0%}"
            self._status_line.show(f"{name}{bar}  {time.monotonic() - begin_s:.1f} s")
