"""Answers on their way: several Generate streams as one, frames with signs of life, and callers who go away."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

from nanoserve_client import AsyncGenerateStream, Delta, NanoserveError, Result, Started
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoserve_gateway.answer import Answer
from nanoserve_gateway.errors import problem_of

# A comment, which every reader of server-sent events skips; proxies see that the connection lives.
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_T = TypeVar("_T")


class Generation:
    """The Generate streams of one answer, one for each prompt. Leaving the block cancels what has not ended."""

    def __init__(self, streams: Sequence[AsyncGenerateStream]) -> None:
        self._streams = streams

    async def start(self) -> list[Started]:
        """Wait until all have begun, so that a refusal of any is the answer's. Raises NanoserveError."""
        return await _all([stream.start() for stream in self._streams])

    async def results(self) -> list[Result]:
        """Raises NanoserveError."""
        return await _all([stream.result() for stream in self._streams])

    async def deltas(self, silence_s: float) -> AsyncGenerator[tuple[int, Delta] | None, None]:
        """(prompt, delta) as they come, and None for every silence of that length.

        Raises NanoserveError, of the first that fails.
        """
        # Of one, so that a slow reader is felt by the server, which then joins deltas.
        news: asyncio.Queue[tuple[int, Delta] | NanoserveError | None] = asyncio.Queue(1)

        async def read(prompt: int, stream: AsyncGenerateStream) -> None:
            try:
                async for delta in stream:
                    await news.put((prompt, delta))
                await news.put(None)
            except NanoserveError as error:
                await news.put(error)

        tasks = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(self._streams)]
        async with _cancelled_at_end(tasks):
            num_running = len(tasks)
            while num_running:
                try:
                    async with asyncio.timeout(silence_s):
                        item = await news.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(item, NanoserveError):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()


async def frames(
    generation: Generation, answer: Answer, starts: Sequence[Started], silence_s: float
) -> AsyncGenerator[bytes, None]:
    """The body of a streamed answer whose generation has started."""
    with generation:
        yield b"".join(answer.begin(starts))
        try:
            async with contextlib.aclosing(generation.deltas(silence_s)) as deltas:
                async for item in deltas:
                    if item is None:
                        yield KEEP_ALIVE
                    elif piece := b"".join(answer.delta(*item)):
                        yield piece
            yield b"".join(answer.end(await generation.results()))
        except NanoserveError as error:
            yield b"".join(answer.fail(problem_of(error, answer.names)))


class EventStream(Response):
    """A body that comes in frames, and ends when its reader goes away."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        self._frames = body
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **headers})
        del self.headers["content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._frames):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._frames:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What the work returns; None, and the work is cancelled, if the caller goes away before. The request's body has
    been read."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    async with _cancelled_at_end([working, leaving]):
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _cancelled_at_end(tasks: Sequence["asyncio.Task[Any]"]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results; the first failure as it is, without those of the others."""
    tasks = [asyncio.create_task(each) for each in work]
    async with _cancelled_at_end(tasks):
        return await asyncio.gather(*tasks)
