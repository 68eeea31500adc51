"""The process that constraints are tried in: what ends it ends nothing else, and the next constraint has a new one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from constrained import BYTES

from nanoserve.constraint import check_process
from nanoserve.constraint.check_process import CheckProcess
from nanoserve.errors import ConstraintInvalid
from nanoserve.request import Constraint, ConstraintKind

SECONDS = 20
QUICK = Constraint(ConstraintKind.REGEX, "ab")
# It takes seconds to find which of its branches are in the way.
SLOW = Constraint(
    ConstraintKind.JSON_SCHEMA,
    json.dumps(
        {"oneOf": [{"type": "object", "properties": {f"{i}": {"pattern": "(a|b)*c{1,50}"}}} for i in range(990)]}
    ),
)


@pytest.fixture
def process():
    process = CheckProcess(BYTES)
    yield process
    if process._process is not None:
        process._end()


def test_it_says_what_a_constraint_comes_to(process):
    checked = process.check(QUICK, SECONDS)
    assert checked.report.num_grammar_bytes == len(checked.grammar)
    with pytest.raises(ConstraintInvalid) as caught:
        process.check(Constraint(ConstraintKind.JSON_SCHEMA, '{"uniqueItems": true}'), SECONDS)
    assert caught.value.facts["keyword"] == "uniqueItems"
    assert caught.value.field == "constraint.json_schema"


def test_one_that_takes_too_long_is_ended_with_its_process(process, monkeypatch):
    monkeypatch.setattr(check_process, "CLOCK_FACTOR", 1000)
    process.check(QUICK, SECONDS)
    first = process._process
    with pytest.raises(TimeoutError):
        process.check(SLOW, 0.05)
    assert first.poll() == -signal.SIGPROF
    process.check(QUICK, SECONDS)


def test_time_counts_that_is_spent_on_it_and_not_that_of_others(process, monkeypatch):
    """Beside processes that keep all CPUs busy; and not that of the constraints before it."""
    monkeypatch.setattr(check_process, "CLOCK_FACTOR", 1000)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        for _ in range(20):
            process.check(QUICK, 0.05)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_one_that_takes_no_time_of_a_cpu_is_ended_by_the_clock(process, monkeypatch):
    process.check(QUICK, SECONDS)
    first = process._process
    monkeypatch.setattr(check_process, "CLOCK_FACTOR", 0.01)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        process.check(SLOW, SECONDS)
    assert first.poll() == -signal.SIGKILL
    process.check(QUICK, SECONDS)


def test_one_that_is_the_end_of_its_process_is_refused(process):
    """By a stack overflow, or because it wants more memory than there may be."""
    process.check(QUICK, SECONDS)
    threading.Timer(0.05, process._process.kill).start()
    with pytest.raises(ConstraintInvalid, match="takes more than the compiler can do"):
        process.check(SLOW, SECONDS)
    process.check(QUICK, SECONDS)


def test_a_process_that_was_killed_meanwhile_is_started_anew(process):
    process.check(QUICK, SECONDS)
    process._process.kill()
    process._process.wait()
    process.check(QUICK, SECONDS)


def test_a_fault_of_the_checker_is_no_refusal(process):
    with pytest.raises(RuntimeError, match="AttributeError"):
        process.check("no constraint", SECONDS)
    process.check(QUICK, SECONDS)


def test_it_ends_with_its_parent_even_while_it_is_busy(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, threading\n"
        "from nanoserve.constraint.check_process import CheckProcess\n"
        "from test_check_process import BYTES, QUICK, SLOW\n"
        "process = CheckProcess(BYTES)\n"
        "process.check(QUICK, 20)\n"
        "process._pipe.send(SLOW)\n"
        "print(process._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline_s = time.monotonic() + SECONDS
    while is_running(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_go_first_where_the_cpus_are_busy(process):
    process.check(QUICK, SECONDS)
    niceness = os.getpriority(os.PRIO_PROCESS, process._process.pid)
    assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, 0) + check_process.NICENESS)
