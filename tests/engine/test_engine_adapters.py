"""Adapters through the engine's asyncio face, read by a thread of their own."""

import asyncio
import contextlib
import threading

import pytest
from adapter_bench import Disk
from engine_bench import PROMPT, SECONDS, VOCAB, running
from fake_executor import FakeSlots, expected_completion

from nanoserve.adapter.folders import CONFIG, AdapterFolders
from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import Adapter, Residency
from nanoserve.engine.adapters import ServedAdapters
from nanoserve.engine.stream import Delta, Started
from nanoserve.errors import AdapterInUse, AdapterNotFound, DeadlineExceeded, EngineFailure, InvalidRequest
from nanoserve.observer import Observer, Observers


class GatedDisk(Disk):
    """Reads when the gate is open."""

    def __init__(self, **revisions):
        super().__init__(**revisions)
        self.gate = threading.Event()
        self.gate.set()

    def read(self, name, folder):
        assert self.gate.wait(SECONDS)
        return super().read(name, folder)


@contextlib.asynccontextmanager
async def serving(tmp_path, names="abc", **options):
    """An engine with these folders. The bench has the disk."""
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).touch()
    disk, slots = GatedDisk(**{name: f"{name}1" for name in names}), FakeSlots(2)
    folders = AdapterFolders(tmp_path, "fake")
    adapters = ServedAdapters(AdapterStore(disk.read, slots.write, 100, slots.num_slots), folders)
    async with running(adapters=adapters, slots=slots, adapter_folders=folders, **options) as bench:
        bench.disk = disk
        try:
            yield bench
        finally:
            disk.gate.set()


def token_ids(events):
    return [t for e in events if isinstance(e, Delta) for t in e.token_ids]


def expected(revision=""):
    return expected_completion(PROMPT, 7, 6, VOCAB, revision)


def of(adapter):
    return {"adapter": adapter}


async def test_each_request_is_told_which_weights_it_is_computed_with(tmp_path):
    async with serving(tmp_path) as bench:
        names = ["a", "", "b", "c", "a"]
        for name, events in zip(
            names, await asyncio.gather(*(bench.collect(request=of(name)) for name in names)), strict=True
        ):
            adapter = Adapter(name, f"{name}1") if name else None
            assert next(e for e in events if isinstance(e, Started)).adapter == adapter
            assert token_ids(events) == expected(adapter.revision if adapter else "")
        assert bench.disk.reads == ["a", "b", "c"]
        await bench.until_free()


async def test_who_waits_for_its_adapter_alone_is_served_when_it_is_read(tmp_path):
    async with serving(tmp_path) as bench:
        bench.disk.gate.clear()
        waits = asyncio.create_task(bench.collect(request=of("a")))
        assert token_ids(await bench.collect()) == expected()
        assert not waits.done()
        bench.disk.gate.set()
        assert token_ids(await waits) == expected("a1")


async def test_a_deadline_counts_while_an_adapter_is_read_and_nothing_runs(tmp_path):
    async with serving(tmp_path) as bench:
        bench.disk.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(bench.collect(request={"adapter": "a", "timeout_s": 1.0}), SECONDS / 2)


async def test_what_is_no_adapter_is_refused_at_once(tmp_path):
    async with serving(tmp_path) as bench:
        # The thread that reads is busy; nobody waits for it to hear this.
        bench.disk.gate.clear()
        waits = asyncio.create_task(bench.collect(request=of("a")))
        await asyncio.sleep(0.05)
        for name in ("nobody", "../a", "a/../a", "fake", "\n", "/", "x" * 10_000):
            with pytest.raises(AdapterNotFound):
                await asyncio.wait_for(bench.collect(request=of(name)), SECONDS)
        bench.disk.gate.set()
        await waits
        assert bench.disk.reads == ["a"]


async def test_load_replace_unload_and_list(tmp_path):
    async with serving(tmp_path) as bench:
        engine = bench.engine
        assert engine.adapter_names == {"a": None, "b": None, "c": None}
        info = await engine.load_adapter("other", "a", is_pinned=True)
        assert (info.adapter.revision, info.path, info.is_pinned) == ("a1", str(tmp_path / "a"), True)
        assert list(engine.adapter_names) == ["a", "b", "c", "other"]
        assert engine.adapter_names["other"] == info
        with pytest.raises(AdapterInUse):
            await engine.load_adapter("other", "b")
        assert (await engine.load_adapter("other", "b", may_replace=True)).adapter.revision == "b1"
        assert token_ids(await bench.collect(request=of("other"))) == expected("b1")
        [status] = (await engine.list_adapters()).adapters
        assert (status.info.adapter.name, status.residency) == ("other", Residency.ACTIVE)
        await engine.unload_adapter("other", 1)
        assert not engine.has_adapter("other")
        with pytest.raises(AdapterNotFound):
            await engine.unload_adapter("other", 1)
        await engine.load_adapter("a")
        await engine.unload_adapter("a", 1)
        assert list(engine.adapter_names) == ["b", "c"]
        with pytest.raises(AdapterNotFound):
            await bench.collect(request=of("a"))


async def test_unload_waits_for_the_last_stream(tmp_path):
    async with serving(tmp_path) as bench:
        await bench.collect(request=of("a"))
        permits = bench.executor.count_steps()
        permits.release(1)
        stream = asyncio.create_task(bench.collect(request=of("a")))
        async with asyncio.timeout(SECONDS):
            while not bench.engine.stats().scheduler.num_running:
                await asyncio.sleep(0.005)
        unload = asyncio.create_task(bench.engine.unload_adapter("a", SECONDS))
        await asyncio.sleep(0.02)
        assert not unload.done()
        permits.release(100)
        assert token_ids(await stream) == expected("a1")
        await unload
        assert (await bench.engine.list_adapters()).num_bytes == 0


async def test_an_unload_that_takes_too_long_is_answered_although_nothing_runs(tmp_path):
    async with serving(tmp_path) as bench:
        await bench.collect(request=of("a"))
        permits = bench.executor.count_steps()
        permits.release(1)
        stream = asyncio.create_task(bench.collect(request=of("a")))
        async with asyncio.timeout(SECONDS):
            while not bench.engine.stats().scheduler.num_running:
                await asyncio.sleep(0.005)
        unload = asyncio.create_task(bench.engine.unload_adapter("a", 0))
        permits.release(100)
        with pytest.raises(AdapterInUse):
            await unload
        assert token_ids(await stream) == expected("a1")
        assert bench.engine.has_adapter("a")


async def test_without_adapters_everything_about_them_is_refused():
    async with running() as bench:
        assert bench.engine.adapter_names == {}
        with pytest.raises(InvalidRequest, match="--adapters"):
            await bench.engine.load_adapter("a")
        with pytest.raises(AdapterNotFound):
            await bench.engine.unload_adapter("a", 1)
        with pytest.raises(AdapterNotFound):
            await bench.collect(request=of("a"))
        assert (await bench.engine.list_adapters()).num_slots == 0
        assert bench.engine.stats().scheduler.adapters is None


async def test_nobody_waits_for_an_engine_that_ended(tmp_path):
    async with serving(tmp_path) as bench:
        bench.disk.gate.clear()
        load = asyncio.create_task(bench.engine.load_adapter("a"))
        await asyncio.sleep(0.01)
        await bench.engine.close()
        with pytest.raises(EngineFailure):
            await load


async def test_a_record_says_the_adapter_and_its_revision(tmp_path):
    records = []

    class Diary(Observer):
        def request_ended(self, request):
            records.append((request.adapter, request.adapter_revision))

    async with serving(tmp_path, observers=Observers(Diary())) as bench:
        await bench.collect(request=of("a"))
        await bench.collect()
        with pytest.raises(AdapterNotFound):
            await bench.collect(request=of("nobody"))
    assert records == [("a", "a1"), ("", ""), ("nobody", "")]
