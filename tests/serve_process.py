"""`nanoserve serve` as a user starts it: a process of its own, and a port that answers."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

NANOSERVE = str(Path(sys.executable).parent / "nanoserve")
START_S = 120


def free_port() -> int:
    """For an option that takes 0 for none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServeProcess:
    """A running server; its log lines are read as they come."""

    def __init__(self, *arguments: str, sabotage: str = "") -> None:
        """`sabotage`: Python that the process runs before anything else, for failures that no caller can provoke."""
        command = [NANOSERVE]
        if sabotage:
            command = [sys.executable, "-c", f"{sabotage}\nimport sys, nanoserve.cli\nsys.exit(nanoserve.cli.main())"]
        command += ["serve", "--grpc-port", "0", "--http-port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.log.append(line)
                self._news.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in the log, which may still be to come."""

        def find() -> re.Match[str] | None:
            return next((m for line in self.log if (m := re.search(pattern, line))), None)

        with self._news:
            assert self._news.wait_for(lambda: find() or not self._reader.is_alive(), START_S)
        match = find()
        assert match is not None, "".join(self.log)
        return match

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
        server.process.kill()
        server.process.wait()
        server._reader.join()
        assert server.process.stderr is not None
        server.process.stderr.close()


@contextlib.contextmanager
def serving(*arguments: str, sabotage: str = "") -> Iterator[ServeProcess]:
    """A server that is ready."""
    with starting(*arguments, sabotage=sabotage) as server:
        server.wait_until_ready()
        yield server
