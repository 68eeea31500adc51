"""`nanoserve serve` as a user starts it: a process of its own, and a port that answers."""

import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
from logged_process import START_S, LoggedProcess

NANOSERVE = str(Path(sys.executable).parent / "nanoserve")


def free_port() -> int:
    """For an option that takes 0 for none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_gone(pid: int) -> bool:
    """Or a zombie, which is what stays of an orphan until whoever adopted it takes notice."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


class ServeProcess(LoggedProcess):
    """A running server."""

    def __init__(self, *arguments: str, sabotage: str = "", variables: Mapping[str, str] | None = None) -> None:
        """`variables`: of the environment. `sabotage`: Python that the server and its engine's process run before
        anything else, for failures that no caller can provoke.
        """
        # Python itself imports a module of this name at its start.
        self._sabotage = tempfile.TemporaryDirectory()
        (Path(self._sabotage.name) / "sitecustomize.py").write_text(sabotage)
        command = [NANOSERVE, "serve", "--grpc-port", "0", "--http-port", "0", *arguments]
        # Behind it what the tests themselves import from.
        path = os.pathsep.join(filter(None, [self._sabotage.name, os.environ.get("PYTHONPATH")]))
        super().__init__(command, environment={**os.environ, **(variables or {}), "PYTHONPATH": path})

    @property
    def address(self) -> str:
        return self.wait_for(r"listening on (\S+:\d+)")[1]

    @property
    def url(self) -> str:
        """Of HTTP, without a path; for a server that has an `--http-port`."""
        return self.wait_for(r"OpenAI +(http://\S+)/v1")[1]

    def wait_until_ready(self) -> None:
        self.wait_for("ready after")

    def wait_until_ready_over_http(self) -> None:
        """The gateway follows the engine with a delay."""
        deadline_s = time.monotonic() + START_S
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    @property
    def engine_pid(self) -> int:
        """Of the engine's process, which is about to start, or has."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            # A child is of the thread that started it.
            for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
                if pids := children.read_text().split():
                    return int(pids[0])
            time.sleep(0.01)
        raise AssertionError("there is no engine process")

    def peak_bytes(self) -> int:
        """The most memory that it and its engine's process have had, each."""
        total = 0
        for pid in (self.process.pid, self.engine_pid):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            assert found is not None
            total += int(found[1]) * 1024
        return total

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def kill(self) -> None:
        super().kill()
        self._sabotage.cleanup()


@contextlib.contextmanager
def starting(*arguments: str, sabotage: str = "", variables: Mapping[str, str] | None = None) -> Iterator[ServeProcess]:
    """A server that is about to start; ended whatever happens."""
    server = ServeProcess(*arguments, sabotage=sabotage, variables=variables)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def serving(*arguments: str, sabotage: str = "", variables: Mapping[str, str] | None = None) -> Iterator[ServeProcess]:
    """A server that is ready."""
    with starting(*arguments, sabotage=sabotage, variables=variables) as server:
        server.wait_until_ready()
        yield server
