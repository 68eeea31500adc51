"""What a person sees while a model loads: a bar on a terminal, else a log line a stage; then the facts of the start."""

import logging
import threading
import time
from typing import Self

from nanoserve.cli.terminal import StatusLine
from nanoserve.request import Fact, Stage

BAR_WIDTH = 30
REDRAW_S = 0.1

logger = logging.getLogger(__name__)


class Loading:
    """Takes the reports of build.py, on any thread, and shows them as they come.

    A thread of its own redraws the bar, so that the clock goes on while a stage says nothing.
    """

    def __init__(self, status_line: StatusLine | None) -> None:
        self._status_line = status_line
        # With time.monotonic() of its begin: one tuple, because two threads use it.
        self._stage = (Stage("starting"), time.monotonic())
        self._facts: list[Fact] = []
        self._has_ended = threading.Event()
        self._drawer = threading.Thread(target=self._draw, name="nanoserve-progress", daemon=True)

    def report(self, said: Stage | Fact) -> None:
        """Is a Report."""
        match said:
            case Fact():
                self._facts.append(said)
            case Stage(name) if name == self._stage[0].name:
                self._stage = (said, self._stage[1])
            case Stage(name):
                if self._status_line is None:
                    logger.info(name)
                self._stage = (said, time.monotonic())

    def summary(self) -> str:
        """The facts in two columns."""
        width = max((len(fact.name) for fact in self._facts), default=0)
        indent = "\n" + " " * (width + 4)
        return "\n".join(f"  {fact.name:{width}}  {fact.value.replace(chr(10), indent)}" for fact in self._facts)

    def __enter__(self) -> Self:
        if self._status_line is not None:
            self._drawer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        if self._status_line is not None:
            self._drawer.join()
            self._status_line.show("")

    def _draw(self) -> None:
        assert self._status_line is not None
        while not self._has_ended.wait(REDRAW_S):
            stage, begin_s = self._stage
            num_done = round(BAR_WIDTH * (stage.share or 0))
            bar = "" if stage.share is None else f" [{'#' * num_done}{'.' * (BAR_WIDTH - num_done)}] {stage.share:4.0%}"
            self._status_line.show(f"{stage.name}{bar}  {time.monotonic() - begin_s:.1f} s")
