"""One decode step under a magnifying glass, for benchmarks/gpu.py: the step loop is driven by hand, on this thread.

It reaches behind the step loop's own methods, because nothing else may run beside a step that is looked at.
"""

import time
from collections import Counter
from typing import Any

from gpu_work import Emit, Given, Reads, Work, nano, options

from nanoserve.bench.workload import BenchRequest
from nanoserve.build import build_core
from nanoserve.engine.core import EngineCore
from nanoserve.request import Event, Request, SamplingParams, SequenceOutput, StepPlan, StepResult

WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
NUM_PROFILED = 3


class WatchedExecutor:
    """An Executor, and how long its callers waited for it."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.seconds = 0.0

    @property
    def depth(self) -> int:
        return int(self._executor.depth)

    def submit(self, plan: StepPlan) -> None:
        begin_s = time.perf_counter()
        self._executor.submit(plan)
        self.seconds += time.perf_counter() - begin_s

    def collect(self) -> StepResult:
        begin_s = time.perf_counter()
        result: StepResult = self._executor.collect()
        self.seconds += time.perf_counter() - begin_s
        return result


class Steps:
    """A step loop that is not started."""

    def __init__(self, core: EngineCore, given: Given) -> None:
        self._core, self._given = core, given
        self._executor = core._executor = WatchedExecutor(core._executor)
        self._events: list[Event] = []
        core._deliver = self._events.extend

    def begin(self, requests: list[BenchRequest]) -> None:
        """Until each has its first token, and some steps more."""
        for index, request in enumerate(requests):
            params = SamplingParams(temperature=0.6, max_tokens=request.num_out, ignore_eos=True, seed=index)
            self._core._obey(Request(f"{len(requests)} {index}", request.prompt, params))
        self._events.clear()
        while len({e.request_id for e in self._events if isinstance(e, SequenceOutput) and e.token_ids}) < len(
            requests
        ):
            self._core._step()
        self.run(3)

    def run(self, count: int) -> tuple[float, float]:
        """Seconds of a step, and those of them outside of the model side."""
        self._given.synchronize()
        begin_s, before_s = time.perf_counter(), self._executor.seconds
        for _ in range(count):
            self._core._step()
        self._given.synchronize()
        seconds = time.perf_counter() - begin_s
        return seconds / count, (seconds - (self._executor.seconds - before_s)) / count

    def drain(self) -> None:
        while self._core._scheduler.has_work:
            self._core._step()


def step(given: Given, emit: Emit) -> None:
    reads = Reads.of(given.checkpoint, 4 if given.is_tiny else 2)
    num_steps = 3 if given.is_tiny else 20
    # The first write while others' prompts are still read.
    requests = [BenchRequest(r.prompt, num_steps + 40) for r in nano(given, reads.vocab_size).requests]
    work = Work("step", requests, 0.6)
    steps = Steps(build_core(options(given, given.checkpoint, [work], reads, len(work.requests))).core, given)
    for requests in (work.requests[:1], work.requests):
        steps.begin(requests)
        seconds, outside_s = steps.run(num_steps)
        contexts = sum(len(request.prompt) + num_steps // 2 for request in requests)
        num_bytes = reads.weights + contexts * reads.kv
        row = {"rows": len(requests), "ms": round(seconds * 1e3, 2), "ms between steps": round(outside_s * 1e3, 2)}
        row["of memory"] = round(num_bytes / given.bandwidth / seconds, 3) if given.bandwidth else None
        counted, largest = profile(given, steps)
        emit({**row, **counted})
        for name, count, ms in largest:
            emit({"kernel": name[:72], "rows": len(requests), "times": count, "ms": ms})
        steps.drain()


def profile(given: Given, steps: Steps) -> tuple[dict[str, Any], list[tuple[str, float, float]]]:
    """Figures of a step, and its largest kernels. On a CPU operators stand for kernels."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    is_cuda = given.device == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    ) as prof:
        steps.run(NUM_PROFILED)
    events = prof.events()
    work = [e for e in events if (e.device_type == DeviceType.CUDA if is_cuda else not e.cpu_children)]
    moves = ("Memcpy", "Memset")
    times: Counter[str] = Counter()
    for event in work:
        times[event.name] += event.time_range.elapsed_us()
    numbers = Counter(event.name for event in work)
    counted = {
        "kernels": sum(not e.name.startswith(moves) for e in work) / NUM_PROFILED,
        "copies": sum(e.name.startswith(moves) for e in work) / NUM_PROFILED,
        "ms of kernels": round(times.total() / 1e3 / NUM_PROFILED, 2),
        "launches": sum(e.name.startswith(LAUNCHES) for e in events) / NUM_PROFILED,
        "syncs": sum(e.name in WAITS for e in events) / NUM_PROFILED,
    }
    counted = {name: round(value, 2) for name, value in counted.items()}
    largest = [
        (name, round(numbers[name] / NUM_PROFILED, 1), round(us / 1e3 / NUM_PROFILED, 3))
        for name, us in times.most_common(8)
    ]
    return counted, largest
