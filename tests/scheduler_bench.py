"""A scheduler over simulated KV memory, and what came out of it."""

from fake_executor import FakeExecutor, expected_completion

from nanoserve.config import SchedulerConfig
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.request import Request, RequestStarted, SamplingParams, SequenceOutput, StepPlan
from nanoserve.step_record import StepRecord

BLOCK = 4


class Bench:
    """A scheduler, a fake executor, and what came out of them."""

    def __init__(
        self,
        *,
        num_blocks=64,
        max_num_seqs=8,
        budget=32,
        max_context=128,
        cache=True,
        batching="continuous",
        draft=None,
        depth=1,
        adapters=None,
        slots=None,
    ):
        """draft, depth, slots: as of FakeExecutor."""
        self.pool = BlockPool(num_blocks, keep_cached=cache)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, batching=batching),
            self.pool,
            block_size=BLOCK,
            max_context_tokens=min(max_context, num_blocks * BLOCK),
            cache_identity="model",
            adapters=adapters,
        )
        self.executor = FakeExecutor(BLOCK, max_num_batched_tokens=budget, draft=draft, depth=depth, slots=slots)
        self.now = 0.0
        self.events = []

    def add(self, request_id, prompt, *, eos=frozenset(), **options):
        names = {"priority", "deadline_s", "time_limit_s", "cache_salt", "skip_cache_read", "adapter"}
        request_options = {name: options.pop(name) for name in names & options.keys()}
        params = SamplingParams(**{"seed": 7, "max_tokens": 5, **options})
        request = Request(request_id, list(prompt), params, eos_token_ids=eos, **request_options)
        self.scheduler.add(request)
        return request

    def step(self):
        """Plan as many steps as the executor takes, and commit the oldest. Returns what was planned last."""
        plan = StepPlan([])
        while self.scheduler.num_in_flight < self.executor.depth:
            planned = self.scheduler.schedule(self.now)
            self.scheduler.check_invariants()
            if not planned.sequences:
                break
            plan = planned
            self.executor.submit(plan)
        if self.scheduler.num_in_flight:
            self.events += self.scheduler.commit(self.executor.collect(), self.now)
        else:
            self.events += self.scheduler.settle(self.now)
        self.scheduler.check_invariants()
        self.now += 1
        return plan

    def fail_step(self):
        """Plan a step if there is one to plan, and let the oldest fail."""
        plan = self.scheduler.schedule(self.now)
        if plan.sequences:
            self.executor.submit(plan)
        if not self.scheduler.num_in_flight:
            return []
        self.executor.collect()
        events = self.scheduler.fail(self.now)
        self.events += events
        return events

    def run(self, max_steps=1000):
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return self
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def outputs(self, request_id, index=0):
        return [
            e for e in self.events if isinstance(e, SequenceOutput) and (e.request_id, e.index) == (request_id, index)
        ]

    def completion(self, request_id, index=0):
        return [t for e in self.outputs(request_id, index) for t in e.token_ids]

    def finish_reason(self, request_id, index=0):
        [reason] = [e.finish_reason for e in self.outputs(request_id, index) if e.finish_reason]
        return reason

    def started(self, request_id):
        [event] = [e for e in self.events if isinstance(e, RequestStarted) and e.request_id == request_id]
        return event

    def expect(self, request_id, prompt, count, *, seed=7, index=0):
        assert self.completion(request_id, index) == expected_completion(prompt, seed + index, count, 1000)


class WatchedBench(Bench):
    """A bench whose scheduler is observed, and who keeps the KV map that an observer would."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scheduler.is_observed = True
        # (request, index) -> its blocks.
        self.tables = {}
        self.free = set(range(self.pool.num_blocks))

    def step(self):
        plan = super().step()
        self.take(self.records()[-1])
        return plan

    def fail_step(self):
        events = super().fail_step()
        for record in events:
            if isinstance(record, StepRecord):
                self.take(record)
        return events

    def take(self, record):
        for release in record.early_releases:
            self.give_back(release)
        for part in record.parts:
            table = self.tables.setdefault((part.request_id, part.sequence_index), [])
            assert part.start <= len(table + part.new_block_ids) * BLOCK
            table.extend(part.new_block_ids)
            self.free -= set(part.new_block_ids)
        for release in record.late_releases:
            self.give_back(release)
        if self.executor.depth > 1:
            return  # its counts are of the time when the step ended, and the next one had its blocks by then
        owned = {block for table in self.tables.values() for block in table}
        assert len(owned) == record.num_owned_blocks
        assert not owned & self.free
        # Evicted blocks are in somebody's table by now.
        assert len(self.free) == record.num_free_blocks

    def give_back(self, release):
        self.tables.pop((release.request_id, release.index), None)
        self.free |= set(release.freed_block_ids)

    def records(self):
        return [event for event in self.events if isinstance(event, StepRecord)]
