"""What every request passes before the endpoints: it gets its id, and is asked whether a web page may have sent it.

A server that listens on this machine alone is still in reach of every page that somebody opens on it. A browser sends
a POST of plain text to any address without asking first, and lets a page call its own name, which its owner may point
at 127.0.0.1 (DNS rebinding). So pages must be of the server's own origin or a listed one, and a server on a loopback
address goes by no name that somebody else could own. Programs that are no browsers send no Origin, and notice nothing.
"""

import ipaddress
import uuid
from urllib.parse import urlsplit

from nanoserve_client.transport import MAX_REQUEST_ID_CHARS, REQUEST_ID_CHARS, REQUEST_ID_HEADER
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoserve_gateway.errors import Problem, bad_request
from nanoserve_gateway.refusals import Refusals

# Probes call it by any name, and it tells nothing.
OPEN_PATH = "/health"
# What containers call their own machine; no name on the internet ends so.
_OWN_SUFFIXES = (".localhost", ".internal")
OPTION = "--http-cors-origins of nanoserve serve, or --cors-origin of nanoserve-gateway"


def is_request_id(text: str) -> bool:
    return 0 < len(text) <= MAX_REQUEST_ID_CHARS and REQUEST_ID_CHARS.issuperset(text)


class RequestIds:
    """ASGI middleware. A request's id is its caller's, if it can be one, else a new one. It is in
    `request.state.request_id`, goes to the gRPC service, and is in the head of every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if is_request_id(given) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


class Pages:
    """ASGI middleware. Refuses what pages of foreign origins send."""

    def __init__(self, app: ASGIApp, host: str, origins: tuple[str, ...], refusals: Refusals) -> None:
        """host: that is listened on. origins: whose pages may call; "*" = all."""
        self._app = app
        self._origins = frozenset(origin.lower() for origin in origins)
        # None = any.
        self._names: frozenset[str] | None = None
        if _is_loopback(host):
            # Whoever may call from a page may also be the one whose name a proxy passes on.
            self._names = frozenset({host.lower(), *(_name_of(urlsplit(origin).netloc) for origin in self._origins)})
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = scope["type"] == "http" and scope["path"] != OPEN_PATH
        if not is_asked or (problem := self._problem(Headers(scope=scope))) is None:
            await self._app(scope, receive, send)
            return
        self._refusals.note(scope, problem)
        await JSONResponse(problem.as_json(), problem.status)(scope, receive, send)

    def _problem(self, headers: Headers) -> Problem | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and self._names is not None and not self._is_own_name(_name_of(host)):
            why = f"a server for its own machine alone is not called {host!r}; {OPTION}, lists the sites it may be"
            return bad_request("header host", why, status=403, code="foreign_host")
        if origin is not None and self._is_foreign(origin.lower(), host.lower()):
            why = f"pages of {origin!r} may not call; {OPTION}, lists those that may"
            return bad_request("header origin", why, status=403, code="foreign_origin")
        return None

    def _is_own_name(self, name: str) -> bool:
        assert self._names is not None
        # An address that stands there as such was looked up by nobody.
        return name == "localhost" or name in self._names or name.endswith(_OWN_SUFFIXES) or _is_address(name)

    def _is_foreign(self, origin: str, host: str) -> bool:
        return urlsplit(origin).netloc != host and self._origins.isdisjoint((origin, "*"))


def _name_of(netloc: str) -> str:
    """Without the port and the brackets of an IPv6 address."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0].lower()
    return netloc.partition(":")[0].lower()


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
