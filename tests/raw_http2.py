"""Just enough HTTP/2 to see what gRPC libraries hide: which frames a server answers with."""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
CANCEL = 8


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


class RawConnection:
    """A plain-text connection; every frame the server sends is in `frames`. Event loop thread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.frames: list[Frame] = []
        self._next_stream = 1

    @classmethod
    async def open(cls, port: int) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b""))
        return cls(reader, writer)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def call(self, method: str, message: bytes, **headers: str) -> int:
        """Send a whole request; returns its stream."""
        stream = self._next_stream
        self._next_stream += 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        block = b"".join(b"\0" + _text(k) + _text(v) for k, v in fields.items())
        body = struct.pack(">BI", 0, len(message)) + message
        self._writer.write(_frame(HEADERS, END_HEADERS, stream, block))
        self._writer.write(_frame(DATA, END_STREAM, stream, body))
        return stream

    def reset(self, stream: int) -> None:
        """Cancel a call."""
        self._writer.write(_frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4)))

    def widen(self, stream: int) -> None:
        """Let the server send all it has; before, it may send 64 KiB."""
        for each in (0, stream):
            self._writer.write(_frame(WINDOW_UPDATE, 0, each, (1 << 30).to_bytes(4)))

    def ping(self) -> None:
        self._writer.write(_frame(PING, 0, 0, b"nanoping"))

    async def read_until(self, is_last: Callable[[Frame], bool]) -> Frame:
        """Read frames up to one for which is_last() holds, answering the server's settings and pings."""
        async with asyncio.timeout(20):
            while True:
                frame = await self._read()
                self.frames.append(frame)
                if frame.kind in (SETTINGS, PING) and not frame.flags & ACK:
                    payload = frame.payload if frame.kind == PING else b""
                    self._writer.write(_frame(frame.kind, ACK, 0, payload))
                if is_last(frame):
                    return frame

    async def answer(self, stream: int) -> list[Frame]:
        """All frames of the stream, to its end."""
        await self.read_until(lambda f: f.stream == stream and (f.kind == RST_STREAM or bool(f.flags & END_STREAM)))
        return [f for f in self.frames if f.stream == stream and f.kind in (HEADERS, DATA)]

    async def _read(self) -> Frame:
        head = await self._reader.readexactly(9)
        length = int.from_bytes(head[:3])
        stream = int.from_bytes(head[5:])
        return Frame(head[3], head[4], stream, await self._reader.readexactly(length))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _text(value: str) -> bytes:
    """A string in HPACK, without Huffman coding; lengths below 127 are one byte."""
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()
