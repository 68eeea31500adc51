"""Streams that go on without a reader: what was sent is kept, for readers who come later, or come back."""

import asyncio
from collections.abc import Iterable

from nanoserve_gateway.streaming import KEEP_ALIVE, Events, Write


class Recording:
    """The frames of one stream as they come. Event loop thread."""

    def __init__(self) -> None:
        # The place of a frame is its event's sequence number.
        self.frames: list[bytes] = []
        self.num_bytes = 0
        self.is_over = False
        self._changed = asyncio.Event()

    def write(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self.frames.append(frame)
            self.num_bytes += len(frame)
        self._wake()

    def end(self) -> None:
        self.is_over = True
        self._wake()

    async def wait(self, start: int) -> None:
        """Until there is a frame at this place, or no more will come."""
        while len(self.frames) <= start and not self.is_over:
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class RecordedStream(Events):
    """A recording from some place on. Its reader may go away; the recording goes on."""

    def __init__(self, recording: Recording, start: int, silence_s: float) -> None:
        """silence_s: after so long without a frame comes a sign of life."""
        super().__init__()
        self._recording, self._start, self._silence_s = recording, start, silence_s

    async def write_all(self, write: Write) -> None:
        recording, start = self._recording, self._start
        while start < len(recording.frames) or not recording.is_over:
            try:
                async with asyncio.timeout(self._silence_s):
                    await recording.wait(start)
            except TimeoutError:
                piece = KEEP_ALIVE
            else:
                piece = b"".join(recording.frames[start:])
                start = max(start, len(recording.frames))
            await write(piece)
