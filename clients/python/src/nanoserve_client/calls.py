"""What the two clients share: all but the waiting, which client.py does by blocking its thread and aio.py by await.

method ─▶ Calls: request, address ─┬─▶ a stream at once
                                   └─▶ Unary, sent and waited for by the client ─▶ its answer
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from nanoserve_client import requests, transport
from nanoserve_client.errors import Metadata, NanoserveError
from nanoserve_client.progress import Progress
from nanoserve_client.requests import ChatGenerateOptions, CheckOptions, GenerateOptions, Messages, TokenizeOptions
from nanoserve_client.results import Adapter, Adapters, ConstraintCheck, Model, Started, Stats, TokenLogprob, Tokens
from nanoserve_client.transport import CallOptions, Envelope, Tls
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc, model_pb2, model_pb2_grpc
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.watching import Timeline

_Answer = TypeVar("_Answer")
_Stream = TypeVar("_Stream")
_Watch = TypeVar("_Watch")


@dataclass(frozen=True, slots=True)
class Unary(Generic[_Answer]):
    """A call with one response."""

    # The stub's method: returns the response, or what can be awaited for it.
    method: Callable[..., Any]
    request: Message
    envelope: Envelope
    # What the caller gets of the response.
    read: Callable[[Any], _Answer]

    def send(self) -> Any:
        """As the method does."""
        return self.method(self.request, timeout=self.envelope.timeout, metadata=self.envelope.metadata)


class Calls(abc.ABC, Generic[_Stream, _Watch]):
    """A client of either kind: what it is made of, the calls that return their stream at once, and the others as far as
    they do not wait."""

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: Tls | None = None, retries: bool = True
    ) -> None:
        self._target = target
        self._api_key = api_key
        options = transport.channel_options(retries=retries)
        self._channel: Any = self._open(target, options, None if tls is None else transport.credentials(tls))
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    @abc.abstractmethod
    def _open(self, target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> Any:
        """A channel; credentials: None = in the clear."""

    @abc.abstractmethod
    def _stream(self, responses: Any, progress: Progress) -> _Stream: ...

    @abc.abstractmethod
    def _watch(self, responses: Any, envelope: Envelope) -> _Watch: ...

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> _Stream:
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
        return self._generate(request, requests.call_options(options), requests.parser(options))

    def chat(self, messages: Messages, **options: Unpack[ChatGenerateOptions]) -> _Stream:
        """Answer a conversation, rendered with the model's chat template.

        Returns at once; errors come from reading the stream.

        Args:
            messages: ChatMessages or dicts with the same keys, at least one; or a text, for one message of the user.
            **options: See ChatOptions and GenerateOptions.

        Raises:
            As `generate`; and ValueError for a role that does not exist.
        """
        request = requests.chat_request(messages, options)
        return self._generate(request, requests.call_options(options), requests.parser(options))

    def generate_raw(self, request: pb.GenerateRequest, **options: Unpack[CallOptions]) -> _Stream:
        """Send a request as the contract has it. Returns and raises as `generate`."""
        return self._generate(request, options, None)

    def _generate(
        self, request: pb.GenerateRequest, options: CallOptions, parse: Callable[[str], Any] | None
    ) -> _Stream:
        call = self._address(request, options)
        responses = self._generation.Generate(request, timeout=call.timeout, metadata=call.metadata)
        return self._stream(responses, Progress(call.request_id, call.span, parse, is_parsed=request.output.parse))

    def watch_engine(self, *, interval: float | None = None, **options: Unpack[CallOptions]) -> _Watch:
        """Snapshots of the engine, one at once and then one an interval. For operators.

        Returns at once; errors come from reading. A reader that is slower than the interval gets fewer snapshots, and
        never old ones.

        Args:
            interval: Seconds between two snapshots, 0.05 to 60. Default: 1.
            **options: See CallOptions.
        """
        request = requests.watch_request(interval)
        call = self._address(request, options)
        return self._watch(self._admin.WatchEngine(request, timeout=call.timeout, metadata=call.metadata), call)

    # ------------------------------------------------------------------------------- calls that are waited for

    def _tokenize(self, prompt: Messages, options: TokenizeOptions) -> Unary[Tokens]:
        request = requests.tokenize_request(prompt, options)
        return self._unary(self._models.Tokenize, request, requests.call_options(options), Tokens.of)

    def _detokenize(
        self, token_ids: Sequence[int], model: str | None, keep_special_tokens: bool, options: CallOptions
    ) -> Unary[str]:
        request = model_pb2.DetokenizeRequest(
            model=model or "", token_ids=token_ids, keep_special_tokens=keep_special_tokens
        )
        return self._unary(self._models.Detokenize, request, options, lambda response: response.text)

    def _check_constraint(self, options: CheckOptions) -> Unary[ConstraintCheck]:
        request = requests.check_constraint_request(options)
        return self._unary(self._models.CheckConstraint, request, requests.call_options(options), ConstraintCheck.of)

    def _list_models(self, options: CallOptions) -> Unary[list[Model]]:
        def read(response: model_pb2.ListModelsResponse) -> list[Model]:
            return [Model.of(model) for model in response.models]

        return self._unary(self._models.ListModels, model_pb2.ListModelsRequest(), options, read)

    def _cancel(self, request_id: str, options: CallOptions) -> Unary[int]:
        request = admin_pb2.CancelRequest(request_id=request_id)
        return self._unary(self._admin.Cancel, request, options, lambda response: response.cancelled)

    def _reset_cache(self, options: CallOptions) -> Unary[int]:
        request = admin_pb2.ResetCacheRequest()
        return self._unary(self._admin.ResetCache, request, options, lambda response: response.freed_blocks)

    def _get_stats(self, options: CallOptions) -> Unary[Stats]:
        return self._unary(self._admin.GetStats, admin_pb2.GetStatsRequest(), options, Stats.of)

    def _explain_request(self, request_id: str, options: CallOptions) -> Unary[list[Timeline]]:
        def read(response: admin_pb2.ExplainRequestResponse) -> list[Timeline]:
            return [Timeline.of(each) for each in response.timelines]

        request = admin_pb2.ExplainRequestRequest(request_id=request_id)
        return self._unary(self._admin.ExplainRequest, request, options, read)

    def _load_adapter(self, name: str, path: str, pinned: bool, replace: bool, options: CallOptions) -> Unary[Adapter]:
        def read(response: admin_pb2.LoadAdapterResponse) -> Adapter:
            return Adapter.of(response.adapter)

        request = admin_pb2.LoadAdapterRequest(name=name, path=path, pinned=pinned, replace=replace)
        return self._unary(self._admin.LoadAdapter, request, options, read)

    def _unload_adapter(self, name: str, drain_timeout: float | None, options: CallOptions) -> Unary[None]:
        request = requests.unload_adapter_request(name, drain_timeout)
        return self._unary(self._admin.UnloadAdapter, request, options, lambda _: None)

    def _list_adapters(self, options: CallOptions) -> Unary[Adapters]:
        return self._unary(self._admin.ListAdapters, admin_pb2.ListAdaptersRequest(), options, Adapters.of)

    def _unary(
        self,
        method: Callable[..., Any],
        request: Message,
        options: CallOptions,
        read: Callable[[Any], _Answer],
    ) -> Unary[_Answer]:
        return Unary(method, request, self._address(request, options), read)

    def _address(self, request: Message, options: CallOptions) -> Envelope:
        return transport.envelope(request, self._target, self._api_key, options)


class Account(Protocol):
    """Who is told how a stream goes: its Progress, or the Envelope of a watch."""

    def end(self) -> None:
        """It ended with status OK. Raises what it failed with before, or lacks."""

    def fail(self, code: grpc.StatusCode, message: str | None, trailers: Metadata | None) -> NanoserveError:
        """It ended with this status. Returns what to raise."""

    def cancel(self) -> None:
        """Nobody reads on."""


class Reading:
    """A stream of either client."""

    def __init__(self, responses: Any, account: Account) -> None:
        """responses: gRPC's call."""
        self._responses = responses
        self._account = account

    def cancel(self) -> None:
        """End the call, unless it has ended. Reading on raises Cancelled."""
        self._responses.cancel()
        self._account.cancel()


class GenerateReading(Reading):
    """The stream of a generation, in either client."""

    _account: Progress

    @property
    def started(self) -> Started | None:
        """What the server said when it began to run the request; None until the first delta was read."""
        return self._account.started

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Of the prompt's tokens, if they were asked for: all of them once the first delta was read."""
        return self._account.prompt_logprobs
