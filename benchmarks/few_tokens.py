"""Times steps in which each sequence computes a few tokens, as when drafts are checked, against steps of single tokens.

    python benchmarks/few_tokens.py FOLDER [--tokens N] [--sequences N ...] [--contexts N ...]
                                    [--rounds N] [--kv-gib N]

In one process, in turn: N sequences of `tokens` tokens each behind a context; as many sequences of one token as that
makes together; and N sequences of one token. Milliseconds are medians of all rounds, and the ratios are theirs.

    few     N x tokens        single   (N * tokens) x 1        one   N x 1
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from nanoserve.build import build_core
from nanoserve.config import CacheOptions, ModelOptions, Options, SchedulerConfig
from nanoserve.model.runner import ModelRunner
from nanoserve.request import Admission, SamplingParams, ScheduledSequence, StepPlan

BLOCK_SIZE = 16


def step_s(runner: ModelRunner, rows: int, context: int, num_tokens: int) -> float:
    """Seconds that a step takes in which so many rows compute so many tokens behind their context."""
    plan = StepPlan([ScheduledSequence(row, context, num_tokens, [], True) for row in range(rows)])
    start = time.perf_counter()
    runner.submit(plan)
    runner.collect()
    return time.perf_counter() - start


def admit(runner: ModelRunner, rows: int, context: int, num_tokens: int) -> None:
    """Give each row its tokens and blocks, and compute its context."""
    num_blocks = -(-(context + num_tokens) // BLOCK_SIZE)
    params = SamplingParams(temperature=0, max_tokens=1)
    for row in range(rows):
        token_ids = torch.randint(1000, (context + num_tokens,), generator=torch.Generator().manual_seed(row)).tolist()
        admission = Admission(params, 0, token_ids, len(token_ids), frozenset())
        blocks = list(range(row * num_blocks, (row + 1) * num_blocks))
        runner.submit(StepPlan([ScheduledSequence(row, 0, context, blocks, False, admission)]))
        runner.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kv-gib", type=int, default=8)
    arguments = parser.parse_args()
    most = max(arguments.sequences) * arguments.tokens
    context = max(arguments.contexts) + arguments.tokens
    options = Options(
        model=ModelOptions(path=str(arguments.folder), max_context_tokens=context + BLOCK_SIZE),
        cache=CacheOptions(kv_memory_bytes=arguments.kv_gib << 30, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=most, max_num_batched_tokens=max(most, context)),
    )
    built = build_core(options, wait_until_fast=True)
    runner = built.core._executor
    assert isinstance(runner, ModelRunner)
    names = ("sequences", "context", "few ms", "single ms", "one ms", "few/single", "few/one")
    print("".join(f"{name:>11}" for name in names))
    for length in arguments.contexts:
        admit(runner, most, length, arguments.tokens)
        for num in arguments.sequences:
            shapes = {"few": (num, arguments.tokens), "single": (num * arguments.tokens, 1), "one": (num, 1)}
            times: dict[str, list[float]] = {name: [] for name in shapes}
            for _ in range(arguments.rounds):
                for name, (rows, tokens) in shapes.items():
                    times[name].append(step_s(runner, rows, length, tokens))
            few, single, one = (1000 * statistics.median(times[name]) for name in shapes)
            print(f"{num:11} {length:10} {few:10.1f} {single:10.1f} {one:10.1f} {few / single:10.2f} {few / one:10.2f}")


if __name__ == "__main__":
    main()
