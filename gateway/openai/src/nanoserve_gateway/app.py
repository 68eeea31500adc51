"""The ASGI application: paths, headers and status codes; all that an answer says comes from the pure modules.

    body ─▶ Schema.parse ─▶ ChatAnswer | CompletionAnswer | ResponseAnswer ─▶ Generate ─▶ one object, or frames

It holds no state but the responses that are to be retrieved, and decides nothing: keys, models, limits and the queue
are the gRPC service's.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoserve_client import AsyncClient, NanoserveError, Result, Tokens, transport
from nanoserve_client import Model as ServedModel
from nanoserve_client.requests import Messages
from nanoserve_client.transport import REQUEST_ID_HEADER
from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from nanoserve_gateway import live, pages, pieces, tracing
from nanoserve_gateway.answer import OF_CHAT, Answer, Prompt, check, to_json, tokenize_options
from nanoserve_gateway.chat import ChatAnswer, messages_of, names_of_functions
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.conversations import Conversations
from nanoserve_gateway.edge import Pages, RequestIds
from nanoserve_gateway.errors import Problem, Refused, bad_request, is_own, names_of_prompt, problem_of, refused
from nanoserve_gateway.exchange import Incoming, json_answer, parse_query
from nanoserve_gateway.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    LOAD_ADAPTER,
    NO_QUERY,
    QUERIES,
    TOKENIZE,
    UNLOAD_ADAPTER,
)
from nanoserve_gateway.refusals import Refusals
from nanoserve_gateway.schema import BadRequest, Schema, Violation
from nanoserve_gateway.streaming import EventStream, Generation, all_of, unless_gone
from nanoserve_gateway.tools import Tools

# Of an answer. A thousand take some 5 ms.
LARGE_NUM_LOGPROBS = 2000
HEALTH_TIMEOUT_S = 2.0
# What the contract calls otherwise than those who load adapters.
ADAPTER_NAMES = {"name": "lora_name", "path": "lora_path", "replace": "load_inplace"}
HEALTH_SERVICE = "nanoserve.v1.GenerationService"

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

logger = logging.getLogger(__name__)


def build_app(
    config: GatewayConfig, routes: Sequence[BaseRoute] = (), meter_provider: "MeterProvider | None" = None
) -> Starlette:
    """The application; it connects when it starts. routes: further ones, beside the API's. meter_provider: as Refusals
    takes it.

    Who runs it sets `state.is_stopping`, an event, when it takes no more requests: streams without an end of their own
    then end.
    """
    gateway = Gateway(config)
    refusals = Refusals(meter_provider)
    origins = list(config.cors_origins)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, "retry-after", "retry-after-ms"],
    )

    async def on_refusal(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if is_own(error):
            refusals.note(request.scope, problem)
        return _answer_of(problem)

    app = Starlette(
        routes=[*gateway.routes(), *live.routes(gateway.client), *routes],
        lifespan=gateway.lifespan,
        middleware=[
            Middleware(RequestIds),
            Middleware(Pages, config.host, config.cors_origins, refusals),
            Middleware(tracing.Tracing),
            *([cors] if origins else []),
        ],
        exception_handlers={
            **dict.fromkeys((BadRequest, HTTPException, NanoserveError, Refused), on_refusal),
            Exception: _on_error,
        },
    )
    app.state.is_stopping = asyncio.Event()
    return app


class Gateway:
    """The endpoints. Event loop thread."""

    _client: AsyncClient
    _health: health_pb2_grpc.HealthStub

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._incoming = Incoming(config, self.client)
        self._conversations = Conversations(config, self._incoming, self.client, self._generation, self._reply)

    def client(self) -> AsyncClient:
        """Of the gRPC service, once the application has started."""
        return self._client

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            query = QUERIES.get((method, path), NO_QUERY)
            return Route(path, _answering(endpoint, query), methods=[method])

        conversations = self._conversations
        return [
            route("POST", "/v1/chat/completions", self.create_chat),
            route("POST", "/v1/completions", self.create_completion),
            route("POST", "/v1/responses", conversations.create),
            route("POST", "/v1/responses/input_tokens", conversations.count_tokens),
            route("GET", "/v1/responses/{id}", conversations.get),
            route("DELETE", "/v1/responses/{id}", conversations.delete),
            route("POST", "/v1/responses/{id}/cancel", conversations.cancel),
            route("GET", "/v1/responses/{id}/input_items", conversations.list_input_items),
            route("GET", "/v1/models", self.list_models),
            route("GET", "/v1/models/{name:path}", self.get_model),
            route("POST", "/tokenize", self.tokenize),
            route("POST", "/detokenize", self.detokenize),
            route("POST", "/v1/load_lora_adapter", self.load_adapter),
            route("POST", "/v1/unload_lora_adapter", self.unload_adapter),
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
        answer = ChatAnswer(await self._incoming.fields(request, CHAT))
        return await self._reply(request, answer, answer.prompts)

    async def create_completion(self, request: Request) -> Response:
        answer = CompletionAnswer(await self._incoming.fields(request, COMPLETIONS))
        return await self._reply(request, answer, answer.prompts)

    async def _reply(self, request: Request, answer: Answer, prompts: Sequence[Prompt] = ()) -> Response:
        """prompts: those of which the answer may tell more than was sent."""
        generation = self._generation(request, answer, prompts)
        with contextlib.ExitStack() as leaving:
            leaving.enter_context(generation)
            try:
                async with unless_gone(request.receive):
                    starts = await generation.start()
                    await self._tokenize_told(request, prompts)
                    results = [] if answer.is_streamed else await generation.results()
            except NanoserveError as error:
                names = {**answer.names, **names_of_prompt(generation.failed_prompt, len(answer.requests))}
                raise refused(error, names, len(answer.requests)) from error
            if answer.is_streamed:
                leaving.pop_all()
                return EventStream(generation, answer, starts, self._config.keep_alive_s)
        return json_answer(await _written(answer, results))

    def _generation(self, request: Request, answer: Answer, prompts: Sequence[Prompt] = ()) -> Generation:
        call = self._incoming.call_options(request)
        return Generation([self._client.generate_raw(each, **call) for each in answer.requests], prompts)

    async def _tokenize_told(self, request: Request, prompts: Sequence[Prompt]) -> None:
        """So that answers can tell the ids. The service would tell them with log-probabilities too, but to compute
        those it takes the whole vocabulary for each token of the prompt, and no prefix from the cache.

        Raises NanoserveError.
        """

        async def tokenize(prompt: Prompt) -> None:
            given = cast(Messages, prompt.given)  # other than token ids, which are known
            options: dict[str, Any] = {**prompt.options, **self._incoming.call_options(request)}
            tokens = await self._client.tokenize(given, **options)
            prompt.token_ids = tokens.token_ids

        await all_of([tokenize(prompt) for prompt in prompts if prompt.is_told and prompt.token_ids is None])

    # ------------------------------------------------------------------------------------------- models, tokens

    async def list_models(self, request: Request) -> Response:
        models = await self._client.list_models(**self._incoming.call_options(request))
        return JSONResponse({"object": "list", "data": [_model(model) for model in models]})

    async def get_model(self, request: Request) -> Response:
        if not (name := request.path_params["name"]):  # many a client ends the list's path with a stroke
            return await self.list_models(request)
        for model in await self._client.list_models(**self._incoming.call_options(request)):
            if model.name == name:
                return JSONResponse(_model(model))
        why = f"no served model is called {name!r}"
        raise Refused(bad_request("model", why, status=404, code="model_not_found"))

    async def tokenize(self, request: Request) -> Response:
        fields = await self._incoming.fields(request, TOKENIZE)
        if ("prompt" in fields) == ("messages" in fields):
            raise BadRequest([Violation("prompt", "either prompt or messages is required")])
        is_text = "prompt" in fields
        check(*((is_text and name in fields, name, "is for messages only") for name in (*OF_CHAT, "tools")))
        tools = Tools(fields)
        prompt = fields["prompt"] if is_text else messages_of(fields["messages"])
        options: dict[str, Any] = {**tokenize_options(fields), **tools.tokenize_options}
        options |= self._incoming.call_options(request)
        try:
            tokens = await self._client.tokenize(prompt, **options)
        except NanoserveError as error:
            raise refused(
                error, {} if is_text else {**tools.names, **names_of_functions(fields["messages"])}
            ) from error
        models = await self._client.list_models(**self._incoming.call_options(request))
        name = fields.get("model") or models[0].name
        most = next(model.max_context_tokens for model in models if model.name == name)
        has_texts = fields.get("return_token_strs", True)
        return json_answer(await asyncio.to_thread(_tokens_json, tokens, most, has_texts=has_texts))

    async def detokenize(self, request: Request) -> Response:
        fields = await self._incoming.fields(request, DETOKENIZE)
        call = self._incoming.call_options(request)
        try:
            text = await self._client.detokenize(fields["tokens"], model=fields.get("model"), **call)
        except NanoserveError as error:
            raise refused(error, {"token_ids": "tokens"}) from error
        return JSONResponse({"prompt": text})

    # ------------------------------------------------------------------------------------------- adapters

    async def load_adapter(self, request: Request) -> Response:
        """Asked and answered as vLLM's is."""
        fields = await self._incoming.fields(request, LOAD_ADAPTER)
        name, path = fields["lora_name"], fields.get("lora_path", "")
        call, replace = self._incoming.call_options(request), fields.get("load_inplace", False)
        try:
            await self._client.load_adapter(name, path, replace=replace, **call)
        except NanoserveError as error:
            raise refused(error, ADAPTER_NAMES) from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """Asked and answered as vLLM's is."""
        name = (await self._incoming.fields(request, UNLOAD_ADAPTER))["lora_name"]
        try:
            await self._client.unload_adapter(name, **self._incoming.call_options(request))
        except NanoserveError as error:
            raise refused(error, ADAPTER_NAMES) from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

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


def _model(model: ServedModel) -> dict[str, Any]:
    """As OpenAI has it, and with what clients of vLLM's read."""
    created = int(model.create_time.timestamp())
    named = Model(id=model.name, object="model", created=created, owned_by="nanoserve")
    permission = {
        "id": f"modelperm-{model.name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    more = {
        "root": model.name,
        "parent": model.base_model or None,
        "max_model_len": model.max_context_tokens,
        "permission": [permission],
    }
    return {**named.to_dict(), **more}


def _tokens_json(tokens: Tokens, max_context_tokens: int, *, has_texts: bool) -> bytes:
    return pieces.of_members(
        {
            "count": b"%d" % len(tokens.token_ids),
            "max_model_len": b"%d" % max_context_tokens,
            "tokens": pieces.array(tokens.token_ids),
            "token_strs": pieces.array(tokens.tokens, _text_of_bytes) if has_texts else b"null",
            "text": pieces.text(tokens.text),
        }
    )


def _text_of_bytes(token: bytes) -> str:
    return token.decode("utf-8", "replace")


async def _written(answer: Answer, results: Sequence[Result]) -> str:
    """An answer that is not streamed. Many log-probabilities are written on a thread, so that other streams go on."""
    told = [each.logprobs for result in results for each in result.completions]
    told += [result.prompt_logprobs for result in results]
    num_logprobs = sum(1 + len(token.top) for tokens in told for token in tokens)
    if num_logprobs < LARGE_NUM_LOGPROBS:
        return to_json(answer.whole(results))
    return await asyncio.to_thread(lambda: to_json(answer.whole(results)))


def _answer_of(problem: Problem) -> Response:
    return JSONResponse(problem.as_json(), problem.status, headers=dict(problem.headers))


def _answering(
    endpoint: Callable[[Request], Awaitable[Response]], query: Schema
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, which finds the checked parameters in request.state.query."""

    async def answer(request: Request) -> Response:
        try:
            request.state.query = parse_query(query, request)
            return await endpoint(request)
        except ClientDisconnect:
            # Nobody reads it.
            return Response(status_code=499)

    return answer


async def _on_error(request: Request, error: Exception) -> Response:
    logger.error("request %s: unexpected error", request.state.request_id, exc_info=error)
    answer = _answer_of(problem_of(error))
    # It is made outside of all middleware.
    answer.headers[REQUEST_ID_HEADER] = request.state.request_id
    return answer
