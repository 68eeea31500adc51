"""The command as people start it: in a process of its own, through pipes or on a pseudo-terminal."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from serve_process import NANOSERVE

WAIT_S = 60
# Makes its terminal the one that Ctrl-C is sent through, heeds Ctrl-C even if the tests were started without that, as
# shells do in the background, and becomes the command.
ON_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    " signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


class PseudoTerminal:
    """A command whose input and output are a terminal; what it writes is read when it is waited for."""

    def __init__(self, *arguments, home, variables=None):
        self._master, slave = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "TERM": "xterm", "COLUMNS": "200", **(variables or {})}
        command = [sys.executable, "-c", ON_TERMINAL, NANOSERVE, *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.output = ""

    def type(self, text):
        os.write(self._master, text.encode())

    def has(self, text, within_s):
        """Read until it comes, or the time is over."""
        deadline = time.monotonic() + within_s
        while text not in self.output:
            if not select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            try:
                self.output += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended without {text!r}: {self.output}") from None
        return True

    def wait_for(self, text):
        """Read until it comes; returns all that was read, and what follows is for the next call."""
        assert self.has(text, WAIT_S), self.output
        before, _, self.output = self.output.partition(text)
        return before + text

    def wait_for_exit(self):
        """The exit code; what it still writes is thrown away."""
        with contextlib.suppress(OSError):
            while os.read(self._master, 4096):
                pass
        return self.process.wait(WAIT_S)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def on_terminal(tmp_path):
    """Starts the command on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, variables=None):
            terminal = PseudoTerminal(*arguments, home=tmp_path, variables=variables)
            stack.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def command(tmp_path):
    """Runs the command to its end, with pipes."""

    def run(*arguments, stdin="", variables=None, **options):
        return subprocess.run(
            [NANOSERVE, *arguments],
            input=stdin,
            env={**os.environ, "HOME": str(tmp_path), **(variables or {})},
            text=True,
            check=False,
            timeout=WAIT_S,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    return run


@pytest.fixture(scope="session")
def target(served):
    """The server's address."""
    return served.address
