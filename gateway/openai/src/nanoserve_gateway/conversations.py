"""The endpoints of /v1/responses: answers that are kept, continued, and go on in the background."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from nanoserve_client import AsyncClient, Delta, NanoserveError, Started
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanoserve_gateway.answer import Answer, check, to_json, tokenize_options
from nanoserve_gateway.background import RecordedStream
from nanoserve_gateway.config import GatewayConfig
from nanoserve_gateway.errors import Refused, bad_request, problem_of, refused
from nanoserve_gateway.exchange import Incoming, json_answer, owner_of
from nanoserve_gateway.fields import INPUT_TOKENS, RESPONSES
from nanoserve_gateway.items import conversation, items_of, page_of, places, turns_of
from nanoserve_gateway.responses import Remembered, ResponseAnswer
from nanoserve_gateway.schema import BadRequest, Violation
from nanoserve_gateway.store import ResponseStore
from nanoserve_gateway.streaming import Generation, unless_gone
from nanoserve_gateway.tools import Tools

NOT_KEPT = "no response {id!r} is kept: it has not ended, was not stored, was deleted, or made room for others"
# So long a caller waits to hear whether a response in the background is refused; then it is queued.
QUEUED_AFTER_S = 1.0

logger = logging.getLogger(__name__)


class Conversations:
    """Holds the responses that are kept. Event loop thread."""

    def __init__(
        self,
        config: GatewayConfig,
        incoming: Incoming,
        client: Callable[[], AsyncClient],
        generate: Callable[[Request, Answer], Generation],
        reply: Callable[[Request, Answer], Awaitable[Response]],
    ) -> None:
        """generate: begins the calls of an answer. reply: the same, and gives it, streamed or not."""
        self._incoming, self._client, self._generate, self._reply = incoming, client, generate, reply
        self._keep_alive_s = config.keep_alive_s
        self._store = ResponseStore(config.max_stored_responses, config.max_stored_bytes)

    async def create(self, request: Request) -> Response:
        fields = await self._incoming.fields(request, RESPONSES)
        owner = owner_of(request)
        fields["input"] = self._resolved(owner, fields["input"])
        if fields.get("background") and not fields.get("model"):
            # The answer is there before the service has named the model.
            fields["model"] = (await self._client().list_models(**self._incoming.call_options(request)))[0].name
        answer = ResponseAnswer(fields, self._previous(owner, fields), self._keep(owner, fields))
        if answer.is_background:
            return await self._begin_in_background(request, answer)
        return await self._reply(request, answer)

    async def _begin_in_background(self, request: Request, answer: ResponseAnswer) -> Response:
        owner, generation = owner_of(request), self._generate(request, answer)
        with contextlib.ExitStack() as leaving:
            leaving.enter_context(generation)
            starting = asyncio.create_task(generation.start())
            leaving.callback(starting.cancel)
            async with unless_gone(request.receive):
                await asyncio.wait([starting], timeout=QUEUED_AFTER_S)
            if starting.done() and isinstance(error := starting.exception(), NanoserveError):
                raise refused(error, answer.names)
            leaving.pop_all()
        queued = answer.remembered(answer.snapshot("queued"))
        if answer.recording is not None:
            answer.recording.write(answer.queue())
        self._store.put(owner, queued, asyncio.create_task(self._go_on(owner, answer, generation, starting)))
        if answer.recording is not None:
            return RecordedStream(answer.recording, 0, self._keep_alive_s)
        return json_answer(to_json(queued.response))

    async def _go_on(
        self,
        owner: str,
        answer: ResponseAnswer,
        generation: Generation,
        starting: "asyncio.Task[list[Started]]",
    ) -> None:
        """The answer in the background, to its end."""
        record = _pass_over if answer.recording is None else answer.recording.write

        async def take(prompt: int, delta: Delta) -> None:
            record(answer.delta(prompt, delta))

        with generation:
            try:
                starts = await starting
                begun = answer.remembered(answer.begun(starts[0]))
                self._store.put(owner, begun, asyncio.current_task())
                record(answer.begin(starts))
                record(answer.end(await generation.read(take)))
            except Exception as error:
                if not isinstance(error, NanoserveError):
                    logger.exception("unexpected error")
                record(answer.fail(problem_of(error, answer.names)))
            finally:
                if answer.recording is not None:
                    answer.recording.end()

    async def count_tokens(self, request: Request) -> Response:
        fields = await self._incoming.fields(request, INPUT_TOKENS)
        owner = owner_of(request)
        tools = Tools(fields, strict=True)
        check(*tools.rules)
        turns = turns_of(items_of(self._resolved(owner, fields.get("input", ()))))
        previous = self._previous(owner, fields)
        before = previous.messages if previous else ()
        messages = [*before, *(turn.message for turn in turns)]
        options: dict[str, Any] = {**tokenize_options(fields), **tools.tokenize_options}
        options |= self._incoming.call_options(request)
        try:
            tokens = await self._client().tokenize(conversation(fields, messages), **options)
        except NanoserveError as error:
            raise refused(error, {**tools.names, **places(fields, len(before), turns)}) from error
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(tokens.token_ids)})

    async def get(self, request: Request) -> Response:
        remembered, query = self._remembered(request), request.state.query
        is_streamed = query.get("stream", False)
        check(
            (is_streamed and remembered.recording is None, "stream", "is for what was streamed in the background"),
            ("starting_after" in query and not is_streamed, "starting_after", "is for stream only"),
        )
        if is_streamed and remembered.recording is not None:
            start = query.get("starting_after", -1) + 1
            return RecordedStream(remembered.recording, start, self._keep_alive_s)
        return json_answer(to_json(remembered.response))

    async def list_input_items(self, request: Request) -> Response:
        return JSONResponse(page_of(self._remembered(request).items, request.state.query))

    async def delete(self, request: Request) -> Response:
        remembered = self._remembered(request)
        self._stop(request)
        self._store.remove(owner_of(request), remembered.response.id)
        return json_answer(json.dumps({"id": remembered.response.id, "object": "response", "deleted": True}))

    async def cancel(self, request: Request) -> Response:
        remembered = self._remembered(request)
        if not remembered.response.background:
            raise BadRequest([Violation("id", "only responses in the background can be cancelled")])
        if self._stop(request):
            cancelled = remembered.response.model_copy(update={"status": "cancelled"})
            remembered = dataclasses.replace(remembered, response=cancelled)
            self._store.put(owner_of(request), remembered)
        return json_answer(to_json(remembered.response))

    def _stop(self, request: Request) -> bool:
        """Whether it was running."""
        task = self._store.task(owner_of(request), request.path_params["id"])
        return task is not None and task.cancel()

    def _remembered(self, request: Request) -> Remembered:
        """Raises HTTPException."""
        if (found := self._store.get(owner_of(request), id := request.path_params["id"])) is None:
            raise HTTPException(404, NOT_KEPT.format(id=id))
        return found

    def _keep(self, owner: str, fields: Mapping[str, Any]) -> Callable[[Remembered], object]:
        """What keeps the answer to a request. It may be called on another thread, unless it is in the background."""
        put = functools.partial(self._store.put, owner)
        if fields.get("background"):
            return put
        loop = asyncio.get_running_loop()
        return lambda remembered: loop.call_soon_threadsafe(put, remembered)

    def _resolved(self, owner: str, given: str | Sequence[Mapping[str, Any]]) -> str | Sequence[Mapping[str, Any]]:
        """The input of a request, in which no item refers to one that is kept. Raises Refused."""
        return given if isinstance(given, str) else [self._item(owner, place, item) for place, item in enumerate(given)]

    def _item(self, owner: str, place: int, item: Mapping[str, Any]) -> Mapping[str, Any]:
        if "role" in item or item.get("type", "item_reference") != "item_reference":
            return item
        if (found := self._store.item(owner, item["id"])) is None:
            why = f"no item {item['id']!r} is kept: its response was deleted, or made room for others"
            raise Refused(bad_request(f"input[{place}]", why, status=404, code="item_not_found"))
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


def _pass_over(frames: Iterable[bytes]) -> None:
    for _ in frames:
        pass
