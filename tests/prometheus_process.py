"""The Prometheus of Debian's package, as tools/fetch_prometheus.py gets it, with deploy/prometheus.yml."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from logged_process import LoggedProcess
from serve_process import free_port

DEPLOY = Path(__file__).parent.parent / "deploy"
BIN = Path(sys.executable).parent
ANSWER_S = 60


def program(name: str) -> str:
    """Path of prometheus or promtool. Skips the test where it cannot be had."""
    path = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not here: tools/fetch_prometheus.py, or a package of the system, installs it")
    return path


def promtool(*arguments: str | Path) -> str:
    """What it prints. Fails the test if it finds something wrong."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


class Prometheus(LoggedProcess):
    """A running one, which asks one server every 200 ms."""

    def __init__(self, target: str, folder: Path) -> None:
        configuration = (DEPLOY / "prometheus.yml").read_text()
        for before, after in (("nanoserve:8000", target), ("scrape_interval: 5s", "scrape_interval: 200ms")):
            assert before in configuration
            configuration = configuration.replace(before, after)
        (folder / "prometheus.yml").write_text(configuration)
        shutil.copy(DEPLOY / "alerts.yml", folder)
        self._address = f"127.0.0.1:{free_port()}"
        command = [program("prometheus"), f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self._address}"]
        super().__init__(command)
        self.wait_for("Server is ready to receive web requests")

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Values of an instant vector by its labels' values, in order of the labels' names."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as response:
            found = json.load(response)["data"]["result"]
        return {tuple(value for _, value in sorted(each["metric"].items())): float(each["value"][1]) for each in found}

    def wait_for_value(self, expression: str, expected: dict[tuple[str, ...], float]) -> None:
        """It may take a scrape or two."""
        deadline_s = time.monotonic() + ANSWER_S
        while (found := self.query(expression)) != expected:
            assert time.monotonic() < deadline_s, f"{expression}: {found}, not {expected}"
            time.sleep(0.1)


@contextlib.contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    prometheus = Prometheus(target, folder)
    try:
        yield prometheus
    finally:
        prometheus.kill()
