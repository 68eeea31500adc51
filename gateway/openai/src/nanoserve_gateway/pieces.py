"""Large JSON, written in pieces, on a thread. One call for millions of values would hold the interpreter, and with it
every stream, for half a second. Pure."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pydantic_core

# What one call writes: about a millisecond's work.
VALUES = 10_000
CHARS = 2**20
# Between two pieces. However short, it hands the interpreter to the event loop, which would else wait for 5 ms.
PAUSE_S = 0.0001


def array(values: Sequence[Any], convert: Callable[[Any], Any] | None = None) -> bytes:
    """convert: what is written for a value; None = itself."""
    pieces = _cut(values, VALUES)
    if convert is not None:
        pieces = ([convert(value) for value in piece] for piece in pieces)
    return b"[%b]" % b",".join(pydantic_core.to_json(piece)[1:-1] for piece in pieces)


def text(value: str) -> bytes:
    return b'"%b"' % b"".join(pydantic_core.to_json(piece)[1:-1] for piece in _cut(value, CHARS))


def of_members(members: Mapping[str, bytes]) -> bytes:
    """An object. members: each value as JSON."""
    return b"{%b}" % b",".join(b"%b:%b" % (pydantic_core.to_json(name), value) for name, value in members.items())


def _cut(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
        time.sleep(PAUSE_S)
