"""Long runs of adapters against a real server: many over few slots, and loads beside streams. `make soak`."""

import asyncio
import random
import time
from pathlib import Path

import pytest
from adapters import make_adapter
from nanoserve_client import AsyncClient, Client, NotFound
from serve_process import serving

from nanoserve.config import BUILTIN_MODEL

pytestmark = pytest.mark.soak

NUM_ADAPTERS = 64
NUM_SLOTS = 8
NUM_CALLERS = 16
ZIPF_S = 180
# Until the first token, of the slowest in a hundred. To read and to write such an adapter takes hundredths of a second.
MAX_WAIT_S = 2.0
NUM_LOADS = 1000
# In the second half of the loads.
MAX_GROWTH_BYTES = 20 << 20
QUESTIONS = ("What is a KV cache?", "What is streaming?", "What is prefix caching?")
# Texts of a row must not depend on its neighbours.
OPTIONS = ("--dtype", "float32", "--speculate", "off", "--kv-memory", "64MiB")
LENGTH = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 64 adapters of the built-in model, of several ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(NUM_ADAPTERS):
        make_adapter(folder / f"a{i}", BUILTIN_MODEL, rank=(2, 4, 8, 16)[i % 4], seed=i)
    return folder


async def ask(client: AsyncClient, question: str, adapter: str) -> tuple[str, str, float]:
    """The text, the adapter's revision, and seconds to the first token."""
    start_s, first_s = time.perf_counter(), 0.0
    stream = client.chat(question, adapter=adapter, max_tokens=LENGTH, temperature=0, ignore_eos=True)
    async for delta in stream:
        if delta.token_ids and not first_s:
            first_s = time.perf_counter() - start_s
    result = await stream.result()
    return result.text, result.started.adapter_revision, first_s


def assert_idle(address: str) -> None:
    with Client(address) as client:
        stats = client.get_stats()
        assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert all(a.running == a.waiting == 0 for a in client.list_adapters().adapters)


def test_each_of_64_adapters_over_8_slots_says_its_own_and_nobody_waits_long(root: Path) -> None:
    chance = random.Random(0)
    shares = [1 / (i + 1) for i in range(NUM_ADAPTERS)]

    async def run(address: str) -> list[float]:
        async with AsyncClient(address) as client:
            alone = {(i, q): await ask(client, q, f"a{i}") for i in range(NUM_ADAPTERS) for q in QUESTIONS}
            assert len({text for text, _, _ in alone.values()}) > NUM_ADAPTERS
            waits, end_s = [], time.monotonic() + ZIPF_S

            async def caller() -> None:
                while time.monotonic() < end_s:
                    (number,) = chance.choices(range(NUM_ADAPTERS), shares)
                    question = chance.choice(QUESTIONS)
                    text, revision, wait_s = await ask(client, question, f"a{number}")
                    assert (text, revision) == alone[number, question][:2]
                    waits.append(wait_s)

            await asyncio.gather(*(caller() for _ in range(NUM_CALLERS)))
            return sorted(waits)

    with serving(*OPTIONS, "--adapters", str(root), "--adapter-slots", str(NUM_SLOTS)) as server:
        waits = asyncio.run(run(server.address))
        assert_idle(server.address)
    assert len(waits) > 500
    assert waits[int(0.99 * len(waits))] < MAX_WAIT_S


def test_memory_is_flat_over_a_thousand_loads_and_streams_are_wholly_old_or_new(root: Path) -> None:
    chance = random.Random(0)

    async def run(address: str, peak_bytes) -> list[int]:
        async with AsyncClient(address) as client:
            # Of each revision, what it says.
            said = {}
            for i in range(NUM_ADAPTERS):
                revision = (await client.load_adapter("tenant", f"a{i}", replace=True)).revision
                for question in QUESTIONS:
                    said[revision, question] = (await ask(client, question, "tenant"))[0]
            is_over = asyncio.Event()

            async def caller() -> int:
                count = 0
                while not is_over.is_set():
                    question = chance.choice(QUESTIONS)
                    try:
                        text, revision, _ = await ask(client, question, "tenant")
                    except NotFound:  # it was unloaded just now
                        continue
                    assert text == said[revision, question]
                    count += 1
                return count

            callers = [asyncio.create_task(caller()) for _ in range(8)]
            peaks = []
            for number in range(NUM_LOADS):
                if chance.random() < 0.2:
                    await client.unload_adapter("tenant", drain_timeout=60)
                await client.load_adapter("tenant", f"a{chance.randrange(NUM_ADAPTERS)}", replace=True)
                if number in (NUM_LOADS // 2, NUM_LOADS - 1):
                    peaks.append(peak_bytes())
            is_over.set()
            assert sum(await asyncio.gather(*callers)) > 100
            return peaks

    with serving(*OPTIONS, "--adapters", str(root), "--adapter-slots", str(NUM_SLOTS)) as server:
        middle, end = asyncio.run(run(server.address, server.peak_bytes))
        assert_idle(server.address)
        with Client(server.address) as client:
            client.unload_adapter("tenant")
            with pytest.raises(NotFound):
                client.chat("Hello!", adapter="tenant").result()
    assert end - middle < MAX_GROWTH_BYTES, f"{(end - middle) / 2**20:.1f} MiB more in the second half"
