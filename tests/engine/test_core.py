"""The step loop on its thread: messages in, events out, and what happens when a step fails."""

import queue
import threading

import pytest
from fake_executor import FakeExecutor, expected_completion, num_tokens

from nanoserve.config import SchedulerConfig
from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.engine.core import EngineCore
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.request import (
    Abort,
    CacheReset,
    EngineEnded,
    Failure,
    FinishReason,
    Request,
    RequestFailed,
    RequestStarted,
    ResetCache,
    SamplingParams,
    SequenceOutput,
    SequenceResult,
    StepResult,
)

BLOCK = 4
SECONDS = 20


class FaultyExecutor(FakeExecutor):
    """Raises, or waits for the test, before a step that computes a chosen token."""

    def __init__(self):
        super().__init__(BLOCK)
        self.poison = None
        self.gate = threading.Event()
        self.gate.set()
        self.is_in_step = threading.Event()

    def execute(self, plan):
        self.is_in_step.set()
        assert self.gate.wait(SECONDS)
        if begins_with(plan, self.poison):
            raise RuntimeError("poison")
        return super().execute(plan)


def begins_with(plan, token_id):
    """Whether the plan admits a sequence that has the token."""
    return any(s.admission is not None and token_id in s.admission.token_ids for s in plan.sequences)


class Bench:
    def __init__(self):
        self.executor = FaultyExecutor()
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
            BlockPool(64),
            block_size=BLOCK,
            max_context_tokens=128,
            cache_identity="model",
        )
        self.core = EngineCore(scheduler, self.executor, ConstraintCompiler(lambda: None))
        self.events = queue.Queue()

    def deliver(self, events):
        for event in events:
            self.events.put(event)

    def next_event(self, kind):
        while not isinstance(event := self.events.get(timeout=SECONDS), kind):
            pass
        return event

    def completion(self, request_id):
        token_ids = []
        while True:
            event = self.events.get(timeout=SECONDS)
            if isinstance(event, SequenceOutput) and event.request_id == request_id:
                token_ids += event.token_ids
                if event.finish_reason:
                    return token_ids


@pytest.fixture
def bench():
    bench = Bench()
    bench.core.start(bench.deliver)
    yield bench
    bench.executor.gate.set()
    bench.core.stop()
    bench.core.wait_until_ended()
    assert not bench.core.is_alive
    assert bench.executor.is_closed


def request(request_id, prompt, max_tokens=5):
    return Request(request_id, prompt, SamplingParams(seed=7, max_tokens=max_tokens))


def test_a_request_runs_to_its_end(bench):
    bench.core.post(request("a", [1, 2, 3]))
    assert bench.next_event(RequestStarted).request_id == "a"
    assert bench.completion("a") == expected_completion([1, 2, 3], 7, 5, 1000)
    assert bench.core.state.scheduler.num_owned_blocks == 0


def test_a_failed_step_fails_its_requests_and_the_loop_goes_on(bench, caplog):
    bench.executor.poison = 666
    bench.core.post(request("bad", [1, 666]))
    assert bench.next_event(RequestFailed) == RequestFailed("bad", Failure.STEP)
    assert "poison" in caplog.text
    bench.core.post(request("good", [1, 2]))
    assert bench.completion("good") == expected_completion([1, 2], 7, 5, 1000)


def test_steps_that_give_nothing_but_nan_count_as_failed(bench, monkeypatch):
    real = bench.executor.execute

    def execute(plan):
        result = real(plan)
        bad = SequenceResult(failure=Failure.CORRUPT)
        return StepResult([bad for _ in plan.sequences]) if begins_with(plan, 666) else result

    monkeypatch.setattr(bench.executor, "execute", execute)
    for count in (1, 2, 3):
        bench.core.post(request(f"bad {count}", [1, 666]))
        assert bench.next_event(RequestFailed) == RequestFailed(f"bad {count}", Failure.CORRUPT)
        assert bench.core.state.num_failed_steps == count
    bench.core.post(request("good", [1, 2]))
    assert bench.completion("good") == expected_completion([1, 2], 7, 5, 1000)
    assert bench.core.state.num_failed_steps == 0


def test_abort_during_a_step_ends_the_request_after_it(bench):
    bench.executor.gate.clear()
    bench.core.post(request("a", [1, 2, 3], max_tokens=100))
    assert bench.executor.is_in_step.wait(SECONDS)
    bench.core.post(Abort("a"))
    bench.core.post(request("b", [4]))
    bench.executor.gate.set()
    bench.completion("b")
    assert bench.core.state.scheduler.num_running == 0
    assert not [p for p in bench.executor.plans if num_tokens(p) > 3], "a did not run on beside b"


def test_reset_cache_is_answered_when_idle_and_between_steps(bench):
    bench.core.post(request("a", list(range(9))))
    bench.completion("a")
    bench.core.post(ResetCache())
    assert bench.next_event(CacheReset) == CacheReset(3)
    assert bench.core.state.scheduler.num_cached_blocks == 0


def test_a_step_that_hangs_shows_as_a_stall_and_recovers(bench):
    assert bench.core.state.stalled_s == 0
    bench.executor.gate.clear()
    bench.core.post(request("a", [1]))
    assert bench.executor.is_in_step.wait(SECONDS)
    assert bench.core.state.stalled_s > 0
    bench.executor.gate.set()
    bench.completion("a")
    bench.core.post(ResetCache())
    bench.next_event(CacheReset)
    assert bench.core.state.stalled_s == 0


def test_who_watches_from_elsewhere_hears_of_work_before_its_first_step_ends_and_of_its_abort(bench):
    states = queue.SimpleQueue()
    deliver, bench.core._deliver = bench.core._deliver, lambda _: states.put(bench.core.state)
    bench.executor.gate.clear()
    bench.core.post(request("a", [1]))
    assert states.get(timeout=SECONDS).is_busy
    assert bench.executor.is_in_step.wait(SECONDS)
    bench.core.post(Abort("a"))
    bench.executor.gate.set()
    while states.get(timeout=SECONDS).is_busy:
        pass
    bench.core._deliver = deliver


def test_stop_ends_the_thread_and_what_comes_later_is_answered(bench):
    bench.executor.gate.clear()
    bench.core.post(request("a", [1, 2, 3], max_tokens=100))
    assert bench.executor.is_in_step.wait(SECONDS)
    threading.Timer(0.05, bench.executor.gate.set).start()
    bench.core.stop()
    bench.next_event(EngineEnded)
    bench.core.post(request("late", [1]))
    bench.next_event(EngineEnded)


def test_stop_does_not_wait_for_a_step_that_hangs(bench):
    bench.executor.gate.clear()
    bench.core.post(request("a", [1]))
    assert bench.executor.is_in_step.wait(SECONDS)
    bench.core.stop()
    assert bench.core.is_alive


@pytest.mark.parametrize("method", ["add", "schedule", "commit"])
def test_a_bug_in_the_scheduler_ends_the_engine_with_an_event(bench, monkeypatch, caplog, method):
    monkeypatch.setattr(bench.core._scheduler, method, lambda *_: 1 / 0)
    bench.core.post(request("a", [1, 2, 3]))
    bench.next_event(EngineEnded)
    bench.core.wait_until_ended()
    assert not bench.core.is_alive
    assert bench.executor.is_closed
    assert "engine thread died" in caplog.text


def test_failed_steps_are_counted_until_one_succeeds(bench):
    bench.executor.poison = 666
    for count in (1, 2):
        bench.core.post(request("bad", [666]))
        bench.next_event(RequestFailed)
        assert bench.core.state.num_failed_steps == count
    bench.core.post(request("good", [1]))
    bench.completion("good")
    assert bench.core.state.num_failed_steps == 0


def test_time_limit_ends_a_request_that_runs(bench):
    params = SamplingParams(seed=7, max_tokens=100)
    bench.core.post(Request("a", [1, 2], params, time_limit_s=0.0))
    event = bench.next_event(SequenceOutput)
    assert (event.finish_reason, event.token_ids) == (FinishReason.TIME_LIMIT, [])
