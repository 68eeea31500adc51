"""How many threads compute a step on a CPU: as many as can run at once.

A step has hundreds of parallel parts, and each ends when its last thread does. Between them threads wait awake, which
is fast as long as each has a CPU. If another process wants one of these CPUs, a thread that others wait for may stand
in a queue for milliseconds in every part, and a step takes fifty times as long. One thread less is then the better
choice by far: the scheduler of the system gives it a CPU of its own.

    sample of the machine ─▶ ThreadChoice.update ─▶ number of threads        rules alone, tested on recorded samples
            └──────────────── ComputeThreads.adapt, in every layer of a step

Linux only: elsewhere nothing is known of a thread's waiting, and the number stays what it was at the start.
"""

import ctypes
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoserve.config import environment

# How often the machine is looked at.
SAMPLE_S = 0.25
# A sample over a longer time is of an idle engine, and says nothing.
MAX_SAMPLE_S = 2.0
# Of a sample's time, in which a thread that was ready had no CPU: from here on fewer threads are faster. On two CPUs a
# neighbour that never rests causes 1.0, a server's own event loop up to 0.3. One of two threads alone is 0.6 to 0.9 as
# fast as both.
MAX_WAITED = 0.4
# One thread more is tried when so much of a CPU has been free for it for so long.
FREE_FOR_ONE_MORE = 0.5
PATIENCE_S = 1.0
# A try that fails at once doubles the time until the next, up to this.
MAX_PATIENCE_S = 8.0
TRIAL_S = 2.0
# One for each core, or what OMP_NUM_THREADS or the program has set, before this module sets anything.
TORCH_THREADS = torch.get_num_threads()
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine over some time."""

    seconds: float
    # What the computing threads waited for a CPU while they were ready to run, all together.
    waited_s: float
    # What other processes, or other virtual machines, had of the CPUs that this process may use.
    others_s: float


class ThreadChoice:
    """The number of threads, sample by sample."""

    def __init__(self, most: int, num_cpus: int) -> None:
        """most: threads at most, and at first. num_cpus: CPUs that the process may run on."""
        self.count = most
        self._most, self._num_cpus = most, num_cpus
        self._patience_s = PATIENCE_S
        # For how long there has been room for one more.
        self._free_s = 0.0
        # Since the last thread more.
        self._trial_s = math.inf

    def update(self, sample: Sample) -> int:
        """The number from now on."""
        self._trial_s += sample.seconds
        waited = sample.waited_s / sample.seconds
        free = self._num_cpus - sample.others_s / sample.seconds
        if self.count > 1 and waited > MAX_WAITED:
            is_failed_trial = self._trial_s < TRIAL_S
            self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S) if is_failed_trial else PATIENCE_S
            self._free_s = 0.0
            # Two threads that wait half of the time want the CPU of one.
            self.count = max(1, self.count - max(1, round(waited)))
        elif self.count < self._most and free >= self.count + FREE_FOR_ONE_MORE:
            self._free_s += sample.seconds
            if self._free_s >= self._patience_s:
                self._free_s = self._trial_s = 0.0
                self.count = min(self._most, max(self.count + 1, math.floor(free)))
        else:
            self._free_s = 0.0
        return self.count


class ComputeThreads:
    """Sets the number of threads of the thread that computes. Only that one may call `adapt`."""

    def __init__(self, most: int) -> None:
        self._choice = ThreadChoice(most, _num_cpus())
        self._most = most
        self._next_s = 0.0
        self._last: _Reading | None = None

    @property
    def count(self) -> int:
        """The number that was chosen last."""
        return self._choice.count

    def adapt(self) -> None:
        """Look at the machine if it is time to, and take as many threads as it has CPUs for."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + SAMPLE_S
        before, self._last = self._last, _Reading.take(now)
        if before is not None and self._last is not None and now - before.time_s <= MAX_SAMPLE_S:
            old_count, count = self.count, self._choice.update(self._last.since(before))
            if count != old_count:
                why = "other processes want the CPUs" if count < old_count else "CPUs are free again"
                logger.info("computing with %d of %d threads: %s", count, self._most, why)
        # Looked at each time: a thread that has not computed yet begins with what some other thread chose last.
        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the system has counted so far."""

    time_s: float
    # Thread id -> seconds that it waited for a CPU.
    waited_s: dict[int, float]
    # Of all CPUs that this process may use.
    busy_s: float
    # Of this process, and of the one that started it: the server, if this is the engine's.
    own_s: float

    @classmethod
    def take(cls, now: float) -> "_Reading | None":
        """None where the system does not tell."""
        try:
            return cls(now, dict(_waiting_times()), _busy_time(), time.process_time() + _parent_time())
        except (OSError, ValueError, LookupError, ArithmeticError):
            return None

    def since(self, before: "_Reading") -> Sample:
        waited_s = sum(waited - before.waited_s.get(thread, waited) for thread, waited in self.waited_s.items())
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return Sample(self.time_s - before.time_s, waited_s, max(0.0, others_s))


def _waiting_times() -> Iterator[tuple[int, float]]:
    """Of this thread, and of those that compute for it, which Python does not know."""
    others = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    for task in os.scandir(PROC / "self/task"):
        if int(task.name) not in others:
            try:
                _, waited_ns, _ = Path(task.path, "schedstat").read_text().split()
            except (ProcessLookupError, FileNotFoundError):  # it has just ended
                continue
            yield int(task.name), int(waited_ns) / 1e9


def _num_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy_time() -> float:
    """Seconds in which the CPUs of this process were not idle; what a hypervisor took of them counts."""
    cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    total = 0
    for line in (PROC / "stat").read_text().splitlines():
        name, _, ticks = line.partition(" ")
        if name in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks.split()[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


def _parent_time() -> float:
    fields = (PROC / f"{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------- at the start


@contextmanager
def one_thread() -> Iterator[None]:
    """This thread computes alone: what comes up once is over as soon, and no neighbour can hold it up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # of all threads to come, too


def release_threads() -> None:
    """End the threads that have helped this one to compute, when from now on another thread does.

    Between the parallel parts of a step GNU's OpenMP lets helpers wait awake, but only while all that were ever made
    are no more than CPUs; otherwise each part begins with waking a thread, and a step takes up to twice as long.
    """
    try:
        openmp = ctypes.CDLL("libgomp.so.1")  # the one that torch has loaded
    except OSError:
        return
    omp_pause_soft = 1  # omp.h: settings stay
    openmp.omp_pause_resource_all(omp_pause_soft)


def usable_cpus() -> tuple[int, str]:
    """How many CPUs this process may keep busy, and what says so.

    Threads beyond a container's quota do not only idle: the kernel then stops all of them for parts of every period.
    """
    num_cpus, num_all = _num_cpus(), os.cpu_count() or 1
    quota = cpu_quota()
    if quota is not None and quota < min(num_cpus, TORCH_THREADS):
        return max(1, math.floor(quota)), f"the CPU quota is {quota:g}"
    if num_cpus < min(num_all, TORCH_THREADS + 1):
        return num_cpus, f"the process may use {num_cpus} of {num_all} CPUs"
    why = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in environment() else f"of {num_all} CPUs"
    return min(num_cpus, TORCH_THREADS), why


def cpu_quota() -> float | None:
    """CPUs' worth of time that the control groups of this process leave it. None = no limit, or no such groups."""
    quotas = []
    for line in _read(PROC / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if line.startswith("0::"):
            for group in _upwards(CGROUPS, path):
                limit, _, period = _read(group / "cpu.max").partition(" ")  # microseconds, or "max"
                quotas.append(_ratio(limit, period))
        elif "cpu" in controllers.split(","):
            for group in _upwards(CGROUPS / "cpu", path):
                limit, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")  # -1 = no limit
                quotas.append(_ratio(limit, period))
    return min((quota for quota in quotas if quota is not None), default=None)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """Of a group and of all that it is in. A container may see its own group as the root."""
    group = root / path.lstrip("/")
    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _ratio(limit: str, period: str) -> float | None:
    """None if they do not say one."""
    try:
        return int(limit) / int(period) if int(limit) > 0 else None
    except (ValueError, ArithmeticError):
        return None


def _read(path: Path) -> str:
    """Empty if there is no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except (OSError, ValueError):
        return ""
