"""What an operator may choose."""

from dataclasses import dataclass

from nanoserve_client import Tls


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Of one gateway."""

    # Address of the gRPC service.
    target: str
    tls: Tls | None = None
    # That it listens on.
    host: str = "127.0.0.1"
    # Origins whose pages may call, for browsers; "*" = all.
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    # Of a request whose caller gives no `x-request-timeout`.
    timeout_s: float = 600.0
    # Until a whole request has come.
    receive_timeout_s: float = 60.0
    # Of silence in a stream, before a sign of life.
    keep_alive_s: float = 15.0
    max_stored_responses: int = 1000
    max_stored_bytes: int = 64 * 2**20
