"""The synchronous client: a thin shell that waits; all else is shared with the asyncio client, in calls.py."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self, TypeVar, Unpack, cast

import grpc

from nanoserve_client.calls import Calls, GenerateReading, Reading, Unary
from nanoserve_client.errors import Metadata
from nanoserve_client.progress import Progress
from nanoserve_client.requests import CheckOptions, Messages, TokenizeOptions
from nanoserve_client.results import Adapter, Adapters, ConstraintCheck, Delta, Model, Result, Stats, Tokens
from nanoserve_client.transport import CallOptions, Envelope
from nanoserve_client.v1 import admin_pb2
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.watching import EngineSnapshot, Timeline

_Answer = TypeVar("_Answer")
_Response = TypeVar("_Response")


class Client(Calls["GenerateStream", "EngineWatch"]):
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

    def tokenize(self, prompt: Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """Token ids of a prompt, exactly as `generate` (for a text) or `chat` (for messages) would see them.

        Args:
            prompt: A text as it stands, or the messages of a conversation.
            **options: See TokenizeOptions.
        """
        return _wait(self._tokenize(prompt, options))

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
        return _wait(self._detokenize(token_ids, model, keep_special_tokens, options))

    def check_constraint(self, **options: Unpack[CheckOptions]) -> ConstraintCheck:
        """What would be enforced of a constraint; nothing is generated.

        Args:
            **options: See CheckOptions.

        Raises:
            InvalidRequest: The constraint cannot be enforced. `violations` names every keyword that is in the way, and
                `metadata` has the first as "pointer" and "keyword".
        """
        return _wait(self._check_constraint(options))

    def list_models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The served model, and behind it its adapters, in order of their names."""
        return _wait(self._list_models(options))

    def cancel(self, request_id: str, /, **options: Unpack[CallOptions]) -> int:
        """End every request with this id, anyone's; their callers get Cancelled. For operators.

        To end a request of one's own, cancel its stream.

        Args:
            request_id: The request to end, as Started.request_id reports it.
            **options: See CallOptions. A `request_id` there labels this call itself.

        Returns:
            How many requests were ended: 0 = none with this id was running or waiting.
        """
        return _wait(self._cancel(request_id, options))

    def reset_cache(self, **options: Unpack[CallOptions]) -> int:
        """Forget every cached prefix that no running sequence uses. Returns how many blocks that freed."""
        return _wait(self._reset_cache(options))

    def get_stats(self, **options: Unpack[CallOptions]) -> Stats:
        """A snapshot of scheduler and cache. For operators."""
        return _wait(self._get_stats(options))

    def explain_request(self, request_id: str, /, **options: Unpack[CallOptions]) -> list[Timeline]:
        """What happened to the requests with this id, and why they waited: newest first, at least one. For operators.

        The server knows those that run, and the last 1024 that ended.

        Args:
            request_id: As Started.request_id reports it, or as its caller gave it.
            **options: See CallOptions. A `request_id` there labels this call itself.

        Raises:
            NotFound: No request with this id is known, or not any more.
        """
        return _wait(self._explain_request(request_id, options))

    def load_adapter(
        self,
        name: str,
        /,
        path: str = "",
        *,
        pinned: bool = False,
        replace: bool = False,
        **options: Unpack[CallOptions],
    ) -> Adapter:
        """Read a LoRA adapter, check it whole, and serve it under a name. For operators.

        Args:
            name: What callers will call it: 1 to 128 characters.
            path: A PEFT folder on the server, under its --adapters folder. Default: the subfolder called like the
                adapter.
            pinned: It keeps its slot, also when nobody asks for it.
            replace: A name that has other weights gets these: running requests end with theirs, new ones get the new.
            **options: See CallOptions.

        Raises:
            InvalidRequest: It cannot be served. `violations` has all that is wrong with the folder.
            NotFound: There is no such folder.
            NanoserveError: With code FAILED_PRECONDITION: the name has other weights, and `replace` is not set.
            Overloaded: There is no memory for it.
        """
        return _wait(self._load_adapter(name, path, pinned, replace, options))

    def unload_adapter(
        self, name: str, /, *, drain_timeout: float | None = None, **options: Unpack[CallOptions]
    ) -> None:
        """Stop to serve an adapter, and free its memory. For operators.

        New requests for it are refused at once.

        Args:
            name: As `list_adapters` gives it.
            drain_timeout: Seconds that running requests may take to end, 0 to 3600. Default: 30.
            **options: See CallOptions.

        Raises:
            NotFound: There is no such adapter.
            NanoserveError: With code FAILED_PRECONDITION: requests still ran after the time; it is served on.
        """
        _wait(self._unload_adapter(name, drain_timeout, options))

    def list_adapters(self, **options: Unpack[CallOptions]) -> Adapters:
        """The adapters that were loaded, where their weights are, and who uses them. For operators."""
        return _wait(self._list_adapters(options))

    def close(self) -> None:
        """Close the connection, for good. Calls that are running end with Cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, credentials, options)

    def _stream(self, responses: Any, progress: Progress) -> "GenerateStream":
        return GenerateStream(responses, progress)

    def _watch(self, responses: Any, envelope: Envelope) -> "EngineWatch":
        return EngineWatch(responses, envelope)


def _wait(call: Unary[_Answer]) -> _Answer:
    try:
        response = call.send()
    except grpc.RpcError as error:
        raise call.envelope.fail(*_status_of(error)) from error
    call.envelope.end()
    return call.read(response)


def _status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str | None, Metadata | None]:
    # What gRPC raises is the call itself.
    call = cast(grpc.Call, error)
    return call.code(), call.details(), call.trailing_metadata()


class _Stream(Reading, Generic[_Response]):
    """Reads by blocking."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _read(self) -> _Response | None:
        """The next response; None at the end of a stream that ended well."""
        try:
            response: _Response = next(self._responses)
        except StopIteration:
            self._account.end()
            return None
        except grpc.RpcError as error:
            raise self._account.fail(*_status_of(error)) from error
        return response


class GenerateStream(_Stream[pb.GenerateResponse], GenerateReading, Iterator[Delta]):
    """The deltas of one request, as they come. For one reader; any thread may cancel.

    Leaving the `with` block, or dropping the last reference, cancels a request that is not finished.
    """

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            NanoserveError: The request failed; or its stream ended too early, although with status OK.
        """
        while (response := self._read()) is not None:
            if (delta := self._account.take(response)) is not None:
                return delta
        raise StopIteration

    def result(self) -> Result:
        """Read to the end, and return all that the stream said, the deltas that were read before too.

        Raises:
            NanoserveError: As reading the deltas does.
        """
        for _ in self:
            pass
        return self._account.result()


class EngineWatch(_Stream[admin_pb2.WatchEngineResponse], Iterator[EngineSnapshot]):
    """Snapshots as they come. For one reader; any thread may cancel.

    Leaving the `with` block, or dropping the last reference, ends the watch.
    """

    def __next__(self) -> EngineSnapshot:
        """The next snapshot. Raises NanoserveError; the watch has no end of its own."""
        if (response := self._read()) is None:
            raise StopIteration
        return EngineSnapshot.of(response)
