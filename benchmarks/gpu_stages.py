"""The stages of benchmarks/gpu.py, which runs each in a process of its own.

    python benchmarks/gpu_stages.py STAGE ROWS GIVEN        ROWS: a file that gets a line of JSON for each figure

A row is written as soon as it is known, so that a stage that is ended leaves what it has. What cannot be measured
without a CUDA device has its nearest likeness on a CPU, so that all of it can be tried there.
"""

import asyncio
import faulthandler
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_packages
from gpu_work import Emit, Given, Reads, fixed, forget_peak, nano, peak_gb, run_works, texts

# In a test's name, such as test_preempted_sequences_resume[True-gemma3-cuda].
FAMILY = re.compile(r"\[(?:(?:True|False)-)?(.+?)-(?:cpu|cuda)")
# With less, Qwen3-8B's weights cannot be made, written, read and run.
LARGE_S, LARGE_BYTES = 50, 20e9


def facts(given: Given, emit: Emit) -> None:
    import torch

    if given.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout.strip() if shutil.which(query[0]) else ""
        )
        emit({"fact": "device", "value": f"{properties.name}, {properties.multi_processor_count} multiprocessors"})
        emit({"fact": "memory, GB", "value": round(properties.total_memory / 1e9, 1)})
        emit({"fact": "driver", "value": driver or "unknown"})
        emit({"fact": "CUDA", "value": torch.version.cuda})
    emit({"fact": "CPUs", "value": os.cpu_count()})
    emit({"fact": "Python", "value": sys.version.split()[0]})
    emit({"fact": "torch", "value": torch.__version__})
    seconds, size = (0.2, 1 << 23) if given.is_tiny else (2.0, 1 << 31)
    source = torch.ones(size, dtype=torch.bfloat16, device=given.device)
    target = torch.empty_like(source)
    copies = _rate(given, partial(target.copy_, source), seconds)
    emit({"fact": "copy, GB/s read and written", "value": round(2 * source.nbytes * copies / 1e9, 1)})
    width = 8192 if given.device == "cuda" else 256
    left, right = (torch.randn(width, width, device=given.device, dtype=torch.bfloat16) for _ in range(2))
    products = _rate(given, partial(torch.mm, left, right), seconds)
    emit({"fact": "bfloat16 products, TFLOP/s", "value": round(2 * width**3 * products / 1e12, 3)})


def _rate(given: Given, work: Callable[[], object], seconds: float) -> float:
    """How often a second, at best."""
    work()
    best, end_s = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        given.synchronize()
        begin_s = time.perf_counter()
        for _ in range(10):
            work()
        given.synchronize()
        best = min(best, (time.perf_counter() - begin_s) / 10)
    return 1 / best


def packages(given: Given, emit: Emit) -> None:
    if given.wheels is not None:
        emit({"package": "installed", "value": gpu_packages.install(given.wheels, given.packages)})
    for word in gpu_packages.lacking():
        emit({"package": "lacking", "value": word})
    for name in ("transformers", "tokenizers", "grpcio", "protobuf"):
        emit({"package": name, "value": importlib.metadata.version(name)})


def equivalence(given: Given, emit: Emit) -> None:
    """tests/test_equivalence.py without the other tests' fixtures and plugins, until time is over."""
    import pytest

    counts: Counter[str] = Counter()
    families: set[str] = set()

    class Counting:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.failed:
                counts[report.outcome] += 1
                families.update(FAMILY.findall(report.nodeid))
            if report.failed:
                emit({"failed": report.nodeid.partition("::")[2], "why": str(report.longrepr).splitlines()[-1][:160]})
            if given.left_s < 0:
                pytest.exit("out of time")

    wanted = "one_shot and llama-cpu" if given.is_tiny else given.device
    chosen = ["-m", "gpu"] if given.device == "cuda" else ["-k", wanted]
    # Models are tiny, and wait for Python.
    num_workers = min(4, (os.cpu_count() or 1) // 4) if importlib.util.find_spec("xdist") else 0
    several = ["-p", "xdist", "-n", str(num_workers)] if num_workers > 1 else []
    ours = ["-o", "addopts=--import-mode=importlib", "-W", "default", "--noconftest", "-p", "no:cacheprovider"]
    code = pytest.main(["-q", *ours, *chosen, *several, "tests/test_equivalence.py"], [Counting()])
    emit({"families": len(families), **counts, "ended": pytest.ExitCode(code).name.lower()})
    if not counts:
        sys.exit("no test ran")


def checkpoint(given: Given, emit: Emit) -> None:
    from checkpoint import make

    begin_s = time.perf_counter()
    make("tiny" if given.is_tiny else "qwen3-0.6b", given.checkpoint, given.device)
    emit({"made in, s": round(time.perf_counter() - begin_s, 1)})


def offline(given: Given, emit: Emit) -> None:
    reads = Reads.of(given.checkpoint, 4 if given.is_tiny else 2)
    one, *others = (fixed(text, reads.vocab_size) for text in texts(given))
    works = [one, others[0], nano(given, reads.vocab_size), *others[1:]]
    asyncio.run(run_works(given, emit, given.checkpoint, works, reads))


def peer(given: Given, emit: Emit) -> None:
    """transformers' generate."""
    from peers import hf_generate

    from nanoserve.bench.workload import WARM_UP, FixedWorkload

    vocab_size = Reads.of(given.checkpoint, 2).vocab_size
    execute = hf_generate(given.checkpoint, given.dtype, [])
    execute(WARM_UP.requests(vocab_size, 1 << 20))
    for workload in map(FixedWorkload.parse, texts(given)[:3]):
        forget_peak(given)
        begin_s = time.perf_counter()
        num_tokens = execute(workload.requests(vocab_size, 1 << 20))
        seconds = time.perf_counter() - begin_s
        row = {"generate": workload.text, "seconds": round(seconds, 2), "tokens/s": round(num_tokens / seconds, 1)}
        emit({**row, "peak GB": peak_gb(given)})


def large(given: Given, emit: Emit) -> None:
    """Qwen3-8B's shape, one caller."""
    from checkpoint import make

    folder = str(Path(given.folder) / "large")
    if not given.is_tiny and given.left_s < LARGE_S:
        return emit({"skipped": f"{given.left_s:.0f} s are left, and it takes {LARGE_S}"})
    if not given.is_tiny and shutil.disk_usage(given.folder).free < LARGE_BYTES:
        return emit({"skipped": f"{given.folder} has no room for the weights"})
    begin_s = time.perf_counter()
    make("tiny" if given.is_tiny else "qwen3-8b", folder, given.device)
    emit({"workload": "weights made", "seconds": round(time.perf_counter() - begin_s, 1)})
    if given.device == "cuda":
        import torch

        torch.cuda.empty_cache()
    reads = Reads.of(folder, 4 if given.is_tiny else 2)
    work = fixed("1:8:6" if given.is_tiny else "1:128:128", reads.vocab_size)
    return asyncio.run(run_works(given, emit, folder, [work], reads))


def step(given: Given, emit: Emit) -> None:
    from gpu_step import step

    step(given, emit)


STAGES: dict[str, Callable[[Given, Emit], None]] = {
    "facts": facts,
    "packages": packages,
    "checkpoint": checkpoint,
    "equivalence": equivalence,
    "offline": offline,
    "peer": peer,
    "step": step,
    "8b": large,
}


def main() -> None:
    stage, path, text = sys.argv[1:]
    given = Given(**json.loads(text))
    # A stage that is about to be ended says where it is.
    faulthandler.dump_traceback_later(max(0.1, given.end_s - time.time() - 1))
    with Path(path).open("a", buffering=1) as rows:
        STAGES[stage](given, lambda row: print(json.dumps(row), file=rows))


if __name__ == "__main__":
    main()
