"""The synchronous client: a thin shell that does the input and output; all else is shared with the asyncio client."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.message import Message

from nanoserve_client import requests, transport
from nanoserve_client.errors import from_status
from nanoserve_client.progress import Progress
from nanoserve_client.requests import ChatGenerateOptions, GenerateOptions, Messages, TokenizeOptions
from nanoserve_client.results import Delta, Model, Result, Started, Stats, TokenLogprob, Tokens
from nanoserve_client.transport import CallOptions, Envelope, Tls
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc, model_pb2, model_pb2_grpc
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.watching import EngineSnapshot, Timeline

_Response = TypeVar("_Response", bound=Message)


class Client:
    """Talks to a nanoserve server. May be used by several threads at once.

        with Client("127.0.0.1:50051") as client:
            for delta in client.chat("What is paged attention?", max_tokens=200):
                print(delta.text, end="")

    Every method raises NanoserveError or one of its subclasses when the call fails. A call that the server refuses as
    overloaded or not ready is tried up to 4 times, after 0.1 to 2 seconds or as long as the server says; a stream that
    has begun is never tried again.

    Args:
        target: Address of the server, such as "127.0.0.1:50051" or "dns:///llm.example:443".
        api_key: Sent with every call as `authorization: Bearer KEY`. In the clear unless `tls` is given.
        tls: Speak TLS; `Tls()` checks the server against gRPC's own root certificates. Default: plain text.
        retries: False = a refusal is raised at once, for a caller whose own callers try again.
    """

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: Tls | None = None, retries: bool = True
    ) -> None:
        self._target = target
        self._api_key = api_key
        options = transport.channel_options(retries=retries)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, transport.credentials(tls), options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> "GenerateStream":
        """Complete a text as it stands, or token ids.

        Returns at once; errors come from reading the stream.

        Args:
            prompt: Text, tokenized with the special tokens of the tokenizer's configuration; or token ids, used
                verbatim. Not empty.
            **options: See GenerateOptions.

        Raises:
            InvalidRequest: The request has more than 16 MiB.
            TypeError, ValueError: An option that does not exist, or a value that its field cannot hold.
        """
        request = requests.generate_request(prompt, options)
        return self.generate_raw(request, **requests.call_options(options))

    def chat(self, messages: Messages, **options: Unpack[ChatGenerateOptions]) -> "GenerateStream":
        """Answer a conversation, rendered with the model's chat template.

        Returns at once; errors come from reading the stream.

        Args:
            messages: ChatMessages or dicts with the same keys, at least one; or a text, for one message of the user.
            **options: See ChatOptions and GenerateOptions.

        Raises:
            As `generate`; and ValueError for a role that does not exist.
        """
        request = requests.chat_request(messages, options)
        return self.generate_raw(request, **requests.call_options(options))

    def generate_raw(self, request: pb.GenerateRequest, **options: Unpack[CallOptions]) -> "GenerateStream":
        """Send a request as the contract has it. Returns and raises as `generate`."""
        call = transport.envelope(request, self._target, self._api_key, options)
        responses = self._generation.Generate(request, timeout=call.timeout, metadata=call.metadata)
        return GenerateStream(responses, Progress(call.request_id, call.span))

    def tokenize(self, prompt: Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Token ids of a prompt, exactly as `generate` (for a text) or `chat` (for messages) would see them.

        Args:
            prompt: A text as it stands, or the messages of a conversation.
            **options: See TokenizeOptions.
        """
        request = requests.tokenize_request(prompt, options)
        return Tokens.of(self._call(self._models.Tokenize, request, requests.call_options(options)))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        keep_special_tokens: bool = False,
        **options: Unpack[CallOptions],
    ) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids: Each below the model's vocab_size.
            model: Name of a served model. Default: the server's.
            keep_special_tokens: Keep special tokens (such as EOS) in the text.
            **options: See CallOptions.
        """
        request = model_pb2.DetokenizeRequest(
            model=model or "", token_ids=token_ids, keep_special_tokens=keep_special_tokens
        )
        return self._call(self._models.Detokenize, request, options).text

    def list_models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The served models, in order of their names."""
        response = self._call(self._models.ListModels, model_pb2.ListModelsRequest(), options)
        return [Model.of(model) for model in response.models]

    def cancel(self, request_id: str, /, **options: Unpack[CallOptions]) -> int:
        """End every request with this id, anyone's; their callers get Cancelled. For operators.

        To end a request of one's own, cancel its stream.

        Args:
            request_id: The request to end, as Started.request_id reports it.
            **options: See CallOptions. A `request_id` there labels this call itself.

        Returns:
            How many requests were ended: 0 = none with this id was running or waiting.
        """
        request = admin_pb2.CancelRequest(request_id=request_id)
        return self._call(self._admin.Cancel, request, options).cancelled

    def reset_cache(self, **options: Unpack[CallOptions]) -> int:
        """Forget every cached prefix that no running sequence uses. Returns how many blocks that freed."""
        return self._call(self._admin.ResetCache, admin_pb2.ResetCacheRequest(), options).freed_blocks

    def get_stats(self, **options: Unpack[CallOptions]) -> Stats:
        """A snapshot of scheduler and cache. For operators."""
        return Stats.of(self._call(self._admin.GetStats, admin_pb2.GetStatsRequest(), options))

    def watch_engine(self, *, interval: float | None = None, **options: Unpack[CallOptions]) -> "EngineWatch":
        """Snapshots of the engine, one at once and then one an interval. For operators.

        Returns at once; errors come from reading. A reader that is slower than the interval gets fewer snapshots, and
        never old ones.

        Args:
            interval: Seconds between two snapshots, 0.05 to 60. Default: 1.
            **options: See CallOptions.
        """
        request = requests.watch_request(interval)
        call = transport.envelope(request, self._target, self._api_key, options)
        responses = self._admin.WatchEngine(request, timeout=call.timeout, metadata=call.metadata)
        return EngineWatch(responses, call)

    def explain_request(self, request_id: str, /, **options: Unpack[CallOptions]) -> list[Timeline]:
        """What happened to the requests with this id, and why they waited: newest first, at least one. For operators.

        The server knows those that run, and the last 1024 that ended.

        Args:
            request_id: As Started.request_id reports it, or as its caller gave it.
            **options: See CallOptions. A `request_id` there labels this call itself.

        Raises:
            NotFound: No request with this id is known, or not any more.
        """
        request = admin_pb2.ExplainRequestRequest(request_id=request_id)
        return [Timeline.of(each) for each in self._call(self._admin.ExplainRequest, request, options).timelines]

    def close(self) -> None:
        """Close the connection, for good. Calls that are running end with Cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        method: Callable[..., _Response],
        request: Message,
        options: CallOptions,
    ) -> _Response:
        call = transport.envelope(request, self._target, self._api_key, options)
        try:
            response = method(request, timeout=call.timeout, metadata=call.metadata)
        except grpc.RpcError as error:
            # What gRPC raises is the call itself.
            status = cast(grpc.Call, error)
            call.span.end(status.code())
            raise from_status(status.code(), status.details(), status.trailing_metadata(), call.request_id) from error
        call.span.end(grpc.StatusCode.OK)
        return response


class GenerateStream(Iterator[Delta]):
    """The deltas of one request, as they come. For one reader; any thread may cancel.

    Leaving the `with` block, or dropping the last reference, cancels a request that is not finished.
    """

    def __init__(self, responses: "grpc._CallIterator[pb.GenerateResponse]", progress: Progress) -> None:
        self._responses = responses
        self._progress = progress

    @property
    def started(self) -> Started | None:
        """What the server said when it began to run the request; None until the first delta was read."""
        return self._progress.started

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Of the prompt's tokens, if they were asked for: all of them once the first delta was read."""
        return self._progress.prompt_logprobs

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            NanoserveError: The request failed; or its stream ended too early, although with status OK.
        """
        while (response := self._read()) is not None:
            if (delta := self._progress.take(response)) is not None:
                return delta
        raise StopIteration

    def result(self) -> Result:
        """Read to the end, and return all that the stream said, the deltas that were read before too.

        Raises:
            NanoserveError: As reading the deltas does.
        """
        for _ in self:
            pass
        return self._progress.result()

    def cancel(self) -> None:
        """End the request, unless it has ended. Reading on raises Cancelled."""
        self._responses.cancel()
        self._progress.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _read(self) -> pb.GenerateResponse | None:
        """The next event; None at the end of a stream that ended well."""
        try:
            return next(self._responses)
        except StopIteration:
            self._progress.end()
            return None
        except grpc.RpcError as error:
            status = cast(grpc.Call, error)
            raise self._progress.fail(status.code(), status.details(), status.trailing_metadata()) from error


class EngineWatch(Iterator[EngineSnapshot]):
    """Snapshots as they come. For one reader; any thread may cancel.

    Leaving the `with` block, or dropping the last reference, ends the watch.
    """

    def __init__(self, responses: "grpc._CallIterator[admin_pb2.WatchEngineResponse]", call: Envelope) -> None:
        self._responses = responses
        self._call = call

    def __next__(self) -> EngineSnapshot:
        """The next snapshot. Raises NanoserveError; the watch has no end of its own."""
        try:
            return EngineSnapshot.of(next(self._responses))
        except grpc.RpcError as error:
            status = cast(grpc.Call, error)
            self._call.span.end(status.code())
            request_id = self._call.request_id
            raise from_status(status.code(), status.details(), status.trailing_metadata(), request_id) from error

    def cancel(self) -> None:
        """End the watch. Reading on raises Cancelled."""
        self._responses.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
