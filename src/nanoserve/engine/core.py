"""The step loop, on a thread of its own: schedule, execute, commit, deliver.

Two queues tie it to the event loop, and nothing else is shared: messages come in by `post`, events go out by the
`deliver` callback, once a step for all requests together.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from nanoserve.engine.scheduler import Scheduler, SchedulerStats
from nanoserve.request import (
    Abort,
    CacheWasReset,
    EngineEnded,
    Event,
    Executor,
    Message,
    Request,
    ResetCache,
    StepResult,
)

logger = logging.getLogger(__name__)


class EngineCore:
    """Runs steps as long as there is work, and sleeps on its queue when there is none.

    Any thread may call `post`, `start` and `stop` and read the properties; all the rest happens on the engine thread.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        # None = stop.
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._deliver: Callable[[list[Event]], None] = lambda _: None
        self._thread = threading.Thread(target=self._run, name="nanoserve-engine", daemon=True)
        self._has_ended = False
        self._num_failed_steps = 0
        self._is_busy = False
        self._last_progress_s = time.monotonic()
        self._stats = scheduler.stats()

    def start(self, deliver: Callable[[list[Event]], None]) -> None:
        """Begin to run; `deliver` is called on the engine thread and must not block."""
        self._deliver = deliver
        self._thread.start()

    def post(self, message: Message) -> None:
        """Hand over a message; it is read before the next step."""
        self._messages.put(message)
        if self._has_ended:
            self._deliver([EngineEnded()])

    def stop(self) -> None:
        """Let the current step end, then give up what is left; EngineEnded is delivered when that is done."""
        self._messages.put(None)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step ended while work is pending; 0 if there is none."""
        return time.monotonic() - self._last_progress_s if self._is_busy else 0.0

    @property
    def num_failed_steps(self) -> int:
        """How many of the last steps failed, one after the other."""
        return self._num_failed_steps

    @property
    def stats(self) -> SchedulerStats:
        """As of the end of the last step."""
        return self._stats

    def _run(self) -> None:
        try:
            while True:
                for message in self._take_messages():
                    if message is None:
                        return
                    self._obey(message)
                self._note_progress()
                if self._scheduler.has_work:
                    self._step()
        except Exception:
            logger.exception("the engine thread died")
        finally:
            # In this order: a message that is posted in between is answered twice rather than never.
            self._has_ended = True
            self._deliver([EngineEnded()])

    def _take_messages(self) -> Iterator[Message | None]:
        """All that was posted; waits for the first if there is no work."""
        if not self._scheduler.has_work:
            yield self._messages.get()
        while not self._messages.empty():
            yield self._messages.get()

    def _obey(self, message: Message) -> None:
        match message:
            case Request():
                self._scheduler.add(message)
            case Abort(request_id, index):
                self._scheduler.abort(request_id, index)
            case ResetCache():
                num_freed_blocks = self._scheduler.pool.reset_cache()
                self._note_progress()
                self._deliver([CacheWasReset(num_freed_blocks)])

    def _step(self) -> None:
        plan = self._scheduler.schedule(time.monotonic())
        try:
            result = self._executor.execute(plan) if plan.sequences else StepResult([])
        except Exception:
            logger.exception("a step failed; its %d sequences are given up", len(plan.sequences))
            self._num_failed_steps += 1
            events = self._scheduler.fail(plan)
        else:
            self._num_failed_steps = 0
            events = self._scheduler.commit(plan, result, time.monotonic())
        self._note_progress()
        self._deliver(events)

    def _note_progress(self) -> None:
        self._last_progress_s = time.monotonic()
        self._is_busy = self._scheduler.has_work
        self._stats = self._scheduler.stats()
