"""Answers on their way: several Generate streams as one, frames with signs of life, and callers who go away."""

import abc
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar

from nanoserve_client import AsyncGenerateStream, Delta, NanoserveError, Result, Started
from nanoserve_client.transport import REQUEST_ID_HEADER
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoserve_gateway.answer import Answer, Prompt
from nanoserve_gateway.errors import problem_of

# A comment, which every reader of server-sent events skips; proxies see that the connection lives.
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_T = TypeVar("_T")


class Generation:
    """The Generate streams of one answer, one for each prompt. Leaving the block cancels what has not ended."""

    def __init__(self, streams: Sequence[AsyncGenerateStream], prompts: Sequence[Prompt] = ()) -> None:
        """prompts: those to note the log-probabilities of, if the answer tells them as it grows."""
        self._streams = streams
        self._prompts = prompts
        # The number of the prompt that was refused, or failed, before all others.
        self.failed_prompt: int | None = None

    async def start(self) -> list[Started]:
        """Wait until all have begun, so that a refusal of any is the answer's. Raises NanoserveError."""
        return await self._all(stream.start() for stream in self._streams)

    async def results(self) -> list[Result]:
        """Raises NanoserveError."""
        return await self._all(stream.result() for stream in self._streams)

    async def read(self, take: Callable[[int, Delta], Awaitable[None]]) -> list[Result]:
        """Hand over each (prompt, delta) as it comes. The next one is read when it is taken, so that a slow reader is
        felt by the server, which then joins deltas.

        Raises NanoserveError, of the first that fails.
        """

        async def read_one(prompt: int, stream: AsyncGenerateStream) -> Result:
            async for delta in stream:
                if self._prompts:
                    self._prompts[prompt].logprobs = stream.prompt_logprobs
                await take(prompt, delta)
            return await stream.result()

        return await self._all(read_one(prompt, stream) for prompt, stream in enumerate(self._streams))

    async def _all(self, work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
        """Of each prompt."""

        async def one(prompt: int, each: Coroutine[Any, Any, _T]) -> _T:
            try:
                return await each
            except NanoserveError:
                self.failed_prompt = prompt if self.failed_prompt is None else self.failed_prompt
                raise

        return await all_of([one(prompt, each) for prompt, each in enumerate(work)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()


# Sends a piece of a body.
Write = Callable[[bytes], Awaitable[None]]


class Events(Response, abc.ABC):
    """An answer of server-sent events; ends when its reader goes away."""

    media_type = "text/event-stream"

    def __init__(self, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """headers: besides those of every such answer."""
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **headers})
        del self.headers["content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async def write(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        with contextlib.suppress(ClientDisconnect):
            async with unless_gone(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self.write_all(write)
                await send({"type": "http.response.body", "body": b""})

    @abc.abstractmethod
    async def write_all(self, write: Write) -> None:
        """Write every event."""


class EventStream(Events):
    """A streamed answer whose generation has started."""

    def __init__(self, generation: Generation, answer: Answer, starts: Sequence[Started], silence_s: float) -> None:
        """silence_s: after so long without a frame comes a sign of life."""
        super().__init__({REQUEST_ID_HEADER: starts[0].request_id})
        self._generation, self._answer, self._starts = generation, answer, starts
        self._silence_s = silence_s
        self._written_s = 0.0
        # Frames come from every prompt, and signs of life.
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation:
            await super().__call__(scope, receive, send)

    async def write_all(self, write: Write) -> None:
        async def put(pieces: Iterable[bytes]) -> None:
            if piece := b"".join(pieces):
                async with self._writing:
                    await write(piece)
                self._written_s = time.monotonic()

        self._written_s = time.monotonic()
        await put(self._answer.begin(self._starts))
        async with _cancelled_at_end([asyncio.create_task(self._keep_alive(put))]):
            try:
                results = await self._generation.read(lambda *delta: put(self._answer.delta(*delta)))
                last = self._answer.end(results)
            except NanoserveError as error:
                last = self._answer.fail(problem_of(error, self._answer.names))
        await put(last)

    async def _keep_alive(self, put: Callable[[Iterable[bytes]], Awaitable[None]]) -> None:
        while True:
            if (rest_s := self._written_s + self._silence_s - time.monotonic()) > 0:
                await asyncio.sleep(rest_s)
            else:
                await put([KEEP_ALIVE])


@contextlib.asynccontextmanager
async def unless_gone(receive: Receive) -> AsyncIterator[None]:
    """The block ends with ClientDisconnect, and what it awaits is cancelled, when the caller goes away. The request's
    body has been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with until(gone):
        yield
        return
    raise ClientDisconnect


@contextlib.asynccontextmanager
async def until(end: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """The block ends at the latest when `end` returns; what it awaits then is cancelled."""

    async def watch() -> None:
        await end()
        patience.reschedule(0)  # at once

    try:
        async with asyncio.timeout(None) as patience, _cancelled_at_end([asyncio.create_task(watch())]):
            yield
    except TimeoutError:
        if not patience.expired():
            raise


@contextlib.asynccontextmanager
async def _cancelled_at_end(tasks: Sequence["asyncio.Task[Any]"]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results; the first failure as it is, without those of the others."""
    tasks = [asyncio.create_task(each) for each in work]
    async with _cancelled_at_end(tasks):
        return await asyncio.gather(*tasks)
