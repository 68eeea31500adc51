"""OpenAI's API beside the gRPC server: the gateway of the `nanoserve-gateway` distribution, in this process.

It is a client like any other, through a socket of its own, so that it needs no certificate: keys, limits and the queue
are the gRPC service's.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from nanoserve.config import ConfigError, ServerConfig, address_of
from nanoserve.request import Fact

if TYPE_CHECKING:
    from starlette.routing import Route

    from nanoserve.observability.telemetry import Telemetry
    from nanoserve.rpc.server import Server

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def openai_api(config: ServerConfig, server: "Server", telemetry: "Telemetry") -> AsyncIterator[list[Fact]]:
    """Listens while the block runs, if it is wanted; /metrics is there too. Gives where they are, or why they are not.
    Raises ConfigError.

    server: not started yet. It answers while it drains, so it is stopped before the block ends.
    """
    if config.http_port == 0:
        yield _telemetry_facts(telemetry, None)
        return
    if config.tls_client_ca is not None:
        why = "not served: it cannot ask for certificates, as --tls-client-ca wants"
        logger.warning("OpenAI's API is %s", why)
        yield [Fact("OpenAI", why), *_telemetry_facts(telemetry, None)]
        return
    # Imported here, because openai's types take a moment.
    from nanoserve_gateway.config import GatewayConfig
    from nanoserve_gateway.server import GatewayServer, listen

    try:
        listener = listen(config.http_host, config.http_port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.http_host}:{config.http_port}: {error.strerror}; "
            "--http-port and --http-host choose where, --http-port 0 serves none"
        ) from None
    with listener:
        gateway = GatewayServer(
            GatewayConfig(
                target=server.listen_on_socket(),
                host=config.http_host,
                cors_origins=tuple(filter(None, (config.http_cors_origins or "").replace(" ", "").split(","))),
                max_body_bytes=config.http_max_body_bytes,
                timeout_s=config.http_timeout_s,
            ),
            takes_signals=False,
            routes=[_metrics_route(telemetry)] if telemetry.meter_provider else [],
            meter_provider=telemetry.meter_provider,
        )
        serving = asyncio.create_task(gateway.serve([listener]))
        url = f"http://{address_of(config.http_host, config.http_port)}"
        try:
            yield [Fact("OpenAI", f"{url}/v1"), Fact("live view", f"{url}/"), *_telemetry_facts(telemetry, url)]
        finally:
            gateway.stop()
            await serving


def _telemetry_facts(telemetry: "Telemetry", url: str | None) -> list[Fact]:
    """url: of the HTTP port; None = there is none."""
    facts = []
    if telemetry.meter_provider:
        pulled = "not served without the HTTP port" if url is None else f"{url}/metrics"
        pushed = telemetry.metrics_endpoint
        if url is None and pushed is None:
            pulled += "; a collector gets them if OTEL_EXPORTER_OTLP_ENDPOINT names one"
        facts.append(Fact("metrics", pulled if pushed is None else f"{pulled}, and sent to {pushed}"))
    if telemetry.traces_endpoint is not None:
        facts.append(Fact("traces", f"sent to {telemetry.traces_endpoint}"))
    return facts


def _metrics_route(telemetry: "Telemetry") -> "Route":
    """What Prometheus reads. It asks for no key, and tells of no caller."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def metrics(request: Request) -> Response:
        text, content_type = await telemetry.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return Route("/metrics", metrics)
