"""Sends the requests of a workload to a server, each when it is due, and notes when what came back."""

import asyncio
import contextlib
import itertools
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from nanoserve_client import AsyncClient, NanoserveError, Usage

from nanoserve.bench.workload import BenchRequest


@dataclass(slots=True)
class Record:
    """One request, as its caller saw it. Times are seconds since the run began."""

    # When it had to be sent. Latencies count from here, so that a client or server that is too slow to take requests as
    # they come does not look better for it.
    due_s: float
    # (time, tokens) of each Delta that has tokens.
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    # When the stream ended; None = it was cut off with the run.
    end_s: float | None = None
    # Why it failed, in the server's word or gRPC's.
    failure: str | None = None
    # Of a completed request.
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    # Guessed, and right; OpenAI's API does not tell.
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def is_completed(self) -> bool:
        return self.end_s is not None and self.failure is None

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None if none came."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    @property
    def e2e_s(self) -> float | None:
        """The whole of a completed request."""
        return self.end_s - self.due_s if self.end_s is not None and self.failure is None else None

    @property
    def itls_s(self) -> list[float]:
        """The inter-token latency of each token after the first Delta.

        The k tokens of a Delta share the time since the Delta before: each took a k-th. So a server gains nothing by
        holding tokens back or by sending them together, and the latencies add up to the time that passed. When the
        tokens of the first Delta came after each other nobody knows; they are part of the time to first token.
        """
        gaps = itertools.pairwise(self.arrivals)
        return [(now - before) / count for (before, _), (now, count) in gaps for _ in range(count)]


class CallFailed(Exception):
    """A request failed; the message is the server's word for why, or the transport's."""


# Sends a request, with a salt of the prefix cache: gives the number of tokens that came, each time some did, and the
# usage at the end. Raises CallFailed.
Send = Callable[[BenchRequest, str], AsyncGenerator[int | Usage, None]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """All requests of a run, and how long it took from the first due to the last end."""

    records: list[Record]
    seconds: float
    # Ended by Ctrl-C.
    is_interrupted: bool


async def measure(
    send: Send,
    requests: Sequence[BenchRequest],
    rate: float | None,
    on_end: Callable[[], object] = lambda: None,
) -> Measurement:
    """Run the requests; `on_end` is called when one ends, well or not.

    rate: requests/s that arrive as a Poisson process; None = all at once. If the calling task is cancelled, as Ctrl-C
    does, what was noted so far is returned.
    """
    records = [Record(due_s) for due_s in due_times(len(requests), rate)]
    # Prefixes are shared within the run and never with an earlier one, which sent the same prompts.
    salt = secrets.token_hex(8)
    is_interrupted = False
    start_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for request, record in zip(requests, records, strict=True):
                group.create_task(_run(send, request, record, start_s, salt, on_end))
    except asyncio.CancelledError:
        is_interrupted = True
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    return Measurement(records, time.perf_counter() - start_s, is_interrupted)


def due_times(count: int, rate: float | None) -> list[float]:
    """Seconds at which requests are due, the first at once; the same in every run."""
    if rate is None:
        return [0.0] * count
    rng = random.Random(count)
    gaps = (rng.expovariate(rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))


async def _run(
    send: Send, request: BenchRequest, record: Record, start_s: float, salt: str, on_end: Callable[[], object]
) -> None:
    await asyncio.sleep(start_s + record.due_s - time.perf_counter())
    try:
        async with contextlib.aclosing(send(request, salt)) as news:
            async for item in news:
                if isinstance(item, Usage):
                    record.num_prompt_tokens, record.num_cached_tokens = item.prompt_tokens, item.cached_tokens
                    record.num_drafted, record.num_accepted = item.draft_tokens, item.accepted_draft_tokens
                else:
                    record.arrivals.append((time.perf_counter() - start_s, item))
    except CallFailed as error:
        record.failure = str(error)
    record.end_s = time.perf_counter() - start_s
    on_end()


def over_grpc(client: AsyncClient) -> Send:
    """Sends with the Python client."""

    async def send(request: BenchRequest, salt: str) -> AsyncGenerator[int | Usage, None]:
        try:
            async with client.generate(
                request.prompt, temperature=0, max_tokens=request.num_out, ignore_eos=True, cache_salt=salt
            ) as stream:
                async for delta in stream:
                    if delta.token_ids:
                        yield len(delta.token_ids)
                yield (await stream.result()).usage
        except NanoserveError as error:
            raise CallFailed(error.reason or error.code.name) from error

    return send
