"""Who may call: API keys and TLS certificates, read from files once, at start.

| key            | GenerationService, ModelService | AdminService      | health, reflection |
|----------------|---------------------------------|-------------------|--------------------|
| none, or wrong | UNAUTHENTICATED                 | UNAUTHENTICATED   | served             |
| ordinary       | served                          | PERMISSION_DENIED | served             |
| admin          | served                          | served            | served             |

Without a file of ordinary keys the first column asks for none; without any file, no service does.
"""

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from nanoserve.config import ServerConfig
from nanoserve.request import PermissionDenied, RequestError, Unauthenticated
from nanoserve.rpc.call import Metadata, bearer_key, request_id
from nanoserve.rpc.errors import ServerError, abort

ADMIN_SERVICE = "nanoserve.v1.AdminService"
# Probes and tools come without a key. Neither tells anything about a caller or a request.
OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)

_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")


class ApiKeys:
    """The keys that open the services. Immutable; holds digests, not keys."""

    def __init__(self, ordinary: list[str] | None, admin: list[str] | None) -> None:
        """None = no such file was given; the module's table says what follows."""
        self._data_plane_is_open = ordinary is None
        self._admin_is_open = ordinary is None and admin is None
        self._ordinary = [_digest(key) for key in ordinary or []]
        self._admin = [_digest(key) for key in admin or []]

    def check(self, method: str, metadata: Metadata) -> None:
        """Raise Unauthenticated or PermissionDenied if the metadata's key does not open the method."""
        service = method.strip("/").partition("/")[0]
        is_admin_service = service == ADMIN_SERVICE
        is_open = self._admin_is_open if is_admin_service else self._data_plane_is_open
        if is_open or service in OPEN_SERVICES:
            return
        key = bearer_key(metadata)
        if key is None:
            raise Unauthenticated("an API key is required, as metadata 'authorization: Bearer KEY'")
        digest = _digest(key)
        if _is_among(digest, self._admin):
            return
        if not _is_among(digest, self._ordinary):
            raise Unauthenticated("the API key is not known")
        if is_admin_service:
            raise PermissionDenied("AdminService takes an admin key")


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Turns away calls without the right key, before their message is read."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[_Asked, _Answered] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[_Asked, _Answered] | None":
        metadata = list(handler_call_details.invocation_metadata)
        try:
            self._keys.check(handler_call_details.method, metadata)
        except RequestError as error:
            return _refusal(error, request_id(metadata))
        return await continuation(handler_call_details)


def read_api_keys(config: ServerConfig) -> ApiKeys:
    """The keys of the configured files. Raises ServerError."""
    ordinary = None if config.api_keys is None else _read_keys(config.api_keys)
    admin = None if config.admin_keys is None else _read_keys(config.admin_keys)
    return ApiKeys(ordinary, admin)


def read_tls_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Credentials from the configured PEM files, None without any. Raises ServerError.

    The standard library checks the files, because gRPC takes bad ones and fails at the first connection.
    """
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None and key is None:
        if client_ca is not None:
            raise ServerError("--tls-client-ca needs --tls-cert and --tls-key, the server's own")
        return None
    if cert is None or key is None:
        raise ServerError("--tls-cert and --tls-key go together")
    pems = {path: _read(path) for path in (cert, key, client_ca) if path is not None}
    checker = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        checker.load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ServerError(f"TLS certificate {cert} and key {key} do not work: {error}") from None
    if client_ca is None:
        return grpc.ssl_server_credentials([(pems[key], pems[cert])])
    try:
        checker.load_verify_locations(client_ca)
    except (ssl.SSLError, ValueError) as error:
        raise ServerError(f"client CA {client_ca} does not work: {error}") from None
    return grpc.ssl_server_credentials([(pems[key], pems[cert])], pems[client_ca], True)


def _refusal(error: RequestError, label: str) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error, label)

    # Whatever the method's own kind is, a stream handler can end the RPC without reading anything.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _read_keys(path: Path) -> list[str]:
    keys = []
    for number, line in enumerate(_read(path).decode(errors="replace").splitlines(), start=1):
        key = line.partition("#")[0].strip()
        if not key:
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ServerError(f"key file {path}, line {number}: a key is printable ASCII without spaces")
        keys.append(key)
    if not keys:
        raise ServerError(f"key file {path} has no key, so nobody could call")
    return keys


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServerError(f"cannot read {path}: {error.strerror}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_among(digest: bytes, known: list[bytes]) -> bool:
    """Takes the same time whichever key it is, if any."""
    return sum(hmac.compare_digest(digest, other) for other in known) > 0
