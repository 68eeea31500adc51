"""What happened to one request, and why it waited: records in, typed entries with plain sentences out. Pure."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nanoserve.observer import CallRecord, Chunk, RequestRecord
from nanoserve.request import FinishReason, Overloaded, RequestError
from nanoserve.step_record import Wait, WaitReason

# Shorter waits are those for the step that was running.
MIN_WAIT_S = 0.0005


@dataclass(slots=True)
class QueueSpan:
    """Steps in a row in which the same sequence was the head of the queue, for the same reason."""

    wait: Wait
    start_s: float
    end_s: float
    # StepRecord.number.
    last_step: int


@dataclass(slots=True)
class Absence:
    """A preempted sequence, until it ran again."""

    request_id: str
    index: int
    for_request_id: str
    start_s: float
    # None = it has not, or never did.
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known besides the request's own record."""

    # Oldest first.
    queue_spans: list[QueueSpan]
    absences: list[Absence]
    # Engine's id -> caller's.
    labels: dict[str, str]


# ----------------------------------------------------------------------------------------------- what happened


@dataclass(frozen=True, slots=True)
class Waited:
    """A time in the queue."""

    # Of several the one that took most time. None = for the prompt to be encoded, and for the step that was running.
    reason: WaitReason | None
    index: int
    # The caller's id of the running request that had most of it; empty = none, or forgotten.
    behind: str
    # Requests that were the head of the queue in its stead; 0 = it was the head.
    num_before: int
    # Seconds that went by each reason, most first.
    shares: Mapping[WaitReason, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheHit:
    """Prompt tokens from the prefix cache."""

    num_cached_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Chunks of known tokens."""

    index: int
    num_tokens: int
    num_chunks: int
    is_after_preemption: bool


@dataclass(frozen=True, slots=True)
class WasPreempted:
    """A sequence lost its blocks until it ran again."""

    index: int
    # The caller's id of the request that the blocks were for; empty = forgotten.
    for_label: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """Generation, of all sequences."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended."""

    finish_reasons: dict[int, FinishReason]
    # ErrorInfo.reason of a refusal; None = `error`, if any, has it.
    reason: str | None = None
    error: RequestError | None = None
    is_abandoned: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened."""

    # time.monotonic().
    start_s: float
    end_s: float
    text: str
    event: Waited | CacheHit | Prefilled | WasPreempted | Decoded | Ended


@dataclass(frozen=True, slots=True)
class Timeline:
    """All that is known of a request."""

    label: str
    # The engine's own; empty = none.
    id: str
    arrival_s: float
    # Its end, or now.
    end_s: float
    is_over: bool
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    # By their begin.
    entries: list[Entry] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """All of it in a few sentences."""
        sentences = [*self._waits(), *self._work(), *(e.text for e in self.entries if isinstance(e.event, Ended))]
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)

    def _waits(self) -> Iterator[str]:
        waits = [(entry, entry.event) for entry in self.entries if isinstance(entry.event, Waited)]
        shares: dict[WaitReason, float] = {}
        # The longest wait for each reason says whom it was behind.
        longest: dict[WaitReason, Entry] = {}
        behind: dict[WaitReason, str] = {}
        for entry, event in waits:
            for reason, share_s in event.shares.items():
                shares[reason] = shares.get(reason, 0.0) + share_s
            if event.reason is not None:
                best = longest.get(event.reason)
                if best is None or entry.end_s - entry.start_s > best.end_s - best.start_s:
                    longest[event.reason], behind[event.reason] = entry, event.behind
        for reason, share_s in sorted(shares.items(), key=lambda share: -share[1]):
            whom = f" behind request {behind[reason]}" if behind.get(reason) else ""
            yield f"waited {_time(share_s)} for {WANTED[reason]}{whom}"
        if not shares:
            yield from (entry.text for entry, _ in waits)

    def _work(self) -> Iterator[str]:
        yield from (entry.text for entry in self.entries if isinstance(entry.event, CacheHit))
        first = next((e.event for e in self.entries if isinstance(e.event, Prefilled)), None)
        if first is not None:
            yield f"prefilled in {_count(first.num_chunks, 'chunk')}"
        preemptions = [entry.event for entry in self.entries if isinstance(entry.event, WasPreempted)]
        if preemptions:
            times = "once" if len(preemptions) == 1 else f"{len(preemptions)} times"
            labels = list(dict.fromkeys(event.for_label for event in preemptions if event.for_label))
            yield f"preempted {times}" + (f", for {_list(labels)}" if labels else "")
        yield from (entry.text for entry in self.entries if isinstance(entry.event, Decoded))


def timeline_of(request: RequestRecord, memory: Memory, now_s: float) -> Timeline:
    """The timeline of a request that runs or has ended."""
    end_s = now_s if request.end_s is None else request.end_s
    absences = [each for each in memory.absences if each.request_id == request.id]
    entries = [*_queue(request, memory, end_s), *_cache_hit(request), *_prefills(request, absences)]
    entries += _absences(request, absences, memory, end_s)
    entries += _siblings_waits(request, memory, end_s)
    entries += _decode(request)
    entries.sort(key=lambda entry: entry.start_s)
    return Timeline(
        request.label,
        request.id,
        request.arrival_s,
        end_s,
        is_over=request.end_s is not None,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_completion_tokens=request.num_completion_tokens,
        entries=[*entries, *_end(request)],
    )


def timeline_of_refusal(call: CallRecord) -> Timeline:
    """The timeline of a call that was refused before the engine heard of it."""
    ended = Ended({}, reason=call.reason, is_abandoned=not call.reason)
    why = f"it was refused: {call.code}" + (f" ({call.reason})" if call.reason else "")
    entry = Entry(call.start_s, call.end_s, why, ended)
    return Timeline(call.request_id, "", call.start_s, call.end_s, is_over=True, entries=[entry])


# ------------------------------------------------------------------------------------------------- the queue


def _queue(request: RequestRecord, memory: Memory, end_s: float) -> Iterator[Entry]:
    """From its arrival until it is first scheduled."""
    start_s, until_s = request.arrival_s, end_s if request.started_s is None else request.started_s
    waits = list(_waits(request, 0, start_s, until_s, memory)) if request.id else []
    unexplained_s = (waits[0].start_s if waits else until_s) - start_s
    if unexplained_s > MIN_WAIT_S and not (request.end_s is not None and request.started_s is None and not waits):
        yield Entry(
            start_s, start_s + unexplained_s, _first_wait_text(request, unexplained_s, memory), Waited(None, 0, "", 0)
        )
    yield from waits


def _first_wait_text(request: RequestRecord, waited_s: float, memory: Memory) -> str:
    spans = memory.queue_spans
    if request.id and spans and spans[0].start_s > request.arrival_s and waited_s > 1:
        return f"waited {_time(waited_s)}; what for is no longer known"
    return f"waited {_time(waited_s)} for its prompt to be encoded, and for the step that was running"


def _waits(request: RequestRecord, index: int, start_s: float, end_s: float, memory: Memory) -> Iterator[Entry]:
    """What was waited for in this time: by the sequence itself as the head of the queue, or by those before it."""
    spans = [span for span in memory.queue_spans if span.end_s > start_s and span.start_s < end_s]
    for _, group in itertools.groupby(spans, lambda span: _kind(span, request, index)):
        yield _wait_entry(list(group), request, index, start_s, end_s, memory)


def _kind(span: QueueSpan, request: RequestRecord, index: int) -> object:
    """The same for spans that are told together."""
    is_head = (span.wait.request_id, span.wait.index) == (request.id, index)
    return (span.wait.reason, span.wait.behind_request_id) if is_head else None


def _wait_entry(
    group: list[QueueSpan], request: RequestRecord, index: int, start_s: float, end_s: float, memory: Memory
) -> Entry:
    begin_s, until_s = max(start_s, group[0].start_s), min(end_s, group[-1].end_s)
    shares: dict[WaitReason, float] = {}
    for span in group:
        took_s = min(end_s, span.end_s) - max(start_s, span.start_s)
        shares[span.wait.reason] = shares.get(span.wait.reason, 0.0) + took_s
    shares = dict(sorted(shares.items(), key=lambda share: -share[1]))
    last = {span.wait.reason: span.wait for span in group}
    main = last[next(iter(shares))]
    is_head = _kind(group[0], request, index) is not None
    before = [] if is_head else list(dict.fromkeys(span.wait.request_id for span in group))
    event = Waited(main.reason, index, memory.labels.get(main.behind_request_id, ""), len(before), shares)
    what = []
    for reason, share_s in shares.items():
        took = f"{_time(share_s)} " if len(shares) > 1 else ""
        what.append(f"{took}for {WANTED[reason]}{_behind(last[reason], request, memory)}")
    who = f"sequence {index} " if index else ""
    whom = _name(before[0], request, memory) if len(before) == 1 else f"{len(before)} requests"
    after = f"after {whom}, which waited " if before else ""
    return Entry(begin_s, until_s, f"{who}waited {_time(until_s - begin_s)} {after}{' and '.join(what)}", event)


# After "waited for".
WANTED = {
    WaitReason.BLOCKS: "KV blocks",
    WaitReason.ROWS: "one of the running sequences to end",
    WaitReason.TOKENS: "a step with room for more tokens",
    WaitReason.PREFIX: "its prefix to be cached",
    WaitReason.BATCH: "the batch to end",
}


def _behind(wait: Wait, request: RequestRecord, memory: Memory) -> str:
    return f" behind {_name(wait.behind_request_id, request, memory)}" if wait.behind_request_id else ""


def _name(id: str, request: RequestRecord, memory: Memory) -> str:
    if id == request.id:
        return "its own other sequences"
    return f"request {memory.labels[id]}" if id in memory.labels else "a request that is forgotten by now"


# --------------------------------------------------------------------------------------------- while it runs


def _cache_hit(request: RequestRecord) -> Iterator[Entry]:
    if request.started_s is not None and request.num_cached_tokens:
        num_cached, num_prompt = request.num_cached_tokens, request.num_prompt_tokens
        text = f"{num_cached} of {num_prompt} prompt tokens came from the prefix cache"
        yield Entry(request.started_s, request.started_s, text, CacheHit(num_cached, num_prompt))


def _prefills(request: RequestRecord, absences: list[Absence]) -> Iterator[Entry]:
    """For each sequence, the chunks between two preemptions together."""
    runs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in request.chunks:
        num_before = sum(a.index == chunk.index and a.start_s <= chunk.start_s for a in absences)
        runs.setdefault((chunk.index, num_before), []).append(chunk)
    for (index, num_preemptions), chunks in runs.items():
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        who = f"sequence {index}: " if index else ""
        what = "again computed" if num_preemptions else "prefilled"
        how = "in one step" if len(chunks) == 1 else f"in {len(chunks)} chunks, a step each"
        text = f"{who}{what} {_count(num_tokens, 'token')} {how}"
        event = Prefilled(index, num_tokens, len(chunks), num_preemptions > 0)
        yield Entry(chunks[0].start_s, chunks[-1].end_s, text, event)


def _absences(request: RequestRecord, absences: list[Absence], memory: Memory, end_s: float) -> Iterator[Entry]:
    for absence in absences:
        back_s = end_s if absence.end_s is None else absence.end_s
        who = f"sequence {absence.index} was" if absence.index else "was"
        if absence.for_request_id == request.id:
            why = "because no KV block was left, and no other sequence to take one from"
        else:
            why = f"for {_name(absence.for_request_id, request, memory)}"
        ended = "ran again after" if absence.end_s is not None else "has not run again for"
        text = f"{who} preempted {why}; {ended} {_time(back_s - absence.start_s)}"
        event = WasPreempted(absence.index, memory.labels.get(absence.for_request_id, ""))
        yield Entry(absence.start_s, back_s, text, event)
        yield from _waits(request, absence.index, absence.start_s, back_s, memory)


def _siblings_waits(request: RequestRecord, memory: Memory, end_s: float) -> Iterator[Entry]:
    """Sequences but the first come into the queue with the first one's first token."""
    if request.first_token_s is None:
        return
    first_chunks: dict[int, float] = {}
    for chunk in request.chunks:
        first_chunks.setdefault(chunk.index, chunk.start_s)
    for index in range(1, request.params.n):
        until_s = first_chunks.get(index, end_s)
        waits = _waits(request, index, request.first_token_s, until_s, memory)
        yield from (entry for entry in waits if isinstance(entry.event, Waited) and not entry.event.num_before)


def _decode(request: RequestRecord) -> Iterator[Entry]:
    if request.first_token_s is not None and request.last_token_s is not None:
        took_s = request.last_token_s - request.first_token_s
        num_tokens = request.num_completion_tokens
        pace = f", {(num_tokens - 1) / took_s:.1f} a second" if took_s > 0 and num_tokens > 1 else ""
        text = f"generated {_count(num_tokens, 'token')} in {_time(took_s)}{pace}"
        yield Entry(request.first_token_s, request.last_token_s, text, Decoded(num_tokens))


def _end(request: RequestRecord) -> Iterator[Entry]:
    if request.end_s is None:
        return
    ended = Ended(request.finish_reasons, None, request.error, request.is_abandoned)
    yield Entry(request.end_s, request.end_s, _end_text(request), ended)


def _end_text(request: RequestRecord) -> str:
    if request.error is not None:
        if request.started_s is None:
            how = "it was refused" if not request.id or isinstance(request.error, Overloaded) else "it never ran"
            return f"{how}: {request.error}"
        return f"it failed: {request.error}"
    if request.is_abandoned:
        is_deadline = request.call is not None and request.call.code == "DEADLINE_EXCEEDED"
        return "its deadline passed before it was done" if is_deadline else "its caller went away before it was done"
    reasons = [request.finish_reasons[index].value for index in sorted(request.finish_reasons)]
    return f"it ended: {', '.join(reasons)}"


def _time(seconds: float) -> str:
    """In three digits or so."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.09995 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"


def _list(labels: list[str]) -> str:
    """The first few."""
    named = ", ".join(labels[:3])
    return f"request{'' if len(labels) == 1 else 's'} {named}" + (" and others" if len(labels) > 3 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
