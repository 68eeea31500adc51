"""Times a server beside other busy processes: how fast it stays, how soon it notices, and how soon it is back.

    python benchmarks/neighbours.py FOLDER [--neighbours N ...] [--workloads N:IN:OUT ...] [--rounds N] [--seconds S]

A neighbour is a loop that never rests, in a session of its own, as another user's program would be. In each round, for
each number of neighbours and each workload: callers without a pause on the quiet machine, the neighbours come, they go.

    quiet   tokens/s before they come          beside  tokens/s once the server has noticed
    noticed seconds from their coming until a second has 0.9 of `beside`; back: from their going, of `quiet`

and the start: seconds from the process's begin until it is ready. Ratios are of the medians of all rounds.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from nanoserve_client import AsyncClient
from served import serving

from nanoserve.bench.workload import FixedWorkload

# For what is measured after a change, the time given to the server to notice.
SETTLING_S = 5.0
BACK_S = 10.0
LOOP = ["sh", "-c", "while :; do :; done"]


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    processes = [subprocess.Popen(LOOP, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Callers:
    """Callers without a pause, and when they got which tokens."""

    def __init__(self, client: AsyncClient, workload: FixedWorkload, vocab_size: int) -> None:
        self._client, self._workload, self._vocab_size = client, workload, vocab_size
        # (time.monotonic(), number of tokens), in order of time.
        self._got: list[tuple[float, int]] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._call(number) for number in range(self._workload.num_requests)))

    async def _call(self, number: int) -> None:
        chance = random.Random(number)
        for _ in itertools.count():
            prompt = [chance.randrange(10, min(8000, self._vocab_size)) for _ in range(self._workload.num_in)]
            stream = self._client.generate(
                prompt, temperature=0, max_tokens=self._workload.num_out, ignore_eos=True, omit_text=True
            )
            async for delta in stream:
                self._got.append((time.monotonic(), len(delta.token_ids)))

    def speed(self, begin_s: float, end_s: float) -> float:
        """Tokens a second."""
        return sum(count for at_s, count in self._got if begin_s <= at_s < end_s) / (end_s - begin_s)

    def first_second(self, begin_s: float, end_s: float, wanted: float) -> float:
        """Seconds from `begin_s` to the begin of the first second, by tenths, that is as fast as wanted."""
        tenths = range(int((end_s - begin_s - 1) * 10))
        starts = (i / 10 for i in tenths if self.speed(begin_s + i / 10, begin_s + i / 10 + 1) >= wanted)
        return next(starts, float("inf"))


async def measure(client: AsyncClient, workload: FixedWorkload, count: int, seconds: float) -> dict[str, float]:
    vocab_size = (await client.list_models())[0].vocab_size
    callers = Callers(client, workload, vocab_size)
    task = asyncio.create_task(callers.run())
    await asyncio.sleep(3)
    begin_s = time.monotonic()
    await asyncio.sleep(seconds)
    come_s = time.monotonic()
    with neighbours(count):
        await asyncio.sleep(SETTLING_S + seconds)
        go_s = time.monotonic()
    await asyncio.sleep(BACK_S + 2)
    end_s = time.monotonic()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    quiet, beside = callers.speed(begin_s, come_s), callers.speed(come_s + SETTLING_S, go_s)
    noticed_s = callers.first_second(come_s, go_s, 0.9 * beside)
    return {
        "quiet": quiet,
        "beside": beside,
        "noticed_s": noticed_s,
        "back_s": callers.first_second(go_s, end_s, 0.9 * quiet),
    }


def start_s(arguments: list[str], count: int) -> float:
    with neighbours(count):
        begin_s = time.monotonic()
        with serving(arguments):
            return time.monotonic() - begin_s


async def round_of(
    arguments: list[str], counts: list[int], workloads: list[FixedWorkload], seconds: float
) -> dict[tuple[int, str], dict[str, float]]:
    found: dict[tuple[int, str], dict[str, float]] = {}
    quiet_start_s = start_s(arguments, 0)
    for count in counts:
        found[count, "start"] = {"quiet": quiet_start_s, "beside": start_s(arguments, count)}
    with serving(arguments) as (_, target):
        async with AsyncClient(target) as client:
            for count, workload in itertools.product(counts, workloads):
                found[count, workload.text] = await measure(client, workload, count, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--neighbours", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workloads", nargs="+", type=FixedWorkload.parse, default=["1:64:64", "8:128:32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    workloads = [FixedWorkload.parse(w) if isinstance(w, str) else w for w in given.workloads]
    # Random prompts are answered with text that repeats itself, and guesses of that would hide what neighbours cost.
    arguments = [given.folder, "--kv-memory", "1GiB", "--http-port", "0", "--speculate", "off"]
    # What is compiled is there before anything is timed.
    subprocess.run(
        [sys.executable, "-m", "nanoserve", "bench", "offline", given.folder, "--workload", "1:16:2"], check=True
    )
    rounds = []
    for _ in range(given.rounds):
        rounds.append(asyncio.run(round_of(arguments, given.neighbours, workloads, given.seconds)))
        print(json.dumps({f"{count} {name}": figures for (count, name), figures in rounds[-1].items()}), flush=True)
    print("| neighbours | workload | quiet | beside | ratio | noticed after, s | back after, s |\n" + "|---" * 7 + "|")
    for key in rounds[0]:
        medians = {name: statistics.median(each[key][name] for each in rounds) for name in rounds[0][key]}
        times = [f"{medians[name]:.1f}" if name in medians else "" for name in ("noticed_s", "back_s")]
        ratio = medians["beside"] / medians["quiet"]
        row = [str(key[0]), key[1], f"{medians['quiet']:.1f}", f"{medians['beside']:.1f}", f"{ratio:.2f}", *times]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
