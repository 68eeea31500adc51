"""Adapters as the event loop knows them: which there are, and who waits for an answer about one.

The step loop owns them, in engine/adapters.py; here is what it last told.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import TypeVar

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.vocabulary import (
    Adapter,
    AdapterAnswer,
    AdapterInfo,
    AdapterMessage,
    AdaptersServed,
    AdapterStats,
)
from nanoserve.engine.core import Core
from nanoserve.errors import AdapterNotFound, EngineFailure, RequestError

T = TypeVar("T", AdapterInfo, AdapterStats, None)


class AdapterDesk:
    """Event loop only."""

    def __init__(self, core: Core, folders: AdapterFolders | None, adapters: tuple[AdapterInfo, ...]) -> None:
        """folders: None = no adapters are served. adapters: those of the start."""
        self._core = core
        self._folders = folders
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[AdapterInfo | AdapterStats | None]] = {}
        self._hear_of(AdaptersServed(adapters, frozenset()))

    def _hear_of(self, served: AdaptersServed) -> None:
        self._infos = {info.adapter.name: info for info in served.adapters}
        self._withdrawn = served.withdrawn

    def names(self) -> dict[str, AdapterInfo | None]:
        """All that a request may name, in order. None = it was not read yet."""
        unread = () if self._folders is None else set(self._folders.names()) - self._withdrawn
        names = dict.fromkeys(unread) | self._infos
        return dict(sorted(names.items(), key=lambda item: item[0]))

    def has(self, name: str) -> bool:
        """A request may name it."""
        if name in self._infos:
            return True
        return self._folders is not None and name not in self._withdrawn and self._folders.has(name)

    def check(self, name: str) -> None:
        """name: empty = no adapter. Raises AdapterNotFound."""
        if name and not self.has(name):
            raise AdapterNotFound(name)

    def guess(self, name: str) -> Adapter | None:
        """What a request of this name will probably be computed with; name: empty = no adapter."""
        if not name:
            return None
        info = self._infos.get(name)
        return Adapter(name, "") if info is None else info.adapter

    async def ask(self, message: Callable[[int], AdapterMessage], kind: type[T]) -> T:
        """Post the message that is made with a number of its own; returns the answer, which is of that kind.

        Raises the RequestError that is the answer.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._core.post(message(number))
        try:
            result = await answer
        finally:
            del self._answers[number]
        assert isinstance(result, kind)
        return result

    def hear(self, event: AdapterAnswer | AdaptersServed) -> None:
        """The step loop has something to say."""
        if isinstance(event, AdaptersServed):
            self._hear_of(event)
            return
        answer = self._answers.get(event.number)
        if answer is None or answer.done():
            return  # who asked may have gone
        if isinstance(event.result, RequestError):
            answer.set_exception(event.result)
        else:
            answer.set_result(event.result)

    def end(self) -> None:
        """Nobody will answer any more."""
        for number in list(self._answers):
            self.hear(AdapterAnswer(number, EngineFailure()))
