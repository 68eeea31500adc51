"""The weights of adapters in main memory, and the thread that reads and moves them.

    folder ── read ──▶ AdapterStore: within a limit, the least recently used make room ── write ──▶ a slot

What takes long happens on one thread of its own, so that no step waits for a file. Its jobs are done in the order in
which they were asked for, and what comes of each is told on the engine thread, by `settle`.
"""

import queue
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanoserve.adapter.vocabulary import Adapter, AdapterInfo

if TYPE_CHECKING:
    from nanoserve.adapter.weights import AdapterWeights

T = TypeVar("T")

# Reads the folder of an adapter of this name. Raises AdapterInvalid.
Reader = Callable[[str, Path], "tuple[AdapterInfo, AdapterWeights]"]


@dataclass(frozen=True, slots=True)
class Found:
    """What was read."""

    folder: Path
    info: AdapterInfo
    weights: "AdapterWeights"


class AdapterStore:
    """Weights by adapter, within max_bytes. Engine thread only, but for the jobs."""

    def __init__(
        self,
        read: Reader,
        write: "Callable[[int, AdapterWeights], None]",
        max_bytes: int,
        num_slots: int,
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """write: puts weights into a slot of the model side. prepare_thread: called on the thread of the jobs."""
        self.max_bytes = max_bytes
        self.num_slots = num_slots
        self.num_bytes = 0
        # Called, on the thread of the jobs, when there is something to settle.
        self.wake: Callable[[], None] = lambda: None
        self._read = read
        self._write = write
        # Least recently used first.
        self._weights: OrderedDict[Adapter, AdapterWeights] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "nanoserve-adapters", prepare_thread)
        # What is to be called on the engine thread.
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    # ------------------------------------------------------------------------------------------- the thread

    def submit(self, job: Callable[[], T], then: Callable[[T | Exception], None]) -> None:
        """Have the job done, behind all that were submitted before. `settle` calls `then` with what came of it."""
        self._thread.submit(job).add_done_callback(partial(self._tell, then))

    def _tell(self, then: Callable[[Any], None], future: "Future[Any]") -> None:
        if future.cancelled():
            return
        error = future.exception()
        self._done.put(partial(then, future.result() if error is None else error))
        self.wake()

    def read(self, name: str, find: Callable[[], Path], then: "Callable[[Found | Exception], None]") -> None:
        """Read the folder that `find` gives, which is called on the thread too."""
        self.submit(lambda: self.read_now(name, find()), then)

    def read_now(self, name: str, folder: Path) -> "Found":
        """Read a folder on this thread. Raises AdapterInvalid. Any thread."""
        return Found(folder, *self._read(name, folder))

    def write(self, slot: int, adapter: Adapter, then: Callable[[Exception | None], None]) -> None:
        """Put an adapter that is here into a slot. It may leave the store meanwhile."""
        self.submit(partial(self._write, slot, self._weights[adapter]), then)

    def settle(self) -> None:
        """Tell what came of the jobs that are done."""
        while not self._done.empty():
            self._done.get()()

    def close(self) -> None:
        """Do no job that has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------- the memory

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter in self._weights

    def touch(self, adapter: Adapter) -> None:
        """It was used."""
        if adapter in self._weights:
            self._weights.move_to_end(adapter)

    def add(self, adapter: Adapter, weights: "AdapterWeights", is_kept: Callable[[Adapter], bool]) -> bool:
        """Keep its weights, if those that may make room leave enough of it. Those that is_kept names may not."""
        self.drop(adapter)
        if not self.has_room(weights.num_bytes, is_kept):
            return False
        for other in [each for each in self._weights if not is_kept(each)]:
            if self.num_bytes + weights.num_bytes <= self.max_bytes:
                break
            self.drop(other)
        self._weights[adapter] = weights
        self.num_bytes += weights.num_bytes
        return True

    def has_room(self, num_bytes: int, is_kept: Callable[[Adapter], bool]) -> bool:
        """Whether `add` would take so many."""
        kept = sum(weights.num_bytes for adapter, weights in self._weights.items() if is_kept(adapter))
        return kept + num_bytes <= self.max_bytes

    def drop(self, adapter: Adapter) -> None:
        """Forget its weights, if they are here."""
        if (weights := self._weights.pop(adapter, None)) is not None:
            self.num_bytes -= weights.num_bytes
