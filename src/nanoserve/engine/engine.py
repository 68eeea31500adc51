"""The engine's asyncio face: generate, tokenize, cancel, drain.

caller ── generate() ──▶ encode (worker thread) ──▶ core.post(Request)
caller ◀── RequestStream ◀── text ◀── one call of _deliver per step, for all requests ◀── core
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.vocabulary import (
    AdapterAnswer,
    AdapterInfo,
    AdaptersServed,
    AdapterStats,
    ListAdapters,
    LoadAdapter,
    UnloadAdapter,
)
from nanoserve.constraint.compiler import MAX_WAIT_S, too_hard, waited_too_long
from nanoserve.dialect.formats import Dialect
from nanoserve.engine.adapter_desk import AdapterDesk
from nanoserve.engine.arrival import Arrival, Prompt
from nanoserve.engine.chat_template import Chat
from nanoserve.engine.core import Core
from nanoserve.engine.reply import Reply, Wanted, plan_reply
from nanoserve.engine.statistics import Statistics, Stats
from nanoserve.engine.stream import RequestStream, StreamEvent
from nanoserve.engine.text import TextCodec
from nanoserve.errors import (
    CancelledByOperator,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    Violation,
)
from nanoserve.kv_cache.block_pool import BlockNames
from nanoserve.observer import Observers
from nanoserve.request import (
    Abort,
    CacheReset,
    CompileConstraint,
    Constraint,
    ConstraintCompiled,
    ConstraintReport,
    DraftSource,
    EngineEnded,
    Event,
    Failure,
    ObserveSteps,
    Request,
    RequestFailed,
    RequestStarted,
    ResetCache,
    SamplingParams,
    SequenceOutput,
)
from nanoserve.step_record import StepRecord

logger = logging.getLogger(__name__)

# A prompt of so many characters takes longer to encode than most callers' steps.
LONG_PROMPT_CHARS = 1 << 16
# Steps that fail one after the other before the engine calls itself unhealthy.
MAX_FAILED_STEPS = 3
# How long a step may go on when the engine is closed.
CLOSE_TIMEOUT_S = 5.0


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
    # How a prompt's blocks are named, so that the step loop need not do it.
    block_names: BlockNames
    # Most tokens of a sequence that are guessed at once.
    max_draft_tokens: int
    # In which ways the server guesses by itself; what a caller predicts is a guess in any case.
    draft_sources: tuple[DraftSource, ...]
    # Name of the model that guesses. Empty = there is none.
    draft_model: str
    # How it writes reasoning and calls of tools, as far as that is known.
    dialect: Dialect
    # Where adapters are read from, and those that are there at the start. None = no adapters are served.
    adapter_folders: AdapterFolders | None = None
    adapters: tuple[AdapterInfo, ...] = ()


class Engine:
    """Admits requests, turns tokens to text, and ends what nobody waits for. Event loop only.

    Every request that was posted to the core is either over or aborted when its `generate` ends, however it ends.
    """

    def __init__(
        self,
        core: Core,
        codec: TextCodec,
        model: ServedModel,
        *,
        max_waiting: int,
        step_timeout_s: float,
        observers: Observers | None = None,
    ) -> None:
        """observers: None = nobody watches."""
        self.model = model
        self.codec = codec
        self._core = core
        self._observers = observers or Observers()
        self._max_waiting = max_waiting
        self._step_timeout_s = step_timeout_s
        # Encoding of prompts, which must not hold up the event loop. Long ones take seconds and a gigabyte, and so wait
        # for each other, and not short ones for them.
        self._text_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="nanoserve-text")
        self._long_text_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanoserve-long-text")
        # Special tokens in which the model writes what is reasoning, and what is a call.
        self._marks = codec.special_tokens_in(model.dialect.texts)
        self._ids = itertools.count(1)
        # By number: requests that are not posted yet.
        self._arrivals: dict[int, Arrival] = {}
        # Of requests that were posted and are not over.
        self._streams: dict[str, RequestStream] = {}
        # Set when the last stream ends.
        self._is_idle = asyncio.Event()
        # Set when the core is gone.
        self._has_ended = asyncio.Event()
        # By number: who waits to hear what a constraint comes to.
        self._checks: dict[int, asyncio.Future[ConstraintReport]] = {}
        # Of resets of the cache that the core has not answered yet; it answers in their order.
        self._resets: deque[asyncio.Future[int]] = deque()
        self._is_draining = False
        self._statistics = Statistics()
        self._adapters = AdapterDesk(core, model.adapter_folders, model.adapters)

    def start(self) -> None:
        """Start the core; call it on the event loop that will serve."""
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event]) -> None:
            if events and not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, events)

        self._core.start(deliver)
        if not self._observers.is_empty:
            self._core.post(ObserveSteps())

    async def close(self) -> None:
        """Stop the core after its current step; what still runs fails."""
        if self._core.is_alive:
            self._core.stop()
            with contextlib.suppress(TimeoutError):  # a step that hangs is left to die with the process
                await asyncio.wait_for(self._has_ended.wait(), CLOSE_TIMEOUT_S)
        for threads in (self._text_threads, self._long_text_thread):
            threads.shutdown(wait=False, cancel_futures=True)

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
        add_special_tokens: bool | None = None,
        min_delta_tokens: int = 0,
        wanted: Wanted | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a request: Started, PromptLogprobs, Deltas, Finished.

        Closing the iterator, or cancelling the task that reads it, aborts the request. `label` is the caller's id for
        it, `timeout_s` its hard deadline; `add_special_tokens` is that of TextCodec.encode_prompt. `wanted`: None = a
        text, whatever it is. `adapter`: name of one; empty = the model alone.

        Raises a RequestError: before Started if it is refused (InvalidRequest, ContextLengthExceeded, Overloaded,
        NotReady, AdapterNotFound, AdapterInvalid, AdapterMemoryFull), at any time if it fails (DeadlineExceeded,
        CancelledByOperator, EngineFailure, NotReady).
        """
        arrival_s = time.monotonic()
        deadline_s = None if timeout_s is None else arrival_s + timeout_s
        wanted = wanted or Wanted()
        asked = (label, prompt, params, priority, arrival_s, deadline_s, cache_salt, skip_cache_read, wanted, adapter)
        arrival = Arrival(next(self._ids), *asked)
        with self._observed(arrival):
            self._check_admission()
            self._adapters.check(adapter)
            request = await self._prepare(arrival, add_special_tokens)
            stream = RequestStream(
                request,
                self.codec,
                reply=arrival.reply,
                label=label,
                goes_on=not (isinstance(prompt, Chat) and prompt.begins_message),
                min_delta_tokens=min_delta_tokens,
                keeps_text=self._observers.wants_content,
            )
            arrival.params, arrival.stream = request.params, stream
            self._observers.request_posted(request.id)
            self._streams[request.id] = stream
            self._is_idle.clear()
            try:
                self._core.post(request)
                async for event in stream.read():
                    yield event
            finally:
                del self._streams[request.id]
                if not stream.is_over:
                    self._core.post(Abort(request.id))
                if not self._streams:
                    self._is_idle.set()

    @contextlib.contextmanager
    def _observed(self, arrival: Arrival) -> Iterator[None]:
        now = functools.partial(arrival.record, wants_content=self._observers.wants_content)
        self._observers.request_arrived(now)
        try:
            yield
        except RequestError as error:
            arrival.error = error
            raise
        finally:
            arrival.end_s = time.monotonic()
            self._observers.request_ended(now())

    async def _prepare(self, arrival: Arrival, add_special_tokens: bool | None) -> Request:
        """Encode the prompt. Raises a RequestError if the request cannot run, or not any more."""
        self._arrivals[arrival.number] = arrival
        try:
            is_short = _num_chars(arrival.prompt) + len(arrival.params.prediction) < LONG_PROMPT_CHARS
            threads = self._text_threads if is_short else self._long_text_thread
            token_ids, text = await self.tokenize(
                arrival.prompt, add_special_tokens=add_special_tokens, threads=threads
            )
            if isinstance(arrival.prompt, Chat):
                plan = functools.partial(self._plan_reply, arrival, text)
                arrival.reply = await asyncio.get_running_loop().run_in_executor(threads, plan)
            arrival.params = await self._with_prediction(arrival.params, threads)
            request = self._make_request(arrival, token_ids)
            names = self.model.block_names
            num_full = len(token_ids) // names.block_size
            name_blocks = functools.partial(names.extend, request.block_hashes, request, token_ids, num_full)
            if is_short:
                name_blocks()
            else:
                await asyncio.get_running_loop().run_in_executor(threads, name_blocks)
            # Things may have changed meanwhile.
            self._check_ready()
            if arrival.is_cancelled:
                raise CancelledByOperator
            return request
        finally:
            del self._arrivals[arrival.number]

    def _plan_reply(self, arrival: Arrival, prompt: str) -> Reply:
        """prompt: the conversation as text."""
        assert isinstance(arrival.prompt, Chat)
        reply = plan_reply(
            arrival.wanted,
            arrival.prompt.tool_use,
            self.model.dialect,
            prompt,
            begins_message=arrival.prompt.begins_message,
            max_reasoning_tokens=arrival.params.max_reasoning_tokens,
            special_id=self.codec.special_token_id,
        )
        return dataclasses.replace(reply, marks=self._marks)

    async def _with_prediction(self, params: SamplingParams, threads: ThreadPoolExecutor) -> SamplingParams:
        """The same, with the prediction's tokens, of which there are no more than a completion can have."""
        if not (prediction := params.prediction):
            return params
        if isinstance(prediction, str):
            encode = functools.partial(self.codec.encode_prompt, prediction, add_special_tokens=False)
            token_ids, _ = await asyncio.get_running_loop().run_in_executor(threads, encode)
            prediction = tuple(token_ids)
        return dataclasses.replace(params, prediction=prediction[: self.model.max_context_tokens])

    def _check_ready(self) -> None:
        # A stalled step may yet end, so requests may queue behind it; a dead thread and a drain are final.
        if self._is_draining or not self._core.is_alive:
            raise NotReady(self.health() or "")

    def _check_admission(self) -> None:
        self._check_ready()
        num_waiting = len(self._arrivals) + sum(not stream.has_started for stream in self._streams.values())
        if num_waiting >= self._max_waiting:
            raise Overloaded(self._max_waiting)

    def _make_request(self, arrival: Arrival, token_ids: list[int]) -> Request:
        params = arrival.params
        if len(token_ids) + (params.max_tokens != 0) > self.model.max_context_tokens:
            raise ContextLengthExceeded(len(token_ids), self.model.max_context_tokens)
        if params.min_tokens > (room := self.model.max_context_tokens - len(token_ids)):
            what = f"is {params.min_tokens}; behind the prompt the context leaves room for {room}"
            raise InvalidRequest([Violation("stopping.min_tokens", what)])
        if max(token_ids) >= self.model.vocab_size:
            # A tokenizer may know more tokens than the model; one such id would fail the whole step.
            what = f"the prompt has token {max(token_ids)}; the model knows 0 to {self.model.vocab_size - 1}"
            raise InvalidRequest([Violation("prompt", what)])
        if arrival.deadline_s is not None and time.monotonic() >= arrival.deadline_s:
            raise DeadlineExceeded("waiting", 0)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        return Request(
            id=f"{arrival.number}",
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(self.model.eos_token_ids),
            priority=arrival.priority,
            arrival_s=arrival.arrival_s,
            deadline_s=arrival.deadline_s,
            time_limit_s=None if params.time_limit_s is None else arrival.arrival_s + params.time_limit_s,
            cache_salt=arrival.cache_salt,
            skip_cache_read=arrival.skip_cache_read,
            constraint=arrival.wanted.constraint if arrival.reply is None else arrival.reply.constraint,
            adapter=self._adapters.guess(arrival.adapter),
        )

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None, threads: ThreadPoolExecutor | None = None
    ) -> tuple[list[int], str]:
        """Token ids of a prompt as `generate` sees them, and the text they were made of.

        threads: None = asyncio's own, so that it does not hold up `generate`, which has others. Raises InvalidRequest
        for a prompt of no tokens, or a conversation that the template refuses.
        """
        if isinstance(prompt, list):
            name, token_ids, text = "token_ids", prompt, ""
        else:
            name = "chat" if isinstance(prompt, Chat) else "text"
            loop = asyncio.get_running_loop()
            encode = functools.partial(self.codec.encode_prompt, prompt, add_special_tokens=add_special_tokens)
            token_ids, text = await loop.run_in_executor(threads, encode)
        if not token_ids:
            raise InvalidRequest([Violation(name, "the prompt has no tokens; at least one is needed")])
        return token_ids, text

    async def compile_constraint(self, constraint: Constraint) -> ConstraintReport:
        """What it comes to for this model. Raises ConstraintInvalid, also when that would take too long."""
        self._check_ready()
        number = next(self._ids)
        report = self._checks[number] = asyncio.get_running_loop().create_future()
        self._core.post(CompileConstraint(number, constraint))
        try:
            return await asyncio.wait_for(report, MAX_WAIT_S)
        except TimeoutError:
            raise waited_too_long() from None
        finally:
            del self._checks[number]

    # ------------------------------------------------------------------------------------------- adapters

    @property
    def adapter_names(self) -> dict[str, AdapterInfo | None]:
        """What `generate` takes, in order. None = it is in its folder, and was not read yet."""
        return self._adapters.names()

    def has_adapter(self, name: str) -> bool:
        """Whether there is an adapter of this name, as far as can be told without reading it."""
        return self._adapters.has(name)

    async def load_adapter(
        self, name: str, path: str = "", *, is_pinned: bool = False, may_replace: bool = False
    ) -> AdapterInfo:
        """Read an adapter, check it and serve it; see LoadAdapter. Raises a RequestError; then nothing has changed."""
        self._check_ready()
        load = functools.partial(LoadAdapter, name=name, path=path, is_pinned=is_pinned, may_replace=may_replace)
        return await self._adapters.ask(load, AdapterInfo)

    async def unload_adapter(self, name: str, drain_timeout_s: float) -> None:
        """Serve it no more, and return when its requests have ended. Raises AdapterNotFound or AdapterInUse."""
        self._check_ready()
        unload = functools.partial(UnloadAdapter, name=name, drain_timeout_s=drain_timeout_s)
        await self._adapters.ask(unload, type(None))

    async def list_adapters(self) -> AdapterStats:
        """All that were read, and what they take."""
        self._check_ready()
        return await self._adapters.ask(ListAdapters, AdapterStats)

    # ------------------------------------------------------------------------------------------- operator

    def cancel(self, label: str) -> int:
        """End every request that bears the caller's label; their callers get CancelledByOperator."""
        arrivals = [arrival for arrival in self._arrivals.values() if arrival.label == label]
        for arrival in arrivals:
            arrival.is_cancelled = True
        streams = [stream for stream in self._streams.values() if stream.label == label]
        for stream in streams:
            self._give_up(stream, CancelledByOperator())
        return len(arrivals) + len(streams)

    async def reset_cache(self) -> int:
        """Forget all cached prefixes between two steps; returns the number of blocks that became free."""
        self._check_ready()
        num_freed_blocks: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._resets.append(num_freed_blocks)
        self._core.post(ResetCache())
        return await num_freed_blocks

    def stats(self) -> Stats:
        """A snapshot, as of the last step."""
        return self._statistics.snapshot(self._core.state.scheduler)

    def health(self) -> str | None:
        """None if requests are served; else why not."""
        if self._is_draining:
            return "it is draining"
        if not self._core.is_alive:
            return "the engine has died"
        state = self._core.state
        if state.num_failed_steps >= MAX_FAILED_STEPS:
            return f"the last {state.num_failed_steps} steps failed"
        if state.stalled_s > self._step_timeout_s:
            return f"no step has ended for {state.stalled_s:.0f} s"
        return None

    async def wait_until_ended(self) -> None:
        """Return when the core is gone, for good."""
        await self._has_ended.wait()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the running ones; those that outlast the time-out fail with NotReady."""
        self._is_draining = True
        if self._streams:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        for stream in list(self._streams.values()):
            self._give_up(stream, NotReady("it is shutting down"))

    # ------------------------------------------------------------------------------------------- delivery

    def _deliver(self, events: list[Event]) -> None:
        """Hand a step's events to their streams."""
        for event in events:
            match event:
                case CacheReset(num_freed_blocks):
                    self._answer_reset(num_freed_blocks)
                case ConstraintCompiled():
                    self._answer_check(event)
                case AdapterAnswer() | AdaptersServed():
                    self._adapters.hear(event)
                case EngineEnded():
                    self._end_all()
                case StepRecord():
                    self._observers.step_ended(event)
                case _:
                    # Unknown ids are requests that were aborted while the step ran.
                    if (stream := self._streams.get(event.request_id)) is not None:
                        self._deliver_to(stream, event)

    def _deliver_to(self, stream: RequestStream, event: RequestStarted | SequenceOutput | RequestFailed) -> None:
        try:
            match event:
                case RequestStarted():
                    self._statistics.add_prompt(len(stream.request.prompt_token_ids), event.num_cached_tokens)
                    stream.start(event)
                case SequenceOutput():
                    self._statistics.add_output(len(event.token_ids), event.draft)
                    if stream.push(event):
                        self._core.post(Abort(event.request_id, event.index))
                case RequestFailed(reason=Failure.DEADLINE):
                    phase = "running" if stream.has_started else "waiting"
                    stream.fail(DeadlineExceeded(phase, stream.progress.num_completion_tokens))
                case RequestFailed(reason=Failure.CORRUPT):
                    stream.fail(EngineFailure("the model computed NaN or infinity for this request"))
                case RequestFailed(reason=Failure.NO_TOKEN):
                    stream.fail(EngineFailure("what the request asks for leaves no token that could be drawn"))
                case RequestFailed(reason=Failure.CONSTRAINT) if stream.request.constraint is not None:
                    stream.fail(too_hard(stream.request.constraint))
                case RequestFailed(reason=Failure.STEP):
                    stream.fail(EngineFailure())
                case RequestFailed(reason=RequestError() as error):
                    stream.fail(error)
        except Exception:
            logger.exception("delivery to request %s failed", stream.label)
            self._give_up(stream, EngineFailure())

    def _answer_reset(self, num_freed_blocks: int) -> None:
        future = self._resets.popleft()
        if not future.done():  # its caller may have gone
            future.set_result(num_freed_blocks)

    def _answer_check(self, event: ConstraintCompiled) -> None:
        report = self._checks.get(event.number)
        if report is None or report.done():
            return  # its caller may have gone
        if isinstance(event.result, ConstraintReport):
            report.set_result(event.result)
        else:
            report.set_exception(event.result)

    def _end_all(self) -> None:
        """Nobody must wait for a core that is gone."""
        self._has_ended.set()
        self._adapters.end()
        for number in self._checks:
            self._answer_check(ConstraintCompiled(number, EngineFailure()))
        for stream in self._streams.values():
            stream.fail(EngineFailure())
        while self._resets:
            self._answer_reset(0)

    def _give_up(self, stream: RequestStream, error: RequestError) -> None:
        stream.fail(error)
        self._core.post(Abort(stream.request.id))


def _num_chars(prompt: Prompt) -> int:
    """What encoding a prompt takes depends on; of a conversation, the messages' part."""
    if not isinstance(prompt, Chat):
        return len(prompt)
    contents = (message.get("content") or "" for message in prompt.messages)
    return sum(len(content) if isinstance(content, str) else sum(map(len, content)) for content in contents)
