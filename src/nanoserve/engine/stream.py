"""What one caller reads: the scheduler's events of one request, as text and in the order of the contract.

    Started  PromptLogprobs*  Delta*  Finished

It lives on the event loop, between `Engine`, which pushes what a step gave, and the caller, who reads when it likes.
"""

import asyncio
import copy
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nanoserve.adapter.vocabulary import Adapter
from nanoserve.constraint.outcome import Outcome, outcome_of
from nanoserve.engine.reply import Parts, Reader, Reply
from nanoserve.engine.text import TextCodec, TextPiece, TextStream
from nanoserve.errors import RequestError
from nanoserve.request import (
    DraftCounts,
    DraftSource,
    DraftTotals,
    FinishReason,
    KeywordUse,
    Request,
    RequestStarted,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class Started:
    """The scheduler has begun to run the request."""

    prompt_tokens: int
    # Of them, read from the prefix cache.
    cached_tokens: int
    # The values in force, the seed included.
    params: SamplingParams
    # What it is computed with besides the model. None = nothing.
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the next prompt tokens."""

    tokens: Sequence[TokenLogprob]


@dataclass(slots=True)
class Delta:
    """New output of one sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    # Aligned with token_ids, if asked for.
    logprobs: list[TokenLogprob] = field(default_factory=list)
    # If asked for: what is reasoning, content, and calls of tools.
    parts: Parts | None = None
    # Set in the sequence's last Delta alone.
    finish_reason: FinishReason | None = None
    # What ended it, if a stop string, or a stop or EOS token did.
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The request succeeded: its counts and times."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    # Arrival to first scheduled, to first token, to last token.
    queue_s: float
    prefill_s: float
    decode_s: float
    preemptions: int
    # Only sources that guessed.
    drafts: Mapping[DraftSource, DraftTotals] = field(default_factory=dict)
    # By sequence, if there is a constraint.
    outcomes: Sequence[Outcome] = ()
    # Keywords of it that were only checked at the end.
    relaxed: Sequence[KeywordUse] = ()
    # Of the completion tokens, if reasoning is told apart.
    reasoning_tokens: int = 0


StreamEvent = Started | PromptLogprobs | Delta | Finished


@dataclass(slots=True)
class Progress:
    """How far a request has come: what RequestRecord says of it as it runs. Only its RequestStream changes it."""

    started_s: float | None = None
    num_cached_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_completion_tokens: int = 0
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    num_preemptions: int = 0
    drafts: dict[DraftSource, DraftTotals] = field(default_factory=dict)
    outcomes: tuple[str, ...] = ()

    def copied(self) -> dict[str, Any]:
        """Its fields by their names, as RequestRecord has them: what changes later is no part of the copy."""
        return {each.name: copy.copy(getattr(self, each.name)) for each in fields(self)}

    def add_draft(self, draft: DraftCounts, num_tokens: int) -> None:
        """num_tokens: of those that came with it, how many the caller gets."""
        totals = self.drafts.get(draft.source, DraftTotals())
        self.drafts[draft.source] = totals.plus(draft.num_drafted, min(draft.num_accepted, num_tokens))


class RequestStream:
    """The mailbox of one request. Event loop only.

    A slow reader never slows the engine: what it has not read merges into one Delta a sequence, or several where one
    would lose the order of its parts. So memory is bounded by the request's own length, and how the output is cut never
    changes it.
    """

    def __init__(
        self,
        request: Request,
        codec: TextCodec,
        *,
        reply: Reply | None = None,
        label: str = "",
        goes_on: bool = False,
        min_delta_tokens: int = 0,
        keeps_text: bool = False,
    ) -> None:
        """reply: in a conversation. label: the caller's name for the request. goes_on: its text continues that of the
        prompt. keeps_text: `texts` has all that was generated, until the request ends."""
        self.request = request
        self._codec = codec
        self.label = label
        self.progress = Progress()
        # Of the adapter, as soon as it runs; empty = there is none.
        self.adapter_revision = ""
        self._min_delta_tokens = min_delta_tokens
        params = request.params
        # By sequence. None = not kept.
        self.texts: list[str] | None = [""] * params.n if keeps_text else None
        # By sequence, where the parts of its text are told, or looked at in the end.
        self._readers: list[Reader] = []
        if reply is not None and reply.is_read:
            self._readers = [reply.reader() for _ in range(params.n)]
        self._tells_parts = reply is not None and reply.wanted.parse
        self._decoders: list[TextStream] | None = None
        if params.detokenize or self._readers:
            context = request.prompt_token_ids if goes_on else ()
            marks = reply.marks if reply is not None and self._readers else frozenset()
            self._decoders = [TextStream(codec, params, context, marks=marks) for _ in range(params.n)]
        self._events: deque[StreamEvent] = deque()
        # Unread output, by sequence.
        self._pending: dict[int, Delta] = {}
        # Sequences that satisfy the request's constraint, as far as it was enforced.
        self._satisfied: set[int] = set()
        self._relaxed: Sequence[KeywordUse] = () if reply is None else reply.relaxed
        # By sequence, all that was generated: kept where it is checked at the end.
        self._checked: list[list[int]] = []
        self._error: RequestError | None = None
        self._finished: Finished | None = None
        self._news = asyncio.Event()

    @property
    def has_started(self) -> bool:
        return self.progress.started_s is not None

    @property
    def is_over(self) -> bool:
        return self._finished is not None or self._error is not None

    # ------------------------------------------------------------------------------------ the engine's side

    def start(self, event: RequestStarted) -> None:
        """The request runs."""
        self.progress.started_s = event.time_s
        self.progress.num_cached_tokens = event.num_cached_tokens
        self._relaxed = [*event.relaxed, *self._relaxed]
        if self._relaxed and not self._readers:
            self._checked = [[] for _ in range(self.request.params.n)]
        prompt, params = self.request.prompt_token_ids, self.request.params
        if event.adapter is not None:
            self.adapter_revision = event.adapter.revision
        self._events.append(Started(len(prompt), event.num_cached_tokens, params, event.adapter))
        if params.prompt_logprobs is not None:
            # Nothing predicts the first token.
            self._events.append(PromptLogprobs([TokenLogprob(prompt[0], None, 0)]))
        self._news.set()

    def push(self, output: SequenceOutput) -> bool:
        """Take a step's output. True if a stop string ended the sequence, which the scheduler does not know yet."""
        progress = self.progress
        if self.is_over or output.index in progress.finish_reasons:
            return False
        if output.prompt_logprobs:
            self._events.append(PromptLogprobs(output.prompt_logprobs))
        delta = self._pending.setdefault(output.index, Delta(output.index))
        token_ids, finish_reason, stop_token_id = output.token_ids, output.finish_reason, output.stop_token_id
        stopped = False
        if self._decoders is not None:
            piece, parts = self._decode(output.index, token_ids, finish_reason)
            delta = self._add(parts, delta)
            if self.request.params.detokenize:
                delta.text += piece.text
            if self.texts is not None:
                self.texts[output.index] += piece.text
            if piece.stop_string is not None:
                delta.stop_string = piece.stop_string
                token_ids = token_ids[: piece.num_tokens]
                stopped = finish_reason is None
                finish_reason, stop_token_id = FinishReason.STOP, None
        if self._checked:
            self._checked[output.index] += token_ids
        delta.token_ids += token_ids
        delta.logprobs += output.logprobs[: len(token_ids)]
        delta.finish_reason, delta.stop_token_id = finish_reason, stop_token_id
        if output.draft is not None:
            progress.add_draft(output.draft, len(token_ids))
        if token_ids:
            progress.num_completion_tokens += len(token_ids)
            progress.first_token_s = progress.first_token_s or output.time_s
            progress.last_token_s = output.time_s
        if finish_reason is not None:
            self._end(output, len(token_ids), finish_reason)
        self._news.set()
        return stopped

    def _end(self, output: SequenceOutput, num_tokens: int, finish_reason: FinishReason) -> None:
        """The sequence ends with so many of the output's tokens."""
        # What a stop string or token cuts off was a part of what the grammar saw.
        is_cut = finish_reason is FinishReason.STOP and not self.request.params.include_stop
        if output.satisfies and not is_cut and num_tokens == len(output.token_ids):
            self._satisfied.add(output.index)
        self.progress.finish_reasons[output.index] = finish_reason
        self.progress.num_preemptions += output.num_preemptions
        if len(self.progress.finish_reasons) == self.request.params.n:
            self._finish()

    def _add(self, parts: list[Parts], delta: Delta) -> Delta:
        """Add parts to unread output. Returns what is the unread output now: another one where the order wants it."""
        for each in parts:
            if delta.parts is not None and not delta.parts.may_precede(each):
                self._events.append(delta)
                delta = self._pending[delta.index] = Delta(delta.index)
            delta.parts = delta.parts or Parts()
            delta.parts.add(each)
        return delta

    def _decode(
        self, index: int, token_ids: list[int], finish_reason: FinishReason | None
    ) -> tuple[TextPiece, list[Parts]]:
        """The text of some tokens, and its parts, if they are wanted."""
        assert self._decoders is not None
        decoder = self._decoders[index]
        if not self._readers:
            return decoder.push(token_ids, finish_reason), []
        reader, parts = self._readers[index], list[Parts]()
        text, num_tokens, stop_string = "", 0, None
        # One by one, so that each is counted where it belongs, however many a step gives.
        for place in range(max(1, len(token_ids))):
            is_last = place + 1 >= len(token_ids)
            piece = decoder.push(token_ids[place : place + 1], finish_reason if is_last else None)
            parts += reader.push(self._less_eos(piece, token_ids, finish_reason), num_tokens=piece.num_tokens)
            text, num_tokens, stop_string = text + piece.text, num_tokens + piece.num_tokens, piece.stop_string
            if stop_string is not None:
                break
        if finish_reason is not None or stop_string is not None:
            is_whole = stop_string is None and finish_reason in (FinishReason.EOS, FinishReason.COMPLETE)
            parts += reader.finish(is_complete=is_whole)
        return TextPiece(text, num_tokens, stop_string), parts if self._tells_parts else []

    def _less_eos(self, piece: TextPiece, token_ids: list[int], finish_reason: FinishReason | None) -> str:
        """The text that is read: EOS is no part of it, also where special tokens are kept."""
        if finish_reason is FinishReason.EOS and not self.request.params.skip_special_tokens:
            return piece.marked.removesuffix(self._codec.token(token_ids[-1]))
        return piece.marked

    def fail(self, error: RequestError) -> None:
        """End the stream with an error, behind what was pushed."""
        if not self.is_over:
            self._error = error
            self._news.set()

    def _finish(self) -> None:
        progress = self.progress
        assert progress.started_s is not None
        first_token_s = progress.first_token_s or time.monotonic()
        self._finished = Finished(
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=progress.num_cached_tokens,
            completion_tokens=progress.num_completion_tokens,
            queue_s=progress.started_s - self.request.arrival_s,
            prefill_s=first_token_s - progress.started_s,
            decode_s=(progress.last_token_s or first_token_s) - first_token_s,
            preemptions=progress.num_preemptions,
            drafts=progress.drafts,
            relaxed=self._relaxed,
            reasoning_tokens=sum(reader.num_reasoning_tokens for reader in self._readers) if self._tells_parts else 0,
        )

    # ------------------------------------------------------------------------------------ the caller's side

    async def read(self) -> AsyncIterator[StreamEvent]:
        """Events up to Finished. Raises the RequestError that ended the request instead."""
        while True:
            await self._news.wait()
            self._news.clear()
            for event in self._take():
                yield event
            # More may have come while the caller was busy with these.
            if self._news.is_set():
                continue
            if self._error is not None:
                raise self._error
            if self._finished is not None:
                found = [await self._outcome(index) for index in range(self.request.params.n)]
                outcomes = [each for each in found if each is not None]
                self.progress.outcomes = tuple(each.name.lower() for each in outcomes)
                yield dataclasses.replace(self._finished, outcomes=outcomes)
                return

    async def _outcome(self, index: int) -> Outcome | None:
        """Of a sequence that has ended; None without a constraint."""
        if (constraint := self.request.constraint) is None:
            return None
        satisfies, is_relaxed = index in self._satisfied, bool(self._relaxed)
        if not satisfies or not is_relaxed:
            return outcome_of(constraint, "", satisfies=satisfies, is_relaxed=is_relaxed)
        if self._readers:
            return await asyncio.to_thread(self._readers[index].outcome, self._relaxed)
        text = self._codec.decode(self._checked[index], skip_special_tokens=True)
        return await asyncio.to_thread(outcome_of, constraint, text, satisfies=True, is_relaxed=True)

    def _take(self) -> list[StreamEvent]:
        events: list[StreamEvent] = list(self._events)
        self._events.clear()
        enough = 1 if self.is_over else max(1, self._min_delta_tokens)
        ready = [d.index for d in self._pending.values() if d.finish_reason or len(d.token_ids) >= enough]
        return events + [self._pending.pop(index) for index in ready]
