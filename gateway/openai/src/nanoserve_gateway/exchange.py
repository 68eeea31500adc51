"""What an HTTP request says, checked: its body, its query, and the headers that travel on; and whose it is."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from nanoserve_client import AsyncClient, CallOptions
from nanoserve_client.transport import MAX_REQUEST_ID_CHARS, REQUEST_ID_HEADER
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nanoserve_gateway import tracing
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.edge import is_request_id
from nanoserve_gateway.errors import Refused, bad_request
from nanoserve_gateway.fields import NAMES
from nanoserve_gateway.schema import BadRequest, Schema, Violation, parse_json

# Larger bodies are parsed on a thread, so that other streams do not wait; and only for callers whom the service knows.
LARGE_BODY_BYTES = 64 * 1024
# Of a header that is passed on: gRPC takes 8 KiB of them all.
MAX_HEADER_CHARS = 2048


class Incoming:
    """Reads requests. Event loop thread."""

    def __init__(self, config: GatewayConfig, client: Callable[[], AsyncClient]) -> None:
        self._config, self._client = config, client

    async def fields(self, request: Request, schema: Schema) -> dict[str, Any]:
        """Raises BadRequest, HTTPException, Refused."""
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            why = f"the body is in {encoding!r}; it must come as it is, without a content-encoding"
            raise Refused(bad_request("header content-encoding", why, status=415, code="unsupported_encoding"))
        try:
            async with asyncio.timeout(self._config.receive_timeout_s):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"the request did not come within {self._config.receive_timeout_s:g} s") from None
        if len(body) < LARGE_BODY_BYTES:
            return schema.parse(parse_json(body))
        return await asyncio.to_thread(lambda: schema.parse(parse_json(body)))

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            if len(body) < LARGE_BODY_BYTES <= len(body) + len(piece):
                # Any call would do: a wrong key is refused before there is more to read.
                await self._client().list_models(**self.call_options(request))
            body += piece
            if len(body) > (most := self._config.max_body_bytes):
                raise HTTPException(413, f"the request has more than {most} bytes")
        return bytes(body)

    def call_options(self, request: Request) -> CallOptions:
        """What travels beside the request; the service looks at it. Raises BadRequest."""
        options: CallOptions = {"timeout": self._timeout_s(request), "request_id": request.state.request_id}
        if not tracing.IS_INSTALLED:  # else the client sends that of its own span
            options["traceparent"] = request.headers.get("traceparent")
        if (authorization := request.headers.get("authorization")) is not None:
            options["metadata"] = {"authorization": authorization}
        if (given := request.headers.get(REQUEST_ID_HEADER)) and not is_request_id(given):
            wanted = f"must be at most {MAX_REQUEST_ID_CHARS} characters of printable ASCII"
            raise BadRequest([Violation(f"header {REQUEST_ID_HEADER}", wanted)])
        for name in ("traceparent", "authorization"):
            value = request.headers.get(name, "")
            if not (value.isascii() and value.isprintable() and len(value) <= MAX_HEADER_CHARS):
                wanted = f"must be at most {MAX_HEADER_CHARS} characters of printable ASCII"
                raise BadRequest([Violation(f"header {name}", wanted)])
        return options

    def _timeout_s(self, request: Request) -> float:
        header = request.headers.get("x-request-timeout")
        if header is None:
            return self._config.timeout_s
        try:
            timeout_s = float(header)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s < 2**31:
            raise BadRequest([Violation("header x-request-timeout", "must be seconds, above 0")])
        return timeout_s


def owner_of(request: Request) -> str:
    """Who a response belongs to: whoever has the key, however the scheme before it is written."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return f"{scheme.lower()} {key.strip()}"


def parse_query(schema: Schema, request: Request) -> dict[str, Any]:
    """Raises BadRequest. OpenAI's clients write a list as `name[]=a&name[]=b`. What bears no name of the API, such as
    the `api-version` that clients of Azure's send everywhere, asks for nothing here."""
    given: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        name = key.removesuffix("[]")
        if name in given:
            raise BadRequest([Violation(name, "is given more than once")])
        if name in schema.fields:
            given[name] = value
        elif name in NAMES:
            raise BadRequest([Violation(name, "is not a parameter of this path; fields go into the body")])
    return schema.parse(given)


def json_answer(text: str | bytes) -> Response:
    return Response(text, media_type="application/json")
