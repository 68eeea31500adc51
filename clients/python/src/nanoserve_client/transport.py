"""How calls travel: channel options, credentials, metadata, size limit. Pure; both clients use it."""

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import grpc
from google.protobuf.message import Message

from nanoserve_client.errors import InvalidRequest, Metadata, NanoserveError, from_status
from nanoserve_client.tracing import CallSpan

# What the server receives at most. It would refuse more with a bare RESOURCE_EXHAUSTED, which looks like overload.
MAX_REQUEST_BYTES = 16 * 2**20
# A Tokenize response repeats its text and adds the tokens, so it may be several times its request.
MAX_RESPONSE_BYTES = 128 * 2**20

# The caller's label for a request, and what it may be.
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_CHARS = 128
REQUEST_ID_CHARS = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")

_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")

# gRPC itself retries, and waits as long as the server says in `grpc-retry-pushback-ms`. A stream that has begun is
# never retried: tokens would come twice. CANCELLED, unless the caller said so, is what a server that stops makes of the
# calls of its last moment.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "nanoserve.v1.GenerationService"},
                {"service": "nanoserve.v1.ModelService"},
                {"service": "nanoserve.v1.AdminService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            },
        }
    ]
}

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A call whose request outgrows this buffer is not retried; the default is 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", MAX_REQUEST_BYTES + 2**16),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # A dead connection is noticed while a request waits in the queue. The server allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # For gRPC's own bandwidth probe: while one is unanswered no keepalive ping is sent. The default is a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel_options(*, retries: bool) -> list[tuple[str, int | str]]:
    """retries: whether gRPC repeats what was refused before it began."""
    return CHANNEL_OPTIONS if retries else [*CHANNEL_OPTIONS, ("grpc.enable_retries", 0)]


@dataclass(frozen=True, slots=True)
class Tls:
    """Speak TLS. All files are PEM."""

    # Certificates that the server's is checked against. None = those that come with gRPC.
    root_certificates: str | Path | None = None
    # What the client shows to a server that asks (mTLS): both or neither.
    client_certificate: str | Path | None = None
    client_key: str | Path | None = None


class CallOptions(TypedDict, total=False):
    """What every call takes besides its request.

    Attributes:
        timeout: Seconds until the call fails with DeadlineExceeded, retries included. None or absent = never.
        request_id: The caller's label for the request, sent as `x-request-id`: printable ASCII. Absent = the server
            makes one.
        traceparent: W3C trace context that the server's spans continue. Absent = that of the current span, if
            opentelemetry is installed.
        metadata: Further metadata. Keys are lower case; a value is bytes if its key ends in "-bin", else
            printable ASCII.
    """

    timeout: float | None
    request_id: str | None
    traceparent: str | None
    metadata: Mapping[str, str | bytes] | None


def credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Read the files of `tls`."""
    if (tls.client_certificate is None) != (tls.client_key is None):
        raise ValueError("client_certificate and client_key go together")
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.root_certificates),
        private_key=_read(tls.client_key),
        certificate_chain=_read(tls.client_certificate),
    )


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


@dataclass(frozen=True, slots=True)
class Envelope:
    """What travels beside one request."""

    metadata: tuple[tuple[str, str | bytes], ...]
    # Seconds; None = no deadline.
    timeout: float | None
    # The caller's label, if there is one.
    request_id: str | None
    span: CallSpan

    def end(self) -> None:
        """The call ended with status OK."""
        self.span.end(grpc.StatusCode.OK)

    def fail(self, code: grpc.StatusCode, message: str | None, trailers: Metadata | None) -> NanoserveError:
        """The call ended with this status. Returns what to raise."""
        self.span.end(code)
        return from_status(code, message, trailers, self.request_id)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.span.end(grpc.StatusCode.CANCELLED)


def envelope(request: Message, target: str, api_key: str | None, options: CallOptions) -> Envelope:
    """Check that the request can be sent to the target, and address it. Its span begins.

    Raises InvalidRequest if the server would not receive it, TypeError for an option that does not exist, ValueError
    for metadata that cannot be sent.
    """
    refuse_unknown(options, CallOptions.__optional_keys__)
    request_id = options.get("request_id")
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the request has {size} bytes; the server receives at most {MAX_REQUEST_BYTES}",
            reason="REQUEST_TOO_LARGE",
            request_id=request_id,
        )
    metadata = dict(options.get("metadata") or {})
    if request_id is not None:
        metadata[REQUEST_ID_HEADER] = request_id
    if (parent := options.get("traceparent")) is not None:
        metadata["traceparent"] = parent
    if api_key is not None:
        metadata["authorization"] = f"Bearer {api_key}"
    _refuse_unsendable(metadata)
    traceparent = metadata.get("traceparent")
    span = CallSpan(request, target, traceparent if isinstance(traceparent, str) else None)
    metadata.update(span.headers)
    return Envelope(tuple(metadata.items()), options.get("timeout"), request_id, span)


def _refuse_unsendable(metadata: Mapping[str, str | bytes]) -> None:
    """Raise ValueError for what gRPC would fail as INTERNAL, such as the newline at the end of a key's file."""
    for key, value in metadata.items():
        if not _METADATA_KEY.fullmatch(key):
            raise ValueError(f"metadata key {key!r} must be of lower case letters, digits and _.-")
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise ValueError(f"the value of metadata {key!r} must be printable ASCII")


def refuse_unknown(options: Mapping[str, object], known: frozenset[str]) -> None:
    """Raise TypeError for an option that does not exist: a misspelt one must not be ignored."""
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"unknown option: {', '.join(unknown)}")
