"""The process that constraints are tried in, and the other end of its pipe.

    compile thread ── Constraint ──▶ ConstraintChecker ── CheckedConstraint, or ConstraintInvalid ──▶ compile thread

Trying a constraint takes as long as a caller makes it take, and as much memory, and may end the process that does it:
llguidance recurses as deep as definitions refer to each other. And what of it is Python's would make the step loop wait
for the interpreter before each kernel. So the engine's process only makes parsers of grammars that went well here.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as make_pipe
from typing import Any

from nanoserve.constraint.checker import CheckedConstraint, ConstraintChecker
from nanoserve.constraint.grammar import refusal
from nanoserve.constraint.vocabulary import Vocabulary
from nanoserve.errors import ConstraintInvalid
from nanoserve.request import Constraint

# Of address space: only what is used becomes memory. The deepest chain of definitions in 256 KiB takes about 40 MiB.
STACK_BYTES = 256 << 20
# Of the process.
MAX_MEMORY_BYTES = 4 << 30
# Steps go first where the CPUs are busy.
NICENESS = 10
# A process that gets so small a part of a CPU, or waits for something, is ended too.
CLOCK_FACTOR = 20
# It may take to end by itself.
ENDING_S = 0.2

Answer = CheckedConstraint | ConstraintInvalid | str


class CheckProcess:
    """Starts with the first constraint, anew after one that was its end, and ends with this process. One thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def check(self, constraint: Constraint, cpu_s: float) -> CheckedConstraint:
        """Raises ConstraintInvalid; RuntimeError for a fault of the checker; TimeoutError if it takes longer, of a
        CPU's time, or much longer by the clock.
        """
        if self._process is not None and self._process.poll() is not None:
            # It was killed while nobody used it.
            self._end()
        pipe = self._pipe or self._start()
        try:
            pipe.send((constraint, cpu_s))
            answer: Answer | None = pipe.recv() if pipe.poll(CLOCK_FACTOR * cpu_s) else None
        except (EOFError, OSError):
            if self._end() == -signal.SIGPROF:
                raise TimeoutError from None
            raise refusal(constraint, "takes more than the compiler can do; make it simpler") from None
        if answer is None:
            self._end()
            raise TimeoutError
        if isinstance(answer, ConstraintInvalid):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def _start(self) -> "Connection[Any, Any]":
        """Returns when it is ready."""
        self._pipe, theirs = make_pipe()
        with theirs:
            # Nor may what lies in the working directory stand for a module: -P.
            code = f"from nanoserve.constraint.check_process import main; main({theirs.fileno()})"
            command = [sys.executable, "-P", "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._pipe.send(self._vocabulary)
        assert self._pipe.recv() == "ready"
        return self._pipe

    def _end(self) -> int:
        """Returns its exit code."""
        assert self._process is not None
        assert self._pipe is not None
        self._pipe.close()
        # What has ended by itself, and closed its end of the pipe by that, may take a moment to be gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)
        self._process.kill()
        code = self._process.wait()
        self._process = self._pipe = None
        return code


# ------------------------------------------------------------------------------------------------- in the process


def main(fd: int) -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_answer, args=(Connection(fd),), daemon=True)
    thread.start()
    parent = os.getppid()
    # The pipe's end ends the thread, unless it is busy.
    while thread.is_alive() and os.getppid() == parent:
        thread.join(1.0)


def _answer(pipe: "Connection[Any, Any]") -> None:
    try:
        checker = ConstraintChecker(pipe.recv())
        pipe.send("ready")
        while True:
            constraint, cpu_s = pipe.recv()
            # When it is over, the system ends the process, by SIGPROF.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            answer = _check(checker, constraint)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(answer)
    except (EOFError, OSError):
        return  # the other end is gone


def _check(checker: ConstraintChecker, constraint: Constraint) -> Answer:
    try:
        return checker.check(constraint)
    except ConstraintInvalid as error:
        return error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
