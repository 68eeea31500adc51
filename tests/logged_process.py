"""A process that a test starts, whose log lines are read as they come."""

import re
import subprocess
import threading
from pathlib import Path

START_S = 120


class LoggedProcess:
    """A running process; both of its outputs are one log."""

    def __init__(self, command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.log: list[str] = []
        self._is_over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.log.append(line)
                self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in the log, which may still be to come."""

        def find() -> re.Match[str] | None:
            return next((m for line in self.log if (m := re.search(pattern, line))), None)

        with self._news:
            assert self._news.wait_for(lambda: find() or self._is_over, START_S), pattern
        match = find()
        assert match is not None, "".join(self.log)
        return match

    def kill(self) -> None:
        """End it at once, if it has not ended, and close its log."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
