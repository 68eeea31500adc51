"""HTTP/1.1 as a plain caller speaks it: JSON to and fro, and server-sent events."""

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    # By lower case name.
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextlib.contextmanager
def sending(
    port: int, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = ""
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request as it comes; the connection is closed at the end, whether or not all of it came.

    `body`: bytes, or what becomes JSON. `method`: by default GET without a body, POST with one.
    """
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers or {}))
        with connection.getresponse() as response:
            yield response


def send(port: int, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = "") -> Answer:
    """The whole answer; arguments as for `sending`."""
    with sending(port, path, body, headers, method) as response:
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The data of each server-sent event, from JSON, as it comes."""
    lines = []
    while line := response.readline().decode():
        if line == "\n":
            yield json.loads("\n".join(lines))
            lines = []
        else:
            assert line.startswith("data: "), line
            lines.append(line.removeprefix("data: ").removesuffix("\n"))
    assert not lines, "an event that does not end"
