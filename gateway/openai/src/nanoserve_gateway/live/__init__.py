"""The live view: a page at / that draws what the engine does, and the data that it reads.

    WatchEngine ──▶ /live/events, server-sent events ──▶ page.js ──▶ draw.js: lanes, KV map, queue
    ExplainRequest ─▶ /live/explain                  ──▶ page.js

The page itself tells nothing, and anyone may load it. Its data is AdminService's: with API keys the page asks for an
admin key, and sends it as any caller does. Neither prompts nor completions are in it. No other site's page may read it,
whatever origins may call the API.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from nanoserve_client import (
    AsyncClient,
    AsyncEngineWatch,
    EngineSnapshot,
    NanoserveError,
    SequenceSnapshot,
    StepSnapshot,
    Timeline,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanoserve_gateway.answer import frame
from nanoserve_gateway.errors import Refused, bad_request, problem_of
from nanoserve_gateway.streaming import Events, Write, until

# Between two snapshots.
INTERVAL_S = 0.2
FILES = {"/": "index.html", "/live/style.css": "style.css", "/live/page.js": "page.js", "/live/draw.js": "draw.js"}
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes(client: Callable[[], AsyncClient]) -> list[Route]:
    """`client`: that of the gRPC service, once the application has started."""

    async def events(request: Request) -> Response:
        watch = client().watch_engine(
            interval=INTERVAL_S, metadata=_authorization(request), request_id=request.state.request_id
        )
        # A refusal is the answer's status.
        first = await anext(watch)
        return _Events(watch, first, request.app.state.is_stopping)

    async def explain(request: Request) -> Response:
        if not (id := request.query_params.get("id")):
            raise Refused(bad_request("id", "is required"))
        timelines = await client().explain_request(
            id, metadata=_authorization(request), request_id=request.state.request_id
        )
        return JSONResponse(
            {"timelines": [_timeline(each) for each in timelines]}, headers={"cache-control": "no-store"}
        )

    return [
        *(Route(path, _file(name), methods=["GET"]) for path, name in FILES.items()),
        Route("/live/events", _for_the_page(events), methods=["GET"]),
        Route("/live/explain", _for_the_page(explain), methods=["GET"]),
    ]


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(__name__).joinpath(name).read_bytes()
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]

    async def file(_request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return file


def _for_the_page(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint for the page alone, whichever others may call the API."""

    async def answer(request: Request) -> Response:
        if _is_foreign(request):
            why = "only the page at / may read this"
            raise Refused(bad_request("header origin", why, status=403, code="foreign_origin"))
        return await endpoint(request)

    return answer


def _is_foreign(request: Request) -> bool:
    """Whether another site's page asks. Programs that are no browser send neither header."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def _authorization(request: Request) -> Mapping[str, str]:
    value = request.headers.get("authorization")
    # What could not be sent on is no key.
    return {"authorization": value} if value is not None and value.isascii() and value.isprintable() else {}


# ---------------------------------------------------------------------------------------------- as the page reads it


class _Events(Events):
    """Snapshots, until the reader goes away, the server does, or the gateway stops."""

    def __init__(self, watch: AsyncEngineWatch, first: EngineSnapshot, is_stopping: asyncio.Event) -> None:
        super().__init__()
        self._watch, self._first, self._is_stopping = watch, first, is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._watch:
            await super().__call__(scope, receive, send)

    async def write_all(self, write: Write) -> None:
        """Pulls a snapshot when the one before has been sent, so that a slow reader gets fewer."""
        async with until(self._is_stopping.wait):
            await write(frame(_snapshot(self._first), "snapshot"))
            try:
                async for snapshot in self._watch:
                    await write(frame(_snapshot(snapshot), "snapshot"))
            except NanoserveError as error:
                await write(frame(problem_of(error).as_json(), "problem"))


def _snapshot(snapshot: EngineSnapshot) -> dict[str, Any]:
    stats = snapshot.stats
    return {
        "stats": {
            "running": stats.running,
            "waiting": stats.waiting,
            "blocks": stats.kv_blocks_total,
            "used_blocks": stats.kv_blocks_used,
            "cached_blocks": stats.kv_blocks_cached,
            "block_tokens": stats.kv_block_tokens,
            "hit_ratio": stats.prefix_hit_ratio,
            "acceptance_ratio": stats.draft_acceptance_ratio,
            "tokens_per_second": stats.tokens_per_second,
            "preemptions": stats.preemptions,
        },
        "sequences": [_sequence(each) for each in snapshot.sequences],
        "cached": list(_ranges(snapshot.cached_block_ids)),
        "steps": [_step(each) for each in snapshot.steps],
        "lost_steps": snapshot.lost_steps,
    }


def _sequence(sequence: SequenceSnapshot) -> dict[str, Any]:
    return {
        "number": sequence.request_number,
        "id": sequence.request_id,
        "index": sequence.index,
        "phase": sequence.phase.value,
        "prompt": sequence.prompt_tokens,
        "cached": sequence.cached_tokens,
        "computed": sequence.computed_tokens,
        "completion": sequence.completion_tokens,
        "max_completion": sequence.max_completion_tokens,
        "blocks": sequence.block_ids,
        "age_s": round(sequence.age_s, 3),
        "preemptions": sequence.preemptions,
        "adapter": sequence.adapter,
    }


def _step(step: StepSnapshot) -> dict[str, Any]:
    return {
        "number": step.number,
        "ms": round(step.duration_s * 1000, 2),
        # Many, so without names.
        "parts": [
            [p.request_number, p.index, p.start, p.tokens, p.prompt_tokens, p.draft_tokens, p.accepted_draft_tokens]
            for p in step.parts
        ],
        "preemptions": [[p.request_number, p.index, p.for_request_number] for p in step.preemptions],
        # What the head of the queue waits for, in words.
        "wait": step.wait and step.wait.text,
        "running": step.running,
        "waiting": step.waiting,
        "failed": step.failed,
    }


def _ranges(ids: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of ascending ids."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield ids[start], i - start
            start = i


def _timeline(timeline: Timeline) -> dict[str, Any]:
    return {
        "id": timeline.request_id,
        "duration_s": timeline.duration_s,
        "ended": timeline.ended,
        "summary": timeline.summary,
        "entries": [
            {
                "start_s": entry.start_s,
                "duration_s": entry.duration_s,
                "text": entry.text,
                "kind": type(entry.event).__name__.removeprefix("Timeline").lower(),
            }
            for entry in timeline.entries
        ],
    }
