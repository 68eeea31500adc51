"""How many threads compute: the rules on figures recorded beside real neighbours, and what the system tells."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nanoserve.model import threads
from nanoserve.model.threads import MAX_PATIENCE_S, ComputeThreads, Sample, ThreadChoice, cpu_quota, usable_cpus

# (waited, others) as shares of a sample's time, of two threads on two CPUs; SmolLM2-135M, one caller.
QUIET = (0.12, 0.05)
SERVING_MANY = (0.30, 0.35)
ONE_LOOP_CAME = (1.26, 0.98)
BESIDE_ONE_LOOP = (0.10, 1.02)
TWO_LOOPS_CAME = (1.30, 1.10)
BESIDE_TWO_LOOPS = (0.55, 1.45)

# Prints how many threads the process has before it computes on two of them, after that, and after they are released.
THREADS = """
import os, torch
from nanoserve.model.threads import release_threads

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
before = num_threads()
torch.zeros(1 << 20).exp()
helped = num_threads()
release_threads()
print(before, helped, num_threads())
"""


def run(choice: ThreadChoice, kind: tuple[float, float], seconds: float) -> int:
    """Samples of a kind for so long."""
    for _ in range(round(seconds / 0.25)):
        choice.update(Sample(0.25, kind[0] * 0.25, kind[1] * 0.25))
    return choice.count


@pytest.mark.parametrize("kind", [QUIET, SERVING_MANY])
def test_nothing_is_given_up_for_what_rests_in_between(kind: tuple[float, float]) -> None:
    assert run(ThreadChoice(2, 2), kind, 60) == 2


@pytest.mark.parametrize(("comes", "stays"), [(ONE_LOOP_CAME, BESIDE_ONE_LOOP), (TWO_LOOPS_CAME, BESIDE_TWO_LOOPS)])
def test_a_neighbour_that_never_rests_gets_a_cpu_at_once_and_for_as_long_as_it_stays(
    comes: tuple[float, float], stays: tuple[float, float]
) -> None:
    choice = ThreadChoice(2, 2)
    assert run(choice, comes, 0.25) == 1
    for _ in range(100):
        assert run(choice, stays, 0.25) == 1
    assert run(choice, QUIET, 2) == 2


def test_many_threads_give_up_as_many_as_neighbours_want() -> None:
    choice = ThreadChoice(64, 64)
    # Ten loops: each shares a CPU with a thread, which waits half of the time.
    assert run(choice, (5.0, 5.0), 0.25) == 59
    assert run(choice, (2.5, 8.0), 0.25) == 57
    assert run(choice, (0.3, 10.0), 60) == 57  # 54 CPUs are free, and nobody waits: they find room
    assert run(choice, (0.3, 0.2), 1) == 63
    assert run(choice, (0.3, 0.2), 1) == 64


def test_a_try_that_fails_is_repeated_more_and_more_seldom() -> None:
    """What a hypervisor takes shows only while it is wanted: with one thread the other CPU looks free."""
    choice = ThreadChoice(2, 2)
    run(choice, ONE_LOOP_CAME, 0.25)
    pauses = []
    for _ in range(6):
        pause = 0.0
        while choice.count == 1:
            run(choice, QUIET, 0.25)
            pause += 0.25
        pauses.append(pause)
        run(choice, ONE_LOOP_CAME, 0.25)
    assert pauses == [1, 2, 4, MAX_PATIENCE_S, MAX_PATIENCE_S, MAX_PATIENCE_S]


def test_a_neighbour_that_comes_back_much_later_is_no_failed_try() -> None:
    choice = ThreadChoice(2, 2)
    for _ in range(3):
        assert run(choice, ONE_LOOP_CAME, 0.25) == 1
        assert run(choice, QUIET, 1) == 2
        assert run(choice, QUIET, 5) == 2


def test_one_thread_stays_one() -> None:
    assert run(ThreadChoice(1, 8), ONE_LOOP_CAME, 5) == 1


# ------------------------------------------------------------------------------------------------ what is seen


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system of two CPUs whose figures the test writes."""
    monkeypatch.setattr(threads, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    (tmp_path / str(os.getppid())).mkdir()
    return tmp_path


def tell(proc: Path, *, waited_s: float, busy_s: float, parent_s: float = 0.0) -> None:
    """What the engine's thread waited, what the two CPUs did, and the server."""
    task = proc / "self/task" / str(threading.get_native_id())
    task.mkdir(parents=True, exist_ok=True)
    (task / "schedstat").write_text(f"1 {int(waited_s * 1e9)} 1\n")
    ticks = int(busy_s * 100)
    (proc / "stat").write_text(
        f"cpu  9 9 9 9\ncpu0 {ticks} 0 0 777 5 0 0 0 0 0\ncpu1 0 0 0 777 0 0 0 0 0 0\ncpu2 9999999 0 0 0 0 0 0 0\n"
    )
    fields = ["0"] * 50
    fields[13] = str(int(parent_s * 100))
    (proc / str(os.getppid()) / "stat").write_text(" ".join(["1", "(a b) c)", *fields[2:]]))


def adapt(compute: ComputeThreads, clock: list[float], seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock[0] += seconds
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    compute.adapt()


def test_the_thread_that_computes_takes_the_number_that_was_chosen(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    clock, compute = [100.0], ComputeThreads(2)
    try:
        tell(proc, waited_s=0, busy_s=0)
        adapt(compute, clock, 0, monkeypatch)
        assert (compute.count, torch.get_num_threads()) == (2, 2)
        tell(proc, waited_s=0.4, busy_s=0.9)
        adapt(compute, clock, 0.1, monkeypatch)
        assert compute.count == 2  # it is not time to look
        adapt(compute, clock, 0.4, monkeypatch)
        assert (compute.count, torch.get_num_threads()) == (1, 1)
        tell(proc, waited_s=0.4, busy_s=2.4)
        adapt(compute, clock, 1.5, monkeypatch)
        assert compute.count == 1  # the other CPU is busy
        tell(proc, waited_s=0.4, busy_s=3.9, parent_s=1.5)
        adapt(compute, clock, 1.5, monkeypatch)
        assert (compute.count, torch.get_num_threads()) == (2, 2)  # by the server, which is no neighbour
        torch.set_num_threads(1)  # as a thread finds it whose first work falls into one_thread() of another
        tell(proc, waited_s=0.4, busy_s=4.0, parent_s=1.5)
        adapt(compute, clock, 0.3, monkeypatch)
        assert (compute.count, torch.get_num_threads()) == (2, 2)
        tell(proc, waited_s=60, busy_s=60)
        adapt(compute, clock, 60, monkeypatch)
        assert compute.count == 2  # nobody computed meanwhile
    finally:
        torch.set_num_threads(before)


def test_a_system_that_tells_nothing_leaves_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "PROC", tmp_path / "nothing")
    clock, compute = [100.0], ComputeThreads(2)
    try:
        for _ in range(4):
            adapt(compute, clock, 1, monkeypatch)
        assert compute.count == 2
    finally:
        torch.set_num_threads(before)


def test_this_system_tells_of_its_threads() -> None:
    reading = threads._Reading.take(time.monotonic())
    assert reading is not None
    assert threading.get_native_id() in reading.waited_s
    assert reading.busy_s >= reading.own_s > 0


# ------------------------------------------------------------------------------------------------ at the start


@pytest.mark.parametrize(
    ("line", "files", "want"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        # A service in a group of a group, of which the outer one is narrower.
        (
            "0::/a.slice/b.service",
            {"a.slice/cpu.max": "150000 100000", "a.slice/b.service/cpu.max": "400000 100000"},
            1.5,
        ),
        # A container that sees its own group as the root, and its name from outside.
        ("0::/docker/77", {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
        # Whatever else may stand there.
        ("0::/", {"cpu.max": "150000"}, None),
        ("0::/", {"cpu.max": "150000 0"}, None),
        ("0::/", {"cpu.max": "9" * 400 + " 1"}, None),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "300000"}, None),
        ("nonsense", {"cpu.max": "100000 100000"}, None),
        ("4:cpu:/a\0b", {}, None),
    ],
)
def test_the_quota_is_the_narrowest_of_all_groups(
    line: str, files: dict[str, str], want: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpuset:/elsewhere\n{line}\n" if line else "")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(threads, "PROC", tmp_path / "proc")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroup")
    assert cpu_quota() == want


@pytest.mark.parametrize(
    ("affinity", "all_cpus", "by_torch", "quota", "want", "why"),
    [
        (8, 8, 8, None, 8, "of 8 CPUs"),
        (8, 8, 4, None, 4, "of 8 CPUs"),  # two threads of a core count once
        (2, 64, 2, None, 2, "the process may use 2 of 64 CPUs"),
        (8, 8, 8, 2.5, 2, "the CPU quota is 2.5"),
        (8, 8, 8, 0.5, 1, "the CPU quota is 0.5"),
        (8, 8, 8, 16.0, 8, "of 8 CPUs"),
    ],
)
def test_as_many_threads_as_may_run(
    affinity: int,
    all_cpus: int,
    by_torch: int,
    quota: float | None,
    want: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: all_cpus)
    monkeypatch.setattr(threads, "TORCH_THREADS", by_torch)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cpus() == (want, why)
    monkeypatch.setenv("OMP_NUM_THREADS", str(by_torch))
    assert usable_cpus() == (want, "OMP_NUM_THREADS" if why.startswith("of") else why)


def test_helping_threads_end_when_they_are_released() -> None:
    process = subprocess.run([sys.executable, "-c", THREADS], stdout=subprocess.PIPE, text=True, check=True)
    before, helped, after = map(int, process.stdout.split())
    assert helped == before + 1
    assert after == before
