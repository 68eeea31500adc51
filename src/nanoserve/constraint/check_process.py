"""The process that constraints are tried in, and the other end of its pipe.

    compile thread ── Constraint ──▶ ConstraintChecker ── CheckedConstraint, or ConstraintInvalid ──▶ compile thread

Trying a constraint takes as long as a caller makes it take, and as much memory, and may end the process that does it:
llguidance recurses as deep as definitions refer to each other. And what of it is Python's would make the step loop wait
for the interpreter before each kernel. So the engine's process only makes parsers of grammars that went well here.
"""

import os
import resource
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

Answer = CheckedConstraint | ConstraintInvalid | str


class CheckProcess:
    """Starts with the first constraint, anew after one that was its end, and ends with this process. One thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def check(self, constraint: Constraint, timeout_s: float) -> CheckedConstraint:
        """Raises ConstraintInvalid; TimeoutError if it takes longer; RuntimeError for a fault of the checker."""
        if self._process is not None and self._process.poll() is not None:
            # It was killed while nobody used it.
            self._end()
        pipe = self._pipe or self._start()
        try:
            pipe.send(constraint)
            answer: Answer | None = pipe.recv() if pipe.poll(timeout_s) else None
        except (EOFError, OSError):
            self._end()
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

    def _end(self) -> None:
        assert self._process is not None
        assert self._pipe is not None
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._process = self._pipe = None


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
            pipe.send(_check(checker, pipe.recv()))
    except (EOFError, OSError):
        return  # the other end is gone


def _check(checker: ConstraintChecker, constraint: Constraint) -> Answer:
    try:
        return checker.check(constraint)
    except ConstraintInvalid as error:
        return error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
