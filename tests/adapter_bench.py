"""A scheduler with adapters that are scripted: what their folders hold, and when they are read and written."""

from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fake_executor import FakeSlots, expected_completion
from scheduler_bench import WatchedBench

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import (
    Adapter,
    AdapterAnswer,
    AdapterInfo,
    AdaptersServed,
    ListAdapters,
    LoadAdapter,
    UnloadAdapter,
)
from nanoserve.engine.adapters import ServedAdapters
from nanoserve.errors import AdapterInvalid, AdapterNotFound

ROOT = Path("/adapters")


@dataclass(frozen=True)
class FakeWeights:
    revision: str
    num_bytes: int = 1


class ScriptedFolders(AdapterFolders):
    """Every name has a folder."""

    def find(self, name):
        return self.root / name

    def resolve(self, name, path):
        return self.root / (path or name)


class Disk:
    """What each folder holds: a revision and its size. `read` is a Reader."""

    def __init__(self, **revisions):
        self.revisions = dict(revisions)
        self.sizes = {}
        # Names in the order in which they were read.
        self.reads = []

    def read(self, name, folder):
        self.reads.append(name)
        revision = self.revisions.get(folder.name)
        if revision is None:
            raise AdapterNotFound(name)
        if isinstance(revision, Exception):
            raise revision
        weights = FakeWeights(revision, self.sizes.get(revision, 1))
        return AdapterInfo(Adapter(name, revision), str(folder), rank=8, num_bytes=weights.num_bytes), weights


class SteppedStore(AdapterStore):
    """Does a job when it is told to."""

    def __init__(self, *args):
        super().__init__(*args)
        self.jobs = deque()

    def submit(self, job, then):
        self.jobs.append((job, then))

    def do_one(self):
        job, then = self.jobs.popleft()
        try:
            result = job()
        except AssertionError:
            raise
        except Exception as error:
            result = error
        self._done.put(partial(then, result))

    def do_all(self):
        while self.jobs:
            self.do_one()


class AdapterBench(WatchedBench):
    """A scheduler over scripted adapters a, b, c, ... of revisions a1, b1, c1, ..."""

    def __init__(self, *, num_slots=2, memory=100, names="abcdefgh", is_automatic=True, **options):
        """memory: in adapters. is_automatic: jobs are done before each step."""
        self.disk = Disk(**{name: f"{name}1" for name in names})
        self.slots = FakeSlots(num_slots)
        self.slots.check = self.check_write
        self.store = SteppedStore(self.disk.read, self.slots.write, memory, num_slots)
        self.adapters = ServedAdapters(self.store, ScriptedFolders(ROOT, "model"))
        self.is_automatic = is_automatic
        self.num_messages = 0
        super().__init__(adapters=self.adapters, slots=self.slots, **options)

    def check_write(self, slot):
        self.executor.check_slot_is_unused(slot)
        for sequence in self.scheduler._running():
            assert sequence.adapter is None or sequence.adapter.slot != slot, "a slot is written while it is used"

    def add(self, request_id, prompt, adapter="", *, guess="", **options):
        named = Adapter(adapter, guess) if adapter else None
        return super().add(request_id, prompt, adapter=named, **options)

    def step(self):
        if self.is_automatic:
            self.scheduler.keep_time(self.now)
            self.store.do_all()
        plan = super().step()
        self.adapters.residency.check_invariants()
        return plan

    def run(self, max_steps=2000):
        for _ in range(max_steps):
            is_over = not (self.scheduler.has_work or self.scheduler.is_awaiting or self.store.jobs)
            self.step()
            if is_over:
                return self
        raise AssertionError("the scheduler does not come to an end")

    # ------------------------------------------------------------------------------------------ messages

    def post(self, kind, *args, **options):
        self.num_messages += 1
        self.adapters.obey(kind(self.num_messages, *args, **options), self.now)
        return self.num_messages

    def load(self, name, path="", **options):
        return self.post(LoadAdapter, name, path, **options)

    def unload(self, name, drain_timeout_s=1000):
        return self.post(UnloadAdapter, name, drain_timeout_s)

    def answers(self, number):
        return [e.result for e in self.events if isinstance(e, AdapterAnswer) and e.number == number]

    def answer(self, number):
        [answer] = self.answers(number)
        return answer

    def settled(self, number):
        """The answer, once what it takes is done."""
        self.store.do_all()
        self.step()
        return self.answer(number)

    def list(self):
        return self.settled(self.post(ListAdapters))

    def residency(self):
        return {status.info.adapter.revision: status.residency.value for status in self.list().adapters}

    def served(self):
        """As last told."""
        told = [event for event in self.events if isinstance(event, AdaptersServed)]
        return [info.adapter.revision for info in told[-1].adapters]

    def revision(self, request_id):
        return self.started(request_id).adapter.revision

    def expect(self, request_id, prompt, count, *, seed=7, index=0):
        adapter = self.started(request_id).adapter
        revision = adapter.revision if adapter else ""
        assert self.completion(request_id, index) == expected_completion(prompt, seed + index, count, 1000, revision)


__all__ = ["AdapterBench", "AdapterInvalid", "Disk", "FakeWeights"]
