"""GenerationService: one RPC, one engine request."""

import contextlib
import time
from collections.abc import Callable, Iterable

from nanoserve_client.transport import REQUEST_ID_HEADER
from nanoserve_client.v1 import generation_pb2

from nanoserve.engine.engine import Engine
from nanoserve.engine.stream import Delta, Finished, PromptLogprobs, Started, StreamEvent
from nanoserve.rpc import messages, validate
from nanoserve.rpc.call import Call, off_loop


class GenerationService:
    """Streams what the engine makes of a request. Event loop thread; keeps nothing between calls.

    Nothing is sent before the engine's first event, so that every rejection is trailers-only and safe to retry.
    However an RPC ends, the engine's stream is closed, which frees the request's blocks.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        """`engine` raises NotReady until there is one."""
        self._engine = engine

    async def Generate(self, request: generation_pb2.GenerateRequest, call: Call) -> None:
        arrival_s = time.time()
        engine = self._engine()
        asked = await off_loop(validate.generation, request, engine)
        events = engine.generate(
            asked.prompt,
            asked.params,
            label=call.request_id,
            priority=request.priority,
            timeout_s=call.context.time_remaining(),
            cache_salt=_cache_salt(call.principal, request.cache.salt),
            skip_cache_read=request.cache.skip_read,
            add_special_tokens=asked.add_special_tokens,
            wanted=asked.wanted,
            adapter=asked.adapter,
            min_delta_tokens=request.output.min_delta_tokens,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Started):
                    await call.context.send_initial_metadata(((REQUEST_ID_HEADER, call.request_id),))
                for message in _messages(event, engine, call, arrival_s):
                    await call.context.write(message)


def _messages(
    event: StreamEvent, engine: Engine, call: Call, arrival_s: float
) -> Iterable[generation_pb2.GenerateResponse]:
    match event:
        case Started():
            model = engine.model.name
            return [messages.started(event, request_id=call.request_id, model=model, arrival_s=arrival_s)]
        case PromptLogprobs():
            return messages.prompt_logprobs(event, engine.codec.token_bytes)
        case Delta():
            return [messages.delta(event, engine.codec.token_bytes)]
        case Finished():
            return [messages.finished(event)]


def _cache_salt(principal: str, salt: str) -> str:
    """Callers with different keys never share a prefix, whatever salt they choose."""
    return f"{principal}:{salt}" if principal or salt else ""
