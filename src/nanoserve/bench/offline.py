"""`nanoserve bench offline`: how fast the engine is in this process, without a network.

All requests of a workload come at once, and its time is until the last token of the last one. A first tiny batch is in
no figure.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanoserve.bench.workload import WARM_UP, BenchRequest, FixedWorkload
from nanoserve.checkpoint import check_path
from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.loading import Loading
from nanoserve.cli.sources import Choices
from nanoserve.cli.terminal import CommandError, start_logging, write
from nanoserve.config import ENGINE_SECTIONS, Options, SchedulerConfig
from nanoserve.errors import RequestError
from nanoserve.request import SamplingParams, Stage

if TYPE_CHECKING:
    from nanoserve.engine.engine import Engine

DESCRIPTION = """
    Time the engine on fixed workloads, without a network. Without MODEL, the small one that is built in.

    Requests are greedy and ignore EOS. All of a workload run at once, unless --max-num-seqs is given, and the prefix
    cache is on only if a workload has SHARED.
"""
EXAMPLES = """
    nanoserve bench offline --workload 8:128:64
    nanoserve bench offline Qwen/Qwen3-0.6B --dtype bfloat16 --workload 32:128:1 32:128:64 32:512:64:384 --json
"""
HEADER = f"{'workload':20} {'seconds':>9} {'output tokens/s':>16}\n"

# Runs requests to their ends, all at once; returns the tokens made.
Run = Callable[[Sequence[BenchRequest]], int]


def add_arguments(parser: Parser) -> None:
    parser.describe("[MODEL] --workload WORKLOAD... [OPTIONS]", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("What is timed")
    group.add_argument(
        "--workload",
        nargs="+",
        required=True,
        type=FixedWorkload.parse,
        metavar="WORKLOAD",
        help="N:IN:OUT[:SHARED] = N requests of IN random prompt tokens, the first SHARED the same in all, and OUT new "
        "ones. Several run one after the other.",
    )
    group.add_argument("--json", action="store_true", help="A line of JSON a workload instead of the table.")
    add_options(parser, ENGINE_SECTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError or CommandError."""
    started_s = time.perf_counter()
    loading = Loading(start_logging(logging.WARNING))
    choices = Choices.of(arguments)
    is_asked = "--max-num-seqs" in choices.flags("scheduler")
    options = fit(choices.options(), arguments.workload, keep_max_num_seqs=is_asked)
    with choices.origins_in_errors(), running_engine(options, loading) as (engine, execute):
        model = engine.model
        timings = time_workloads(
            "nanoserve", execute, arguments.workload, started_s, model.vocab_size, model.max_context_tokens
        )
        for i, timing in enumerate(timings):
            if arguments.json:
                write(json.dumps(timing.as_json()) + "\n")
            else:
                write(timing.as_row() if i else HEADER + timing.as_row())
    return 0


def fit(options: Options, workloads: Sequence[FixedWorkload], *, keep_max_num_seqs: bool) -> Options:
    """Let all requests of a workload run at once, and share prefixes only where it is about that."""
    most = max(w.num_requests for w in (*workloads, WARM_UP))
    scheduler = options.scheduler
    if not keep_max_num_seqs and scheduler.max_num_seqs == SchedulerConfig().max_num_seqs:
        scheduler = replace(
            scheduler, max_num_seqs=most, max_num_batched_tokens=max(scheduler.max_num_batched_tokens, most)
        )
    scheduler = replace(scheduler, max_waiting=max(scheduler.max_waiting, most))
    has_shared = any(w.num_shared for w in workloads)
    cache = replace(options.cache, enable_prefix_cache=options.cache.enable_prefix_cache and has_shared)
    return replace(options, scheduler=scheduler, cache=cache)


@contextlib.contextmanager
def running_engine(options: Options, loading: Loading) -> Iterator[tuple["Engine", Run]]:
    """An engine that is compiled and warm, and what runs requests on it. Raises ConfigError."""
    check_path(options.model)
    with asyncio.Runner() as loop:
        with loading:
            loading.report(Stage("importing torch and transformers"))
            from nanoserve.build import build_engine

            engine = build_engine(options, wait_until_fast=True, report=loading.report)
        loop.run(_start(engine))
        try:
            yield engine, lambda requests: loop.run(_run_all(engine, requests))
        finally:
            loop.run(engine.close())


async def _start(engine: "Engine") -> None:
    engine.start()


async def _run_all(engine: "Engine", requests: Sequence[BenchRequest]) -> int:
    """Raises CommandError if one fails."""
    try:
        return sum(await asyncio.gather(*(_run_one(engine, request) for request in requests)))
    except RequestError as error:
        raise CommandError(f"a request failed ({type(error).__name__}): {error}") from error


async def _run_one(engine: "Engine", request: BenchRequest) -> int:
    """Returns the number of its tokens."""
    from nanoserve.engine.stream import Finished

    params = SamplingParams(temperature=0, max_tokens=request.num_out, ignore_eos=True, detokenize=False)
    async for event in engine.generate(request.prompt, params):
        if isinstance(event, Finished):
            return event.completion_tokens
    raise AssertionError("the stream has no end")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a workload took."""

    engine: str
    workload: FixedWorkload
    seconds: float
    # From the start of the command until the engine had run the first tiny batch.
    ready_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.workload.num_requests * self.workload.num_out / self.seconds

    def as_json(self) -> dict[str, Any]:
        """For json.dumps."""
        w = self.workload
        return {
            "engine": self.engine,
            "n": w.num_requests,
            "in": w.num_in,
            "out": w.num_out,
            "shared": w.num_shared,
            "seconds": round(self.seconds, 2),
            "out_tok_s": round(self.tokens_per_s, 1),
            "ready_s": round(self.ready_s, 1),
        }

    def as_row(self) -> str:
        """A line of the table below HEADER."""
        return f"{self.workload.text:20} {self.seconds:9.2f} {self.tokens_per_s:16.1f}\n"


def time_workloads(
    engine: str,
    execute: Run,
    workloads: Sequence[FixedWorkload],
    started_s: float,
    vocab_size: int,
    max_context_tokens: int,
) -> Iterator[Timing]:
    """Time one workload after the other, on any engine that `execute` runs; started_s: time.perf_counter() before it
    was made. Raises ConfigError if the model cannot run one of them, before any runs.
    """
    prepared = [w.requests(vocab_size, max_context_tokens) for w in workloads]
    execute(WARM_UP.requests(vocab_size, max_context_tokens))
    ready_s = time.perf_counter() - started_s
    for workload, requests in zip(workloads, prepared, strict=True):
        begin_s = time.perf_counter()
        num_tokens = execute(requests)
        seconds = time.perf_counter() - begin_s
        assert num_tokens == workload.num_requests * workload.num_out, f"{num_tokens} tokens"
        yield Timing(engine, workload, seconds, ready_s)
