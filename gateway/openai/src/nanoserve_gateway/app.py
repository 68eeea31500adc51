"""The ASGI application: paths, headers and status codes; all that an answer says comes from the pure modules.

    body ─▶ Schema.parse ─▶ ChatAnswer | CompletionAnswer | ResponseAnswer ─▶ Generate ─▶ one object, or frames

It holds no state but the responses that are to be retrieved, and decides nothing: keys, models, limits and the queue
are the gRPC service's.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoserve_client import AsyncClient, CallOptions, NanoserveError, Tls, transport
from nanoserve_client import Model as ServedModel
from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from nanoserve_gateway import live, pages, tracing
from nanoserve_gateway.answer import Answer, to_json
from nanoserve_gateway.chat import ChatAnswer, messages_of
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.errors import Problem, bad_request, problem_of
from nanoserve_gateway.fields import CHAT, COMPLETIONS, DETOKENIZE, NO_QUERY, QUERIES, RESPONSES, TOKENIZE
from nanoserve_gateway.responses import Remembered, ResponseAnswer, page_of
from nanoserve_gateway.schema import BadRequest, Schema, Violation, parse_json
from nanoserve_gateway.store import ResponseStore
from nanoserve_gateway.streaming import EventStream, Generation, unless_gone

# Larger bodies are parsed on a thread, so that other streams do not wait; and only for callers whom the service knows.
LARGE_BODY_BYTES = 64 * 1024
# Of a header that is passed on: gRPC takes 8 KiB of them all.
MAX_HEADER_CHARS = 2048
NOT_KEPT = "no response {id!r} is kept: it has not ended yet, was deleted, or made room for others"
HEALTH_TIMEOUT_S = 2.0
HEALTH_SERVICE = "nanoserve.v1.GenerationService"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What an operator may choose."""

    # Address of the gRPC service.
    target: str
    tls: Tls | None = None
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


def build_app(config: GatewayConfig, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application; it connects when it starts. routes: further ones, beside the API's.

    Who runs it sets `state.is_stopping`, an event, when it takes no more requests: streams without an end of their own
    then end.
    """
    gateway = Gateway(config)
    origins = list(config.cors_origins)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
    )
    app = Starlette(
        routes=[*gateway.routes(), *live.routes(gateway.client), *routes],
        lifespan=gateway.lifespan,
        middleware=[Middleware(tracing.Tracing), *([cors] if origins else [])],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_error},
    )
    app.state.is_stopping = asyncio.Event()
    return app


class Gateway:
    """The endpoints. Event loop thread."""

    _client: AsyncClient
    _health: health_pb2_grpc.HealthStub

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._store = ResponseStore(config.max_stored_responses, config.max_stored_bytes)

    def client(self) -> AsyncClient:
        """Of the gRPC service, once the application has started."""
        return self._client

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            query = QUERIES.get((method, path), NO_QUERY)
            return Route(path, _answering(endpoint, query), methods=[method])

        return [
            route("POST", "/v1/chat/completions", self.create_chat),
            route("POST", "/v1/completions", self.create_completion),
            route("POST", "/v1/responses", self.create_response),
            route("GET", "/v1/responses/{id}", self.get_response),
            route("DELETE", "/v1/responses/{id}", self.delete_response),
            route("POST", "/v1/responses/{id}/cancel", self.cancel_response),
            route("GET", "/v1/responses/{id}/input_items", self.list_input_items),
            route("GET", "/v1/models", self.list_models),
            route("GET", "/v1/models/{name:path}", self.get_model),
            route("POST", "/tokenize", self.tokenize),
            route("POST", "/detokenize", self.detokenize),
            route("GET", "/health", self.health),
            route("GET", "/version", self.version),
            route("GET", "/docs", self.docs),
            route("GET", "/openapi.json", self.openapi),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        # The caller's own client tries again what is refused; a second layer would multiply the attempts, and would
        # keep a 429 from those who want to know.
        config = self._config
        if config.tls is None:
            channel = grpc.aio.insecure_channel(config.target)
        else:
            channel = grpc.aio.secure_channel(config.target, transport.credentials(config.tls))
        async with AsyncClient(config.target, tls=config.tls, retries=False) as self._client, channel:
            self._health = health_pb2_grpc.HealthStub(channel)
            yield

    # ------------------------------------------------------------------------------------------- generation

    async def create_chat(self, request: Request) -> Response:
        return await self._reply(request, ChatAnswer(await self._fields(request, CHAT)))

    async def create_completion(self, request: Request) -> Response:
        return await self._reply(request, CompletionAnswer(await self._fields(request, COMPLETIONS)))

    async def create_response(self, request: Request) -> Response:
        fields = await self._fields(request, RESPONSES)
        owner = _owner(request)
        answer = ResponseAnswer(fields, self._previous(owner, fields), functools.partial(self._store.put, owner))
        if answer.is_background:
            return await self._begin_in_background(request, answer)
        return await self._reply(request, answer)

    async def _reply(self, request: Request, answer: Answer) -> Response:
        generation = self._generation(request, answer)
        with contextlib.ExitStack() as leaving:
            leaving.enter_context(generation)
            try:
                async with unless_gone(request.receive):
                    starts = await generation.start()
                    results = [] if answer.is_streamed else await generation.results()
            except NanoserveError as error:
                return _refusal(problem_of(error, answer.names))
            if answer.is_streamed:
                leaving.pop_all()
                return EventStream(generation, answer, starts, self._config.keep_alive_s)
        return _json(to_json(answer.whole(results)), {"x-request-id": starts[0].request_id})

    async def _begin_in_background(self, request: Request, answer: ResponseAnswer) -> Response:
        owner, generation = _owner(request), self._generation(request, answer)

        async def go_on() -> None:
            with generation:
                try:
                    answer.whole(await generation.results())
                except Exception as error:
                    if not isinstance(error, NanoserveError):
                        logger.exception("unexpected error")
                    answer.failed(problem_of(error, answer.names))

        with contextlib.ExitStack() as leaving:
            leaving.enter_context(generation)
            try:
                async with unless_gone(request.receive):
                    starts = await generation.start()
            except NanoserveError as error:
                return _refusal(problem_of(error, answer.names))
            leaving.pop_all()
        begun = answer.snapshot("in_progress")
        self._store.put(owner, answer.remembered(begun), asyncio.create_task(go_on()))
        return _json(to_json(begun), {"x-request-id": starts[0].request_id})

    def _generation(self, request: Request, answer: Answer) -> Generation:
        call = self._call_options(request)
        return Generation([self._client.generate_raw(each, **call) for each in answer.requests])

    # ------------------------------------------------------------------------------------ responses that are kept

    async def get_response(self, request: Request) -> Response:
        return _json(to_json(self._remembered(request).response))

    async def list_input_items(self, request: Request) -> Response:
        return JSONResponse(page_of(self._remembered(request).items, request.state.query))

    async def delete_response(self, request: Request) -> Response:
        remembered = self._remembered(request)
        self._stop(request)
        self._store.remove(_owner(request), remembered.response.id)
        return _json(json.dumps({"id": remembered.response.id, "object": "response", "deleted": True}))

    async def cancel_response(self, request: Request) -> Response:
        remembered = self._remembered(request)
        if not remembered.response.background:
            raise BadRequest([Violation("id", "only responses in the background can be cancelled")])
        if self._stop(request):
            cancelled = remembered.response.model_copy(update={"status": "cancelled"})
            remembered = Remembered(cancelled, remembered.items, remembered.messages)
            self._store.put(_owner(request), remembered)
        return _json(to_json(remembered.response))

    def _stop(self, request: Request) -> bool:
        """Whether it was running."""
        task = self._store.task(_owner(request), request.path_params["id"])
        return task is not None and task.cancel()

    def _remembered(self, request: Request) -> Remembered:
        """Raises HTTPException."""
        if (found := self._store.get(_owner(request), id := request.path_params["id"])) is None:
            raise HTTPException(404, NOT_KEPT.format(id=id))
        return found

    def _previous(self, owner: str, fields: Mapping[str, Any]) -> Remembered | None:
        """Raises BadRequest."""
        if (id := fields.get("previous_response_id")) is None:
            return None
        found = self._store.get(owner, id)
        if found is None:
            raise BadRequest([Violation("previous_response_id", NOT_KEPT.format(id=id))])
        if found.response.status not in ("completed", "incomplete"):
            raise BadRequest([Violation("previous_response_id", f"{id!r} is {found.response.status}")])
        return found

    # ------------------------------------------------------------------------------------------- models, tokens

    async def list_models(self, request: Request) -> Response:
        models = await self._client.list_models(**self._call_options(request))
        return JSONResponse({"object": "list", "data": [_model(model).to_dict() for model in models]})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for model in await self._client.list_models(**self._call_options(request)):
            if model.name == name:
                return JSONResponse(_model(model).to_dict())
        return _refusal(bad_request("model", f"no served model is called {name!r}", status=404, code="model_not_found"))

    async def tokenize(self, request: Request) -> Response:
        fields = await self._fields(request, TOKENIZE)
        if ("prompt" in fields) == ("messages" in fields):
            raise BadRequest([Violation("prompt", "either prompt or messages is required")])
        prompt = messages_of(fields["messages"]) if "messages" in fields else fields["prompt"]
        tokens = await self._client.tokenize(prompt, model=fields.get("model"), **self._call_options(request))
        texts = [token.decode("utf-8", "replace") for token in tokens.tokens]
        return JSONResponse({"count": len(texts), "tokens": tokens.token_ids, "token_strs": texts, "text": tokens.text})

    async def detokenize(self, request: Request) -> Response:
        fields = await self._fields(request, DETOKENIZE)
        call = self._call_options(request)
        text = await self._client.detokenize(fields["tokens"], model=fields.get("model"), **call)
        return JSONResponse({"prompt": text})

    # ------------------------------------------------------------------------------------------- the gateway itself

    async def health(self, _request: Request) -> Response:
        """200 once requests are served. Needs no key."""
        query = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
        try:
            answer = await self._health.Check(query, timeout=HEALTH_TIMEOUT_S)
            is_ready = answer.status == health_pb2.HealthCheckResponse.SERVING
        except grpc.aio.AioRpcError:
            is_ready = False
        return JSONResponse({"status": "ok" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": importlib.metadata.version("nanoserve-gateway")})

    async def docs(self, _request: Request) -> Response:
        return HTMLResponse(pages.html())

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(pages.openapi())

    # ------------------------------------------------------------------------------------------- what comes in

    async def _fields(self, request: Request, schema: Schema) -> dict[str, Any]:
        """Raises BadRequest, or HTTPException."""
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
                await self._client.list_models(**self._call_options(request))
            body += piece
            if len(body) > (most := self._config.max_body_bytes):
                raise HTTPException(413, f"the request has more than {most} bytes")
        return bytes(body)

    def _call_options(self, request: Request) -> CallOptions:
        """What travels beside the request; the service looks at it. Raises BadRequest."""
        options: CallOptions = {"timeout": self._timeout_s(request), "request_id": request.headers.get("x-request-id")}
        if not tracing.IS_INSTALLED:  # else the client sends that of its own span
            options["traceparent"] = request.headers.get("traceparent")
        if (authorization := request.headers.get("authorization")) is not None:
            options["metadata"] = {"authorization": authorization}
        for name in ("x-request-id", "traceparent", "authorization"):
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


def _owner(request: Request) -> str:
    return request.headers.get("authorization", "")


def _model(model: ServedModel) -> Model:
    return Model(id=model.name, object="model", created=int(model.create_time.timestamp()), owned_by="nanoserve")


def _json(text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text, media_type="application/json", headers=headers)


def _refusal(problem: Problem) -> Response:
    return JSONResponse(problem.as_json(), problem.status, headers=dict(problem.headers))


def _parse_query(schema: Schema, request: Request) -> dict[str, Any]:
    """Raises BadRequest. OpenAI's clients write a list as `name[]=a&name[]=b`."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise BadRequest([Violation(name, "is given more than once")])
        given[name.removesuffix("[]")] = value
    return schema.parse(given)


def _answering(
    endpoint: Callable[[Request], Awaitable[Response]], query: Schema
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, whose refusals are answers; it finds the checked parameters in request.state.query."""

    async def answer(request: Request) -> Response:
        try:
            request.state.query = _parse_query(query, request)
            return await endpoint(request)
        except (BadRequest, NanoserveError) as error:
            return _refusal(problem_of(error))
        except ClientDisconnect:
            # Nobody reads it.
            return Response(status_code=499)

    return answer


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = bad_request(None, error.detail, status=error.status_code, code=f"http_{error.status_code}")
    return JSONResponse(problem.as_json(), error.status_code, headers=error.headers)


async def _on_error(_request: Request, error: Exception) -> Response:
    logger.error("unexpected error", exc_info=error)
    return _refusal(problem_of(error))
