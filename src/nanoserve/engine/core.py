"""The step loop, on a thread of its own: schedule and submit, collect and commit, deliver.

Two queues tie it to the event loop, and nothing else is shared: messages come in by `post`, events go out by the
`deliver` callback, once a step for all requests together.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from nanoserve.adapter.vocabulary import ListAdapters, LoadAdapter, UnloadAdapter
from nanoserve.constraint.compiler import MAX_WAIT_S, CompiledConstraint, ConstraintCompiler
from nanoserve.engine.adapters import answer_without_adapters
from nanoserve.engine.scheduler import Scheduler
from nanoserve.engine.sequence import Sequence
from nanoserve.errors import EngineFailure, Rejection, RequestError
from nanoserve.request import (
    Abort,
    CacheReset,
    CompileConstraint,
    Constraint,
    ConstraintCompiled,
    EngineEnded,
    Event,
    Executor,
    Failure,
    Message,
    ObserveSteps,
    Request,
    ResetCache,
)
from nanoserve.step_record import SchedulerStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoreState:
    """How the step loop fares, as of its last sign of life."""

    # When that was: time.monotonic(), the same clock for all processes of a machine.
    last_progress_s: float
    # Work is pending.
    is_busy: bool
    # How many of the last steps failed, or gave nothing but NaN, one after the other.
    num_failed_steps: int
    scheduler: SchedulerStats

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step ended while work is pending; 0 if there is none."""
        return time.monotonic() - self.last_progress_s if self.is_busy else 0.0


class _Wake:
    """A constraint is compiled, or will not be; an adapter was read or moved; or it is time to look at the clock."""


# While requests wait for nothing but constraints and adapters, their deadlines are looked at so often.
CHECK_S = 0.5

# Takes a step's events, of which there may be none; must not block. Any thread.
Deliver = Callable[[list[Event]], None]


class Core(Protocol):
    """A step loop as the Engine sees it: on a thread here, or in a process of its own (engine_process.py)."""

    def start(self, deliver: Deliver) -> None:
        """Begin to run; `deliver` may be called on any thread."""

    def post(self, message: Message) -> None:
        """Hand over a message; it is read before the next step."""

    def stop(self) -> None:
        """Let the current step end, then give up what is left; EngineEnded is delivered when that is done."""

    @property
    def is_alive(self) -> bool:
        """What is posted now may be answered."""

    @property
    def state(self) -> CoreState: ...


class EngineCore:
    """A Core: runs steps as long as there is work, and sleeps on its queue when there is none.

    Any thread may call `post`, `start` and `stop` and read the properties; all the rest happens on the engine thread.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, compiler: ConstraintCompiler) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._compiler = compiler
        # None = stop.
        self._messages: queue.SimpleQueue[Message | _Wake | None] = queue.SimpleQueue()
        self._deliver: Deliver = lambda _: None
        self._thread = threading.Thread(target=self._run, name="nanoserve-engine", daemon=True)
        if scheduler.adapters is not None:
            scheduler.adapters.store.wake = lambda: self._messages.put(_Wake())
        self._has_ended = False
        self._num_failed_steps = 0
        self._note_progress()

    def start(self, deliver: Deliver) -> None:
        """Begin to run; `deliver` is called on the engine thread."""
        self._deliver = deliver
        self._thread.start()

    def post(self, message: Message) -> None:
        self._messages.put(message)
        if self._has_ended:
            self._deliver([EngineEnded()])

    def stop(self) -> None:
        self._messages.put(None)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait_until_ended(self) -> None:
        """Return when the engine thread is gone."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                messages = list(self._take_messages())
                for message in messages:
                    if message is None:
                        return
                    self._obey(message)
                if steps := self._scheduler.has_work:
                    self._note_progress()
                    if messages:
                        # Whoever watches from elsewhere must know of it, should the step not end.
                        self._deliver([])
                    self._step()
                if not self._scheduler.has_work:
                    self._rest(must_tell=not steps)
        except Exception:
            logger.exception("the engine thread died")
        finally:
            # In this order: a message that is posted in between is answered twice rather than never.
            self._has_ended = True
            self._deliver([EngineEnded()])
            self._executor.close()
            if self._scheduler.adapters is not None:
                self._scheduler.adapters.store.close()

    def _rest(self, *, must_tell: bool) -> None:
        """Nothing can be computed: do what no step is needed for, which may give work again."""
        now = time.monotonic()
        self._scheduler.keep_time(now)
        self._note_progress()
        if must_tell or self._scheduler.has_news:
            self._deliver([] if self.state.is_busy else self._scheduler.settle(now))

    def _take_messages(self) -> Iterator["Message | _Wake | None"]:
        """All that was posted; waits for the first if there is no work."""
        if not self._scheduler.has_work:
            try:
                yield self._messages.get(timeout=CHECK_S if self._scheduler.is_awaiting else None)
            except queue.Empty:
                yield _Wake()
        while not self._messages.empty():
            yield self._messages.get()

    def _obey(self, message: "Message | _Wake") -> None:
        match message:
            case Request(constraint=None):
                self._scheduler.add(message)
            case Request(constraint=Constraint() as constraint):
                self._scheduler.add(message, self._grammar(constraint), time.monotonic() + MAX_WAIT_S)
            case CompileConstraint(number, constraint):
                self._compile(number, constraint)
            case LoadAdapter() | UnloadAdapter() | ListAdapters():
                if self._scheduler.adapters is None:
                    self._deliver([answer_without_adapters(message)])
                else:
                    self._scheduler.adapters.obey(message, time.monotonic())
            case _Wake():
                pass  # `schedule` and `_rest` look
            case Abort(request_id, index):
                self._scheduler.abort(request_id, index)
            case ResetCache():
                num_freed_blocks = self._scheduler.reset_cache()
                self._note_progress()
                self._deliver([CacheReset(num_freed_blocks)])
            case ObserveSteps():
                self._scheduler.is_observed = True

    def _compile_anew(self, sequence: Sequence) -> None:
        """Its grammar is worn."""
        assert sequence.request.constraint is not None
        grammar = self._grammar(sequence.request.constraint)
        self._scheduler.await_grammar(sequence, grammar, time.monotonic() + MAX_WAIT_S)

    def _grammar(self, constraint: Constraint) -> "Future[CompiledConstraint]":
        """When it is done, the loop wakes up for it."""
        try:
            grammar = self._compiler.submit(constraint)
        except Rejection as error:
            grammar = Future()
            grammar.set_exception(error)
        grammar.add_done_callback(lambda _: self._messages.put(_Wake()))
        return grammar

    def _compile(self, number: int, constraint: Constraint) -> None:
        """Answered as soon as it is compiled, or not; whoever asked gives up when that takes too long."""

        def answer(grammar: "Future[CompiledConstraint]") -> None:
            error = grammar.exception()
            if error is not None and not isinstance(error, RequestError):
                error = EngineFailure()
            self._deliver([ConstraintCompiled(number, error or grammar.result().report)])

        self._grammar(constraint).add_done_callback(answer)

    def _step(self) -> None:
        """Give the model side as many plans as it takes, wait for the oldest, and tell what came of it."""
        while self._scheduler.num_in_flight < self._executor.depth:
            plan = self._scheduler.schedule(time.monotonic())
            if not plan.sequences:
                break
            self._executor.submit(plan)
        events = self._collect() if self._scheduler.num_in_flight else self._scheduler.settle(time.monotonic())
        for sequence in self._scheduler.take_worn():
            self._compile_anew(sequence)
        self._note_progress()
        self._deliver(events)

    def _collect(self) -> list[Event]:
        try:
            result = self._executor.collect()
        except Exception:
            logger.exception("a step failed; its sequences are given up")
            self._num_failed_steps += 1
            return self._scheduler.fail(time.monotonic())
        # If nothing in it can be used, the next one will hardly be better.
        is_useless = all(outcome.failure is Failure.CORRUPT for outcome in result.sequences)
        self._num_failed_steps = self._num_failed_steps + 1 if is_useless else 0
        return self._scheduler.commit(result, time.monotonic())

    def _note_progress(self) -> None:
        self.state = CoreState(
            last_progress_s=time.monotonic(),
            is_busy=self._scheduler.has_work,
            num_failed_steps=self._num_failed_steps,
            scheduler=self._scheduler.stats(),
        )
