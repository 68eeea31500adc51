"""Adapters in any order: requests, loads, replacements, unloads, changes on the disk; few slots, little memory."""

import hypothesis.strategies as st
import pytest
from adapter_bench import AdapterBench
from fake_executor import expected_completion, random_drafts
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanoserve.errors import AdapterInUse, AdapterMemoryFull, AdapterNotFound, InvalidRequest
from nanoserve.request import RequestFailed, RequestStarted

NAMES = "abcde"
names = st.sampled_from(NAMES)
is_begun = precondition(lambda self: self.bench is not None)


class AdapterLife(RuleBasedStateMachine):
    """The executor of the bench refuses a step whose rows do not find their adapters, or the keys of another; its slots
    refuse to be written while they are used."""

    def __init__(self):
        super().__init__()
        self.bench = None
        self.requests = {}
        self.messages = []
        self.num_revisions = 1

    @precondition(lambda self: self.bench is None)
    @rule(
        num_slots=st.integers(1, 3),
        memory=st.integers(2, 5),
        num_blocks=st.integers(4, 14),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(4, 12),
        draft=st.sampled_from([None, random_drafts]),
        depth=st.sampled_from([1, 1, 2, 3]),
        batching=st.sampled_from(["continuous", "continuous", "static"]),
    )
    def start(self, **options):
        self.bench = AdapterBench(names=NAMES, is_automatic=False, **options)

    @is_begun
    @rule(data=st.data(), adapter=st.sampled_from(["", "a", "a", *NAMES, "nobody"]))
    def add(self, data, adapter):
        limit = self.bench.scheduler._max_context_tokens
        prompt = [0] * data.draw(st.integers(1, min(12, limit - 1)))
        request_id = f"r{len(self.requests)}"
        self.requests[request_id] = self.bench.add(
            request_id,
            prompt,
            adapter,
            guess=data.draw(st.sampled_from(["", "a1", "b1"])),
            n=data.draw(st.integers(1, 3)),
            max_tokens=data.draw(st.integers(1, 12)),
            priority=data.draw(st.integers(-1, 1)),
            deadline_s=data.draw(st.none() | st.integers(0, 60)),
            time_limit_s=data.draw(st.none() | st.integers(0, 60)),
        )

    @is_begun
    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.bench.step()

    @precondition(lambda self: self.bench is not None and self.bench.store.jobs)
    @rule(count=st.integers(1, 3))
    def do_jobs(self, count):
        for _ in range(min(count, len(self.bench.store.jobs))):
            self.bench.store.do_one()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.none() | st.integers(0, 2))
    def abort(self, data, index):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if index is None or self.bench.completion(request_id, index):
            self.bench.scheduler.abort(request_id, index)

    @precondition(lambda self: self.bench is not None and any(self.bench.scheduler._running()))
    @precondition(lambda self: self.bench is not None and not self.bench.scheduler.num_in_flight)
    @rule(data=st.data())
    def preempt(self, data):
        running = list(self.bench.scheduler._running())
        sequence = running[data.draw(st.integers(0, len(running) - 1))]
        self.bench.scheduler._preempt(sequence, sequence, {})

    @is_begun
    @rule(name=names, is_gone=st.booleans(), size=st.integers(1, 2))
    def change_folder(self, name, is_gone, size):
        self.num_revisions += 1
        revision = f"{name}{self.num_revisions}"
        self.bench.disk.revisions[name] = None if is_gone else revision
        self.bench.disk.sizes[revision] = size

    @is_begun
    @rule(name=names, path=names, is_pinned=st.booleans(), may_replace=st.booleans())
    def load(self, name, path, **options):
        self.messages.append(self.bench.load(name, path, **options))

    @is_begun
    @rule(name=names, drain_timeout_s=st.integers(0, 20))
    def unload(self, name, drain_timeout_s):
        self.messages.append(self.bench.unload(name, drain_timeout_s))

    @is_begun
    @rule()
    def step_raises(self):
        self.bench.fail_step()

    @is_begun
    @rule()
    def reset_cache(self):
        self.bench.scheduler.reset_cache()

    @invariant()
    def accounts_balance(self):
        if self.bench is not None:
            self.bench.scheduler.check_invariants()
            self.bench.adapters.check_invariants()

    def teardown(self):
        if self.bench is None:
            return
        bench = self.bench
        bench.is_automatic = True
        bench.run()
        for _ in range(5):  # pinned adapters go to their slots
            bench.step()
        assert bench.pool.num_owned == 0
        assert not bench.adapters.counts().uses
        assert all(status.info.adapter.revision in bench.served() for status in bench.list().adapters)
        for number in self.messages:
            answer = bench.answer(number)
            expected = AdapterInUse | AdapterMemoryFull | AdapterNotFound | InvalidRequest
            assert not isinstance(answer, Exception) or isinstance(answer, expected)
        for request_id, request in self.requests.items():
            self.expect_whole(request_id, request)

    def expect_whole(self, request_id, request):
        """All that it was given came of one adapter, which is the one that it was told of."""
        starts = [e for e in self.bench.events if isinstance(e, RequestStarted) and e.request_id == request_id]
        failures = [e for e in self.bench.events if isinstance(e, RequestFailed) and e.request_id == request_id]
        assert len(starts) <= 1
        assert len(failures) <= 1
        if not starts:
            return
        adapter = starts[0].adapter
        assert (adapter is None) == (request.adapter is None)
        for index in range(request.params.n):
            completion = self.bench.completion(request_id, index)
            arguments = request.prompt_token_ids, 7 + index, len(completion), 1000
            assert completion == expected_completion(*arguments, adapter.revision if adapter else "")
            assert not adapter or not completion or adapter.revision


TestAdapterLife = AdapterLife.TestCase
TestAdapterLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.soak
def test_a_hundred_thousand_random_operations():
    AdapterLife.TestCase.settings = settings(max_examples=1000, stateful_step_count=120, deadline=None)
    AdapterLife.TestCase().runTest()
