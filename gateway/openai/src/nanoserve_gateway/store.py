"""Responses that can be retrieved and continued: in memory, bounded, each for its own key alone."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoserve_gateway.answer import to_json
from nanoserve_gateway.responses import Remembered


@dataclass(slots=True)
class _Entry:
    remembered: Remembered
    num_bytes: int
    # Computes it, if it runs in the background and has not ended.
    task: "asyncio.Task[Any] | None"


class ResponseStore:
    """The most recently used responses. Event loop thread.

    A response belongs to the key that it was made with: others do not find it. When there is no more room, what
    was not used for longest goes, but nothing that still runs.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        # (owner, id of an item) -> id of the response -> the item. Callers may give the items of several one id.
        self._items: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}

    def put(self, owner: str, remembered: Remembered, task: "asyncio.Task[Any] | None" = None) -> None:
        """Keep it, in place of what has its id."""
        self.remove(owner, remembered.response.id)
        # What is kept is about as large as its text twice: a conversation is in each of its responses.
        num_bytes = len(to_json(remembered.response)) + sum(len(str(message)) for message in remembered.messages)
        if remembered.recording is not None:
            num_bytes += remembered.recording.num_bytes
        for id, item in remembered.all_items().items():
            self._items.setdefault((owner, id), {})[remembered.response.id] = item
        self._entries[owner, remembered.response.id] = _Entry(remembered, num_bytes, task)
        self._num_bytes += num_bytes
        for key in [key for key, entry in self._entries.items() if entry.task is None]:
            if len(self._entries) <= self._max_count and self._num_bytes <= self._max_bytes:
                break
            self.remove(*key)

    def get(self, owner: str, id: str) -> Remembered | None:
        entry = self._entries.get((owner, id))
        if entry is None:
            return None
        self._entries.move_to_end((owner, id))
        return entry.remembered

    def item(self, owner: str, id: str) -> Mapping[str, Any] | None:
        """Of the input or the output of a response that is kept; of several with this id the newest."""
        if (found := self._items.get((owner, id))) is None:
            return None
        response_id, item = next(reversed(found.items()))
        self._entries.move_to_end((owner, response_id))
        return item

    def task(self, owner: str, id: str) -> "asyncio.Task[Any] | None":
        entry = self._entries.get((owner, id))
        return entry.task if entry else None

    def remove(self, owner: str, id: str) -> bool:
        """Whether there was one."""
        entry = self._entries.pop((owner, id), None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes
            for item_id in entry.remembered.all_items():
                del self._items[owner, item_id][id]
                if not self._items[owner, item_id]:
                    del self._items[owner, item_id]
        return entry is not None
