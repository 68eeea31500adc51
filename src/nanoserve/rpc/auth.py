"""Who may call: API keys and TLS certificates, read from files once, at start.

| key            | GenerationService, ModelService | AdminService      | health, reflection |
|----------------|---------------------------------|-------------------|--------------------|
| none, or wrong | UNAUTHENTICATED                 | UNAUTHENTICATED   | served             |
| ordinary       | served                          | PERMISSION_DENIED | served             |
| admin          | served                          | served            | served             |

Without a file of ordinary keys the first column asks for none; without any file, no service does.
"""

import hmac
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc

from nanoserve.config import ConfigError, ServerConfig
from nanoserve.errors import PermissionDenied, RequestError, Unauthenticated
from nanoserve.rpc.call import Call, Calls, Context, Metadata, digest, principal_of

ADMIN_SERVICE = "nanoserve.v1.AdminService"
# Probes and tools come without a key. Neither tells anything about a caller or a request.
OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)


class ApiKeys:
    """The keys that open the services. Immutable; holds digests, not keys."""

    def __init__(self, ordinary: list[str] | None, admin: list[str] | None) -> None:
        """None = no such file was given; the module's table says what follows."""
        self._data_plane_is_open = ordinary is None
        self._admin_is_open = ordinary is None and admin is None
        self._ordinary = [digest(key) for key in ordinary or []]
        self._admin = [digest(key) for key in admin or []]

    def check(self, method: str, metadata: Metadata) -> None:
        """Raise Unauthenticated or PermissionDenied if the metadata's key does not open the method."""
        service = method.strip("/").partition("/")[0]
        is_admin_service = service == ADMIN_SERVICE
        is_open = self._admin_is_open if is_admin_service else self._data_plane_is_open
        if is_open or service in OPEN_SERVICES:
            return
        principal = principal_of(metadata)
        if not principal:
            raise Unauthenticated("an API key is required, as metadata 'authorization: Bearer KEY'")
        if _is_among(principal, self._admin):
            return
        if not _is_among(principal, self._ordinary):
            raise Unauthenticated("the API key is not known")
        if is_admin_service:
            raise PermissionDenied("AdminService takes an admin key")


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Turns away calls without the right key, before their message is read."""

    def __init__(self, keys: ApiKeys, calls: Calls) -> None:
        self._keys = keys
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        try:
            self._keys.check(handler_call_details.method, handler_call_details.invocation_metadata)
        except RequestError as error:
            # Observers make labels of methods, so that a caller may not invent one. The word is OpenTelemetry's.
            method = "_OTHER" if handler is None else handler_call_details.method.removeprefix("/")
            return self._refusal(method, error)
        return handler

    def _refusal(self, method: str, error: RequestError) -> "grpc.RpcMethodHandler[Any, Any]":
        async def fail(_requests: Any, _call: Call) -> NoReturn:
            raise error

        async def refuse(requests: Any, context: Context) -> None:
            await self._calls.answer(method, requests, context, fail)

        # Whatever the method's own kind is, a stream handler can end the RPC without reading anything.
        return grpc.stream_stream_rpc_method_handler(refuse)


def read_api_keys(config: ServerConfig) -> ApiKeys:
    """The keys of the configured files. Raises ConfigError."""
    return ApiKeys(_read_keys(config.api_keys), _read_keys(config.admin_keys))


def read_tls_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Credentials from the configured PEM files, None without any. Raises ConfigError.

    The standard library checks the files, because gRPC takes bad ones and fails at the first connection.
    """
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None and key is None:
        if client_ca is not None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key, the server's own")
        return None
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together")
    pems = {path: _read(path) for path in (cert, key, client_ca) if path is not None}
    checker = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tried = f"TLS certificate {cert} and key {key} do"
    try:
        checker.load_cert_chain(cert, key, password=lambda: "")
        if client_ca is not None:
            tried = f"client CA {client_ca} does"
            checker.load_verify_locations(client_ca)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{tried} not work: {error}") from None
    root = None if client_ca is None else pems[client_ca]
    return grpc.ssl_server_credentials([(pems[key], pems[cert])], root, require_client_auth=root is not None)


def _read_keys(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    keys = []
    for number, line in enumerate(_read(path).decode(errors="replace").splitlines(), start=1):
        key = line.partition("#")[0].strip()
        if not key:
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"key file {path}, line {number}: a key is printable ASCII without spaces")
        keys.append(key)
    if not keys:
        raise ConfigError(f"key file {path} has no key, so nobody could call")
    return keys


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _is_among(principal: str, known: list[str]) -> bool:
    """Takes the same time whichever key it is, if any."""
    return sum(hmac.compare_digest(principal, other) for other in known) > 0
