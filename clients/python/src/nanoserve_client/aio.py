"""The asyncio client: a thin shell that waits; all else is shared with the synchronous client, in calls.py."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from nanoserve_client.calls import Account, Calls, GenerateReading, Reading, Unary
from nanoserve_client.progress import Progress
from nanoserve_client.requests import CheckOptions, Messages, TokenizeOptions
from nanoserve_client.results import Adapter, Adapters, ConstraintCheck, Delta, Model, Result, Started, Stats, Tokens
from nanoserve_client.transport import CallOptions, Envelope
from nanoserve_client.v1 import admin_pb2
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.watching import EngineSnapshot, Timeline

_Answer = TypeVar("_Answer")
_Response = TypeVar("_Response")

# A larger response is read on a thread, so that other calls go on.
LARGE_RESPONSE_BYTES = 64 * 1024


class AsyncClient(Calls["AsyncGenerateStream", "AsyncEngineWatch"]):
    """Talks to a nanoserve server from one event loop: make it and use it while that loop runs.

        async with AsyncClient("127.0.0.1:50051") as client:
            async for delta in client.chat("What is paged attention?", max_tokens=200):
                print(delta.text, end="")

    Arguments, methods, results and errors are those of Client, which is the manual. `generate`, `chat`,
    `generate_raw` and `watch_engine` return their stream at once, without await; the other calls are awaited.
    """

    async def tokenize(self, prompt: Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Token ids of a text, or of a conversation. See Client.tokenize."""
        return await _wait(self._tokenize(prompt, options))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        keep_special_tokens: bool = False,
        **options: Unpack[CallOptions],
    ) -> str:
        """Text of token ids. See Client.detokenize."""
        return await _wait(self._detokenize(token_ids, model, keep_special_tokens, options))

    async def check_constraint(self, **options: Unpack[CheckOptions]) -> ConstraintCheck:
        """What would be enforced of a constraint. See Client.check_constraint."""
        return await _wait(self._check_constraint(options))

    async def list_models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The served model, and behind it its adapters, in order of their names."""
        return await _wait(self._list_models(options))

    async def cancel(self, request_id: str, /, **options: Unpack[CallOptions]) -> int:
        """End every request with this id, anyone's. See Client.cancel."""
        return await _wait(self._cancel(request_id, options))

    async def reset_cache(self, **options: Unpack[CallOptions]) -> int:
        """Forget every cached prefix that no running sequence uses. See Client.reset_cache."""
        return await _wait(self._reset_cache(options))

    async def get_stats(self, **options: Unpack[CallOptions]) -> Stats:
        """A snapshot of scheduler and cache. For operators."""
        return await _wait(self._get_stats(options))

    async def explain_request(self, request_id: str, /, **options: Unpack[CallOptions]) -> list[Timeline]:
        """What happened to the requests with this id. See Client.explain_request."""
        return await _wait(self._explain_request(request_id, options))

    async def load_adapter(
        self,
        name: str,
        /,
        path: str = "",
        *,
        pinned: bool = False,
        replace: bool = False,
        **options: Unpack[CallOptions],
    ) -> Adapter:
        """Read a LoRA adapter, check it whole, and serve it under a name. See Client.load_adapter."""
        return await _wait(self._load_adapter(name, path, pinned, replace, options))

    async def unload_adapter(
        self, name: str, /, *, drain_timeout: float | None = None, **options: Unpack[CallOptions]
    ) -> None:
        """Stop to serve an adapter, and free its memory. See Client.unload_adapter."""
        await _wait(self._unload_adapter(name, drain_timeout, options))

    async def list_adapters(self, **options: Unpack[CallOptions]) -> Adapters:
        """The adapters that were loaded. See Client.list_adapters."""
        return await _wait(self._list_adapters(options))

    async def close(self) -> None:
        """Close the connection, for good. Calls that are running end with Cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _open(self, target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(target, options)
        return grpc.aio.secure_channel(target, credentials, options)

    def _stream(self, responses: Any, progress: Progress) -> "AsyncGenerateStream":
        return AsyncGenerateStream(responses, progress)

    def _watch(self, responses: Any, envelope: Envelope) -> "AsyncEngineWatch":
        return AsyncEngineWatch(responses, envelope)


async def _wait(call: Unary[_Answer]) -> _Answer:
    try:
        response = await call.send()
    except grpc.aio.AioRpcError as error:
        raise call.envelope.fail(error.code(), error.details(), error.trailing_metadata()) from error
    call.envelope.end()
    if response.ByteSize() < LARGE_RESPONSE_BYTES:
        return call.read(response)
    return await asyncio.to_thread(call.read, response)


class _Stream(Reading, Generic[_Response]):
    """Reads by await."""

    def __init__(self, responses: Any, account: Account) -> None:
        super().__init__(responses, account)
        self._iterator = aiter(responses)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def _read(self) -> _Response | None:
        """The next response; None at the end of a stream that ended well."""
        try:
            response: _Response = await anext(self._iterator)
        except StopAsyncIteration:
            self._account.end()
            return None
        except grpc.aio.AioRpcError as error:
            raise self._account.fail(error.code(), error.details(), error.trailing_metadata()) from error
        except asyncio.CancelledError:
            if _is_own_cancellation():
                raise
            call = self._responses
            status = await call.code(), await call.details(), await call.trailing_metadata()
            raise self._account.fail(*status) from None
        return response


class AsyncGenerateStream(_Stream[pb.GenerateResponse], GenerateReading, AsyncIterator[Delta]):
    """The deltas of one request, as they come. For one reader.

    Leaving the `async with` block, cancelling the task that reads, or dropping the last reference cancels a request
    that is not finished. The methods are those of GenerateStream.
    """

    async def start(self) -> Started:
        """Wait until the server begins to run the request. Raises as reading does, if the server refuses it."""
        while self.started is None and (response := await self._read()) is not None:
            self._account.take(response)
        assert self.started is not None, "a stream that ends well has begun"
        return self.started

    async def __anext__(self) -> Delta:
        """The next delta. Raises as GenerateStream does."""
        while (response := await self._read()) is not None:
            if (delta := self._account.take(response)) is not None:
                return delta
        raise StopAsyncIteration

    async def result(self) -> Result:
        """Read to the end, and return all that the stream said, the deltas that were read before too."""
        async for _ in self:
            pass
        return self._account.result()


class AsyncEngineWatch(_Stream[admin_pb2.WatchEngineResponse], AsyncIterator[EngineSnapshot]):
    """Snapshots as they come. For one reader. The methods are those of EngineWatch.

    Leaving the `async with` block, cancelling the task that reads, or dropping the last reference ends the watch.
    """

    async def __anext__(self) -> EngineSnapshot:
        """The next snapshot. Raises as EngineWatch does."""
        if (response := await self._read()) is None:
            raise StopAsyncIteration
        return EngineSnapshot.of(response)


def _is_own_cancellation() -> bool:
    """Whether it is the task that was cancelled: gRPC raises CancelledError for a call with status CANCELLED too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
