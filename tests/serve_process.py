"""`nanoserve serve` as a user starts it: a process of its own, and a port that answers."""

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from logged_process import START_S, LoggedProcess

NANOSERVE = str(Path(sys.executable).parent / "nanoserve")


class ServeProcess(LoggedProcess):
    """A running server."""

    def __init__(self, *arguments: str, sabotage: str = "") -> None:
        """`sabotage`: Python that the process runs before anything else, for failures that no caller can provoke."""
        command = [NANOSERVE]
        if sabotage:
            command = [sys.executable, "-c", f"{sabotage}\nimport sys, nanoserve.cli\nsys.exit(nanoserve.cli.main())"]
        super().__init__([*command, "serve", "--grpc-port", "0", *arguments])

    @property
    def address(self) -> str:
        return self.wait_for(r"listening on (\S+:\d+)")[1]

    def wait_until_ready(self) -> None:
        self.wait_for("ready after")

    def peak_bytes(self) -> int:
        """The most memory that it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)


@contextlib.contextmanager
def starting(*arguments: str, sabotage: str = "") -> Iterator[ServeProcess]:
    """A server that is about to start; ended whatever happens."""
    server = ServeProcess(*arguments, sabotage=sabotage)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def serving(*arguments: str, sabotage: str = "") -> Iterator[ServeProcess]:
    """A server that is ready."""
    with starting(*arguments, sabotage=sabotage) as server:
        server.wait_until_ready()
        yield server
