"""The engine's asyncio face: generate, tokenize, cancel, drain.

caller ── generate() ──▶ encode (worker thread) ──▶ core.post(Request)
caller ◀── RequestStream ◀── text ◀── one call of _deliver per step, for all requests ◀── engine thread
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nanoserve.engine.core import EngineCore
from nanoserve.engine.scheduler import SchedulerStats
from nanoserve.engine.stream import RequestStream, StreamEvent
from nanoserve.engine.text import Chat, TextCodec
from nanoserve.request import (
    Abort,
    CacheWasReset,
    CancelledByOperator,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    Event,
    FailureReason,
    InvalidRequest,
    NotReady,
    Overloaded,
    Request,
    RequestError,
    RequestFailed,
    RequestStarted,
    ResetCache,
    SamplingParams,
    SequenceOutput,
    Violation,
)

logger = logging.getLogger(__name__)

# A prompt: text as it is, token ids as they are, or a conversation for the chat template.
Prompt = str | list[int] | Chat

RETRY_AFTER_S = 1.0
# Window of Stats.tokens_per_s and of Stats.prefix_hit_ratio.
THROUGHPUT_WINDOW_S = 10
HIT_RATIO_WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What callers may know of the model."""

    name: str
    # Unix time.
    create_time_s: float
    # Prompt and completion together.
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    # What an unset sampling parameter takes.
    default_params: SamplingParams


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot for the operator."""

    scheduler: SchedulerStats
    # Cached / prompt tokens of the requests begun in the last minute; 0 if none.
    prefix_hit_ratio: float
    # Generated, over the last 10 s.
    tokens_per_s: float
    uptime_s: float


class RollingSum:
    """A sum over the last `window_s` seconds, kept by the second."""

    def __init__(self, window_s: int) -> None:
        self._window_s = window_s
        # (second, sum), oldest first.
        self._buckets: deque[tuple[int, int]] = deque()

    def add(self, value: int) -> None:
        """Count `value` now."""
        second = int(time.monotonic())
        if self._buckets and self._buckets[-1][0] == second:
            value += self._buckets.pop()[1]
        self._buckets.append((second, value))
        self._drop_old()

    @property
    def total(self) -> int:
        self._drop_old()
        return sum(value for _, value in self._buckets)

    def _drop_old(self) -> None:
        while self._buckets and self._buckets[0][0] <= int(time.monotonic()) - self._window_s:
            self._buckets.popleft()


class Engine:
    """Admits requests, turns tokens to text, and ends what nobody waits for. Event loop only.

    Every request that was posted to the core is either over or aborted when its `generate` ends, however it ends.
    """

    def __init__(
        self, core: EngineCore, codec: TextCodec, model: ServedModel, *, max_waiting: int, step_timeout_s: float
    ) -> None:
        self.model = model
        self.codec = codec
        self._core = core
        self._max_waiting = max_waiting
        self._step_timeout_s = step_timeout_s
        # Encoding of prompts: long ones must not hold up the event loop.
        self._text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nanoserve-text")
        self._ids = itertools.count(1)
        # Of requests that were posted and are not over.
        self._streams: dict[str, RequestStream] = {}
        # Set when the last stream ends.
        self._is_idle = asyncio.Event()
        # Requests that are encoded or wait for their first step.
        self._num_waiting = 0
        self._cache_resets: deque[asyncio.Future[int]] = deque()
        self._is_draining = False
        self._started_s = time.monotonic()
        self._generated_tokens = RollingSum(THROUGHPUT_WINDOW_S)
        self._prompt_tokens = RollingSum(HIT_RATIO_WINDOW_S)
        self._cached_tokens = RollingSum(HIT_RATIO_WINDOW_S)

    def start(self) -> None:
        """Start the engine thread; call it on the event loop that will serve."""
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event]) -> None:
            if events and not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, events)

        self._core.start(deliver)

    async def close(self) -> None:
        """Stop the engine thread after its current step; what still runs fails."""
        await asyncio.to_thread(self._core.stop)
        self._text_threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------- requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        label: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
        skip_cache_read: bool = False,
        min_delta_tokens: int = 0,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a request: Started, PromptLogprobs, Deltas, Finished.

        Closing the iterator, or cancelling the task that reads it, aborts the request. `label` is the caller's id for
        it, `timeout_s` its hard deadline.

        Raises a RequestError: before Started if it is refused (InvalidRequest, ContextLengthExceeded, Overloaded,
        NotReady), at any time if it fails (DeadlineExceeded, CancelledByOperator, EngineFailure, NotReady).
        """
        arrival_s = time.monotonic()
        self._check_admission()
        stream = None
        self._num_waiting += 1
        try:
            token_ids, _ = await self.tokenize(prompt)
            request = self._make_request(
                token_ids, params, arrival_s, timeout_s, priority, cache_salt, skip_cache_read=skip_cache_read
            )
            # Draining may have begun while the prompt was encoded.
            self._check_ready()
            stream = RequestStream(request, self.codec, label=label, min_delta_tokens=min_delta_tokens)
            self._streams[request.id] = stream
            self._is_idle.clear()
            self._core.post(request)
            async for event in stream.read():
                yield event
        finally:
            if stream is None or not stream.has_started:
                self._num_waiting -= 1
            if stream is not None:
                del self._streams[stream.request.id]
                if not stream.is_over:
                    self._core.post(Abort(stream.request.id))
                if not self._streams:
                    self._is_idle.set()

    def _check_ready(self) -> None:
        # A stalled step may yet end, so requests may queue behind it; a dead thread and a drain are final.
        if self._is_draining or not self._core.is_alive:
            raise NotReady(self.health() or "", RETRY_AFTER_S)

    def _check_admission(self) -> None:
        self._check_ready()
        if self._num_waiting >= self._max_waiting:
            raise Overloaded(self._max_waiting, RETRY_AFTER_S)

    def _make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        arrival_s: float,
        timeout_s: float | None,
        priority: int,
        cache_salt: str,
        *,
        skip_cache_read: bool,
    ) -> Request:
        if len(token_ids) >= self.model.max_context_tokens:
            raise ContextLengthExceeded(len(token_ids), self.model.max_context_tokens)
        if timeout_s is not None and time.monotonic() >= arrival_s + timeout_s:
            raise DeadlineExceeded("waiting", 0)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        return Request(
            id=f"{next(self._ids)}",
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(self.model.eos_token_ids),
            priority=priority,
            arrival_s=arrival_s,
            deadline_s=None if timeout_s is None else arrival_s + timeout_s,
            time_limit_s=None if params.time_limit_s is None else arrival_s + params.time_limit_s,
            cache_salt=cache_salt,
            skip_cache_read=skip_cache_read,
        )

    async def tokenize(self, prompt: Prompt) -> tuple[list[int], str]:
        """Token ids of a prompt as `generate` sees them, and the text they were made of.

        Raises InvalidRequest for a prompt of no tokens, or a conversation that the template refuses.
        """
        if isinstance(prompt, list):
            return prompt, ""
        loop = asyncio.get_running_loop()
        token_ids, text = await loop.run_in_executor(self._text_threads, self.codec.encode_prompt, prompt)
        if not token_ids:
            name = "chat" if isinstance(prompt, Chat) else "text"
            raise InvalidRequest([Violation(name, "the prompt has no tokens; at least one is needed")])
        return token_ids, text

    # ------------------------------------------------------------------------------------------- operator

    def cancel(self, label: str) -> int:
        """End every request that bears the caller's label; their callers get CancelledByOperator."""
        streams = [stream for stream in self._streams.values() if stream.label == label]
        for stream in streams:
            self._give_up(stream, CancelledByOperator())
        return len(streams)

    async def reset_cache(self) -> int:
        """Forget all cached prefixes between two steps; returns the number of blocks that became free."""
        self._check_ready()
        future = asyncio.get_running_loop().create_future()
        self._cache_resets.append(future)
        self._core.post(ResetCache())
        return int(await future)

    def stats(self) -> Stats:
        """A snapshot, as of the last step."""
        num_prompt_tokens = self._prompt_tokens.total
        return Stats(
            scheduler=self._core.stats,
            prefix_hit_ratio=self._cached_tokens.total / num_prompt_tokens if num_prompt_tokens else 0.0,
            tokens_per_s=self._generated_tokens.total / THROUGHPUT_WINDOW_S,
            uptime_s=time.monotonic() - self._started_s,
        )

    def health(self) -> str | None:
        """None if requests are served; else why not."""
        if self._is_draining:
            return "it is draining"
        if not self._core.is_alive:
            return "the engine thread has died"
        if self._core.stalled_s > self._step_timeout_s:
            return f"no step has ended for {self._core.stalled_s:.0f} s"
        return None

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the running ones; those that outlast the time-out fail with NotReady."""
        self._is_draining = True
        if self._streams:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        for stream in list(self._streams.values()):
            self._give_up(stream, NotReady("it is shutting down", RETRY_AFTER_S))

    # ------------------------------------------------------------------------------------------- delivery

    def _deliver(self, events: list[Event]) -> None:
        """Hand a step's events to their streams."""
        for event in events:
            if isinstance(event, CacheWasReset):
                future = self._cache_resets.popleft()
                if not future.done():
                    future.set_result(event.num_freed_blocks)
                continue
            # Unknown ids are requests that were aborted while the step ran.
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            try:
                self._deliver_one(stream, event)
            except Exception:
                logger.exception("delivery to request %s failed", stream.label)
                self._give_up(stream, EngineFailure())

    def _deliver_one(self, stream: RequestStream, event: RequestStarted | SequenceOutput | RequestFailed) -> None:
        match event:
            case RequestStarted():
                self._num_waiting -= 1
                self._prompt_tokens.add(len(stream.request.prompt_token_ids))
                self._cached_tokens.add(event.num_cached_tokens)
                stream.start(event)
            case SequenceOutput():
                self._generated_tokens.add(len(event.token_ids))
                if stream.push(event):
                    self._core.post(Abort(event.request_id, event.index))
            case RequestFailed(reason=FailureReason.DEADLINE):
                phase = "running" if stream.has_started else "waiting"
                stream.fail(DeadlineExceeded(phase, stream.num_completion_tokens))
            case RequestFailed():
                stream.fail(EngineFailure())

    def _give_up(self, stream: RequestStream, error: RequestError) -> None:
        stream.fail(error)
        self._core.post(Abort(stream.request.id))
