"""The asyncio client: a thin shell that does the input and output; all else is shared with the synchronous client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from nanoserve_client import requests, transport
from nanoserve_client.errors import NanoserveError, from_status
from nanoserve_client.progress import Progress
from nanoserve_client.requests import ChatGenerateOptions, GenerateOptions, Messages, TokenizeOptions
from nanoserve_client.results import Delta, Model, Result, Started, Stats, TokenLogprob, Tokens
from nanoserve_client.transport import CallOptions, Envelope, Tls
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc, model_pb2, model_pb2_grpc
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.watching import EngineSnapshot, Timeline

_Response = TypeVar("_Response", bound=Message)


class AsyncClient:
    """Talks to a nanoserve server from one event loop: make it and use it while that loop runs.

        async with AsyncClient("127.0.0.1:50051") as client:
            async for delta in client.chat("What is paged attention?", max_tokens=200):
                print(delta.text, end="")

    Arguments, methods, results and errors are those of Client, which is the manual. `generate`, `chat`,
    `generate_raw` and `watch_engine` return their stream at once, without await; the other calls are awaited.
    """

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: Tls | None = None, retries: bool = True
    ) -> None:
        self._target = target
        self._api_key = api_key
        options = transport.channel_options(retries=retries)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, transport.credentials(tls), options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> "AsyncGenerateStream":
        """Complete a text as it stands, or token ids. See Client.generate."""
        request = requests.generate_request(prompt, options)
        return self.generate_raw(request, **requests.call_options(options))

    def chat(self, messages: Messages, **options: Unpack[ChatGenerateOptions]) -> "AsyncGenerateStream":
        """Answer a conversation, rendered with the model's chat template. See Client.chat."""
        request = requests.chat_request(messages, options)
        return self.generate_raw(request, **requests.call_options(options))

    def generate_raw(self, request: pb.GenerateRequest, **options: Unpack[CallOptions]) -> "AsyncGenerateStream":
        """Send a request as the contract has it. See Client.generate_raw."""
        call = transport.envelope(request, self._target, self._api_key, options)
        responses = self._generation.Generate(request, timeout=call.timeout, metadata=call.metadata)
        return AsyncGenerateStream(responses, Progress(call.request_id, call.span))

    async def tokenize(self, prompt: Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Token ids of a text, or of a conversation. See Client.tokenize."""
        request = requests.tokenize_request(prompt, options)
        response = await self._call(self._models.Tokenize, request, requests.call_options(options))
        return await asyncio.to_thread(Tokens.of, response)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        keep_special_tokens: bool = False,
        **options: Unpack[CallOptions],
    ) -> str:
        """Text of token ids. See Client.detokenize."""
        request = model_pb2.DetokenizeRequest(
            model=model or "", token_ids=token_ids, keep_special_tokens=keep_special_tokens
        )
        return (await self._call(self._models.Detokenize, request, options)).text

    async def list_models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The served models, in order of their names."""
        response = await self._call(self._models.ListModels, model_pb2.ListModelsRequest(), options)
        return [Model.of(model) for model in response.models]

    async def cancel(self, request_id: str, /, **options: Unpack[CallOptions]) -> int:
        """End every request with this id, anyone's. See Client.cancel."""
        request = admin_pb2.CancelRequest(request_id=request_id)
        return (await self._call(self._admin.Cancel, request, options)).cancelled

    async def reset_cache(self, **options: Unpack[CallOptions]) -> int:
        """Forget every cached prefix that no running sequence uses. See Client.reset_cache."""
        request = admin_pb2.ResetCacheRequest()
        return (await self._call(self._admin.ResetCache, request, options)).freed_blocks

    async def get_stats(self, **options: Unpack[CallOptions]) -> Stats:
        """A snapshot of scheduler and cache. For operators."""
        request = admin_pb2.GetStatsRequest()
        return Stats.of(await self._call(self._admin.GetStats, request, options))

    def watch_engine(self, *, interval: float | None = None, **options: Unpack[CallOptions]) -> "AsyncEngineWatch":
        """Snapshots of the engine, one an interval. See Client.watch_engine."""
        request = requests.watch_request(interval)
        call = transport.envelope(request, self._target, self._api_key, options)
        responses = self._admin.WatchEngine(request, timeout=call.timeout, metadata=call.metadata)
        return AsyncEngineWatch(responses, call)

    async def explain_request(self, request_id: str, /, **options: Unpack[CallOptions]) -> list[Timeline]:
        """What happened to the requests with this id. See Client.explain_request."""
        request = admin_pb2.ExplainRequestRequest(request_id=request_id)
        response = await self._call(self._admin.ExplainRequest, request, options)
        return [Timeline.of(each) for each in response.timelines]

    async def close(self) -> None:
        """Close the connection, for good. Calls that are running end with Cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self,
        method: Callable[..., Awaitable[_Response]],
        request: Message,
        options: CallOptions,
    ) -> _Response:
        call = transport.envelope(request, self._target, self._api_key, options)
        try:
            response = await method(request, timeout=call.timeout, metadata=call.metadata)
        except grpc.aio.AioRpcError as error:
            call.span.end(error.code())
            raise from_status(error.code(), error.details(), error.trailing_metadata(), call.request_id) from error
        call.span.end(grpc.StatusCode.OK)
        return response


class AsyncGenerateStream(AsyncIterator[Delta]):
    """The deltas of one request, as they come. For one reader.

    Leaving the `async with` block, cancelling the task that reads, or dropping the last reference cancels a request
    that is not finished. The methods are those of GenerateStream.
    """

    def __init__(
        self,
        responses: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse],
        progress: Progress,
    ) -> None:
        self._call = responses
        self._responses = aiter(responses)
        self._progress = progress

    @property
    def started(self) -> Started | None:
        """What the server said when it began to run the request; None until the first delta was read."""
        return self._progress.started

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Of the prompt's tokens, if they were asked for: all of them once the first delta was read."""
        return self._progress.prompt_logprobs

    async def start(self) -> Started:
        """Wait until the server begins to run the request. Raises as reading does, if the server refuses it."""
        while self._progress.started is None and (response := await self._read()) is not None:
            self._progress.take(response)
        assert self._progress.started is not None, "a stream that ends well has begun"
        return self._progress.started

    async def __anext__(self) -> Delta:
        """The next delta. Raises as GenerateStream does."""
        while (response := await self._read()) is not None:
            if (delta := self._progress.take(response)) is not None:
                return delta
        raise StopAsyncIteration

    async def result(self) -> Result:
        """Read to the end, and return all that the stream said, the deltas that were read before too."""
        async for _ in self:
            pass
        return self._progress.result()

    def cancel(self) -> None:
        """End the request, unless it has ended. Reading on raises Cancelled."""
        self._call.cancel()
        self._progress.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _read(self) -> pb.GenerateResponse | None:
        """The next event; None at the end of a stream that ended well."""
        try:
            return await anext(self._responses)
        except StopAsyncIteration:
            self._progress.end()
            return None
        except grpc.aio.AioRpcError as error:
            raise self._progress.fail(error.code(), error.details(), error.trailing_metadata()) from error
        except asyncio.CancelledError:
            if _is_own_cancellation():
                raise
            raise self._progress.fail(
                await self._call.code(),
                await self._call.details(),
                await self._call.trailing_metadata(),
            ) from None


class AsyncEngineWatch(AsyncIterator[EngineSnapshot]):
    """Snapshots as they come. For one reader. The methods are those of EngineWatch.

    Leaving the `async with` block, cancelling the task that reads, or dropping the last reference ends the watch.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[admin_pb2.WatchEngineRequest, admin_pb2.WatchEngineResponse],
        envelope: Envelope,
    ) -> None:
        self._call = call
        self._responses = aiter(call)
        self._envelope = envelope

    async def __anext__(self) -> EngineSnapshot:
        """The next snapshot. Raises as EngineWatch does."""
        try:
            return EngineSnapshot.of(await anext(self._responses))
        except grpc.aio.AioRpcError as error:
            raise await self._failure() from error
        except asyncio.CancelledError:
            if _is_own_cancellation():
                raise
            raise await self._failure() from None

    async def _failure(self) -> NanoserveError:
        code, details = await self._call.code(), await self._call.details()
        self._envelope.span.end(code)
        return from_status(code, details, await self._call.trailing_metadata(), self._envelope.request_id)

    def cancel(self) -> None:
        """End the watch. Reading on raises Cancelled."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


def _is_own_cancellation() -> bool:
    """Whether it is the task that was cancelled: gRPC raises CancelledError for a call with status CANCELLED too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
