"""What happened to one request, and why it waited: records in, the contract's events with plain sentences out. Pure."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nanoserve_client.v1 import admin_pb2
from nanoserve_client.v1.generation_pb2 import FINISH_REASON_UNSPECIFIED

from nanoserve.errors import Overloaded
from nanoserve.observer import CallRecord, Chunk, RequestRecord
from nanoserve.rpc.messages import FINISH_REASONS, duration, timestamp
from nanoserve.step_record import Preemption, Wait, WaitReason

# Shorter waits are those for the step that was running.
MIN_WAIT_S = 0.0005
# Of an adapter's revision: enough to tell two apart.
REVISION_CHARS = 12

WAIT_REASONS = {reason: admin_pb2.WaitReason.Value(f"WAIT_REASON_{reason.name}") for reason in WaitReason}
# After "waited for".
WANTED = {
    WaitReason.BLOCKS: "KV blocks",
    WaitReason.ROWS: "one of the running sequences to end",
    WaitReason.TOKENS: "a step with room for more tokens",
    WaitReason.PREFIX: "its prefix to be cached",
    WaitReason.BATCH: "the batch to end",
    WaitReason.CONSTRAINT: "its constraint to be compiled",
    WaitReason.ADAPTER: "its adapter to be in a slot",
}


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

    preemption: Preemption
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened."""

    # time.monotonic().
    start_s: float
    end_s: float
    # The event, and the same as a sentence with what is known besides; no times.
    told: admin_pb2.TimelineEntry
    # Of a wait: seconds that went by each reason, most first. Empty = it was not for the scheduler.
    shares: Mapping[WaitReason, float] = field(default_factory=dict)

    def message(self, arrival_s: float) -> admin_pb2.TimelineEntry:
        """With times from the arrival on; a call's own arrival is a moment before that of its request."""
        start, took = duration(max(0.0, self.start_s - arrival_s)), duration(max(0.0, self.end_s - self.start_s))
        message = admin_pb2.TimelineEntry(start=start, duration=took)
        message.MergeFrom(self.told)
        return message


def timeline_of(request: RequestRecord, code: str, memory: Memory, now_s: float) -> admin_pb2.RequestTimeline:
    """The timeline of a request that runs or has ended. code: the status of its RPC; empty = not known, or no RPC."""
    end_s = now_s if request.end_s is None else request.end_s
    absences = [each for each in memory.absences if each.preemption.request_id == request.id]
    entries = [*_queue(request, memory, end_s), *_cache_hit(request), *_prefills(request, absences)]
    entries += _absences(request, absences, memory, end_s)
    entries += _siblings_waits(request, memory, end_s)
    entries += _decode(request)
    entries.sort(key=lambda entry: entry.start_s)
    return _timeline(request, end_s, [*entries, *_end(request, code)])


def timeline_of_refusal(call: CallRecord) -> admin_pb2.RequestTimeline:
    """The timeline of a call that was refused before the engine heard of it."""
    why = f"it was refused: {call.code}" + (f" ({call.reason})" if call.reason else "")
    end = admin_pb2.TimelineEnd(reason=call.reason, abandoned=not call.reason)
    record = RequestRecord(call.request_id, call.start_s, end_s=call.end_s)
    told = admin_pb2.TimelineEntry(text=why, end=end)
    return _timeline(record, call.end_s, [Entry(call.start_s, call.end_s, told)])


def _timeline(request: RequestRecord, end_s: float, entries: list[Entry]) -> admin_pb2.RequestTimeline:
    """end_s: its end, or now. entries: by their begin."""
    return admin_pb2.RequestTimeline(
        request_id=request.label,
        request_number=int(request.id or 0),
        create_time=timestamp(time.time() - time.monotonic() + request.arrival_s),
        duration=duration(end_s - request.arrival_s),
        ended=request.end_s is not None,
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.num_cached_tokens,
        completion_tokens=request.num_completion_tokens,
        entries=[entry.message(request.arrival_s) for entry in entries],
        summary=" ".join(map(_as_sentence, [*_computed_with(request), *_summary(entries)])),
        adapter=request.adapter if request.started_s is not None else "",
        adapter_revision=request.adapter_revision,
    )


def _computed_with(request: RequestRecord) -> Iterator[str]:
    if request.adapter and request.started_s is not None:
        yield f"computed with adapter {request.adapter}, revision {request.adapter_revision[:REVISION_CHARS]}"


def _as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _summary(entries: list[Entry]) -> list[str]:
    """All of it in a few sentences, without what makes them sentences."""
    by_event: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_event[str(entry.told.WhichOneof("event"))].append(entry)
    sentences = [*_waited(by_event["wait"]), *(entry.told.text for entry in by_event["cache_hit"])]
    if by_event["prefill"]:
        sentences.append(f"prefilled in {_count(by_event['prefill'][0].told.prefill.chunks, 'chunk')}")
    if preemptions := by_event["preemption"]:
        times = "once" if len(preemptions) == 1 else f"{len(preemptions)} times"
        labels = list(filter(None, dict.fromkeys(entry.told.preemption.for_request_id for entry in preemptions)))
        sentences.append(f"preempted {times}" + (f", for {_list(labels)}" if labels else ""))
    return sentences + [entry.told.text for entry in by_event["decode"] + by_event["end"]]


def _waited(waits: list[Entry]) -> Iterator[str]:
    shares: dict[WaitReason, float] = defaultdict(float)
    # The longest wait for each reason says whom it was behind.
    behind: dict[WaitReason, str] = {}
    for entry in sorted(waits, key=lambda entry: entry.start_s - entry.end_s):
        for reason, share_s in entry.shares.items():
            shares[reason] += share_s
        for reason in itertools.islice(entry.shares, 1):
            behind.setdefault(reason, entry.told.wait.behind_request_id)
    for reason, share_s in sorted(shares.items(), key=lambda share: -share[1]):
        whom = f" behind request {behind[reason]}" if behind.get(reason) else ""
        yield f"waited {_time(share_s)} for {WANTED[reason]}{whom}"
    if not shares:
        yield from (entry.told.text for entry in waits)


# ------------------------------------------------------------------------------------------------- the queue


def _queue(request: RequestRecord, memory: Memory, end_s: float) -> Iterator[Entry]:
    """From its arrival until it is first scheduled."""
    start_s, until_s = request.arrival_s, end_s if request.started_s is None else request.started_s
    waits = list(_waits(request, 0, start_s, until_s, memory)) if request.id else []
    unexplained_s = (waits[0].start_s if waits else until_s) - start_s
    if unexplained_s > MIN_WAIT_S and not (request.end_s is not None and request.started_s is None and not waits):
        took, spans = _time(unexplained_s), memory.queue_spans
        if request.id and spans and spans[0].start_s > start_s and unexplained_s > 1:
            text = f"waited {took}; what for is no longer known"
        else:
            text = f"waited {took} for its prompt to be encoded, and for the step that was running"
        told = admin_pb2.TimelineEntry(text=text, wait=admin_pb2.TimelineWait())
        yield Entry(start_s, start_s + unexplained_s, told)
    yield from waits


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
    spent: dict[WaitReason, float] = defaultdict(float)
    for span in group:
        spent[span.wait.reason] += min(end_s, span.end_s) - max(start_s, span.start_s)
    shares = dict(sorted(spent.items(), key=lambda share: -share[1]))
    last = {span.wait.reason: span.wait for span in group}
    main = last[next(iter(shares))]
    is_head = _kind(group[0], request, index) is not None
    before = [] if is_head else list(dict.fromkeys(span.wait.request_id for span in group))
    wait = admin_pb2.TimelineWait(
        reason=WAIT_REASONS[main.reason],
        index=index,
        behind_request_id=memory.labels.get(main.behind_request_id, ""),
        requests_before=len(before),
    )
    what = []
    for reason, share_s in shares.items():
        took = f"{_time(share_s)} " if len(shares) > 1 else ""
        behind_id = last[reason].behind_request_id
        behind = f" behind {_name(behind_id, request, memory)}" if behind_id else ""
        what.append(f"{took}for {WANTED[reason]}{behind}")
    who = f"sequence {index} " if index else ""
    whom = _name(before[0], request, memory) if len(before) == 1 else f"{len(before)} requests"
    after = f"after {whom}, which waited " if before else ""
    text = f"{who}waited {_time(until_s - begin_s)} {after}{' and '.join(what)}"
    return Entry(begin_s, until_s, admin_pb2.TimelineEntry(text=text, wait=wait), shares)


def _name(id: str, request: RequestRecord, memory: Memory) -> str:
    if id == request.id:
        return "its own other sequences"
    return f"request {memory.labels[id]}" if id in memory.labels else "a request that is forgotten by now"


# --------------------------------------------------------------------------------------------- while it runs


def _cache_hit(request: RequestRecord) -> Iterator[Entry]:
    if request.started_s is not None and request.num_cached_tokens:
        num_cached, num_prompt = request.num_cached_tokens, request.num_prompt_tokens
        text = f"{num_cached} of {num_prompt} prompt tokens came from the prefix cache"
        hit = admin_pb2.TimelineCacheHit(cached_tokens=num_cached, prompt_tokens=num_prompt)
        yield Entry(request.started_s, request.started_s, admin_pb2.TimelineEntry(text=text, cache_hit=hit))


def _prefills(request: RequestRecord, absences: list[Absence]) -> Iterator[Entry]:
    """For each sequence, the chunks between two preemptions together."""
    runs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in request.chunks:
        num_before = sum(a.preemption.index == chunk.index and a.start_s <= chunk.start_s for a in absences)
        runs.setdefault((chunk.index, num_before), []).append(chunk)
    for (index, num_preemptions), chunks in runs.items():
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        who = f"sequence {index}: " if index else ""
        what = "again computed" if num_preemptions else "prefilled"
        how = "in one step" if len(chunks) == 1 else f"in {len(chunks)} chunks, a step each"
        text = f"{who}{what} {_count(num_tokens, 'token')} {how}"
        prefill = admin_pb2.TimelinePrefill(
            index=index, tokens=num_tokens, chunks=len(chunks), after_preemption=num_preemptions > 0
        )
        told = admin_pb2.TimelineEntry(text=text, prefill=prefill)
        yield Entry(chunks[0].start_s, chunks[-1].end_s, told)


def _absences(request: RequestRecord, absences: list[Absence], memory: Memory, end_s: float) -> Iterator[Entry]:
    for absence in absences:
        index, for_id = absence.preemption.index, absence.preemption.for_request_id
        back_s = end_s if absence.end_s is None else absence.end_s
        who = f"sequence {index} was" if index else "was"
        if for_id == request.id:
            why = "because no KV block was left, and no other sequence to take one from"
        else:
            why = f"for {_name(for_id, request, memory)}"
        ended = "ran again after" if absence.end_s is not None else "has not run again for"
        text = f"{who} preempted {why}; {ended} {_time(back_s - absence.start_s)}"
        preemption = admin_pb2.TimelinePreemption(index=index, for_request_id=memory.labels.get(for_id, ""))
        yield Entry(absence.start_s, back_s, admin_pb2.TimelineEntry(text=text, preemption=preemption))
        yield from _waits(request, index, absence.start_s, back_s, memory)


def _siblings_waits(request: RequestRecord, memory: Memory, end_s: float) -> Iterator[Entry]:
    """Sequences but the first come into the queue with the first one's first token."""
    if request.first_token_s is None:
        return
    # By sequence, the begin of its first chunk.
    begins_s = {chunk.index: chunk.start_s for chunk in reversed(request.chunks)}
    for index in range(1, request.params.n):
        until_s = begins_s.get(index, end_s)
        waits = _waits(request, index, request.first_token_s, until_s, memory)
        yield from (entry for entry in waits if not entry.told.wait.requests_before)


def _decode(request: RequestRecord) -> Iterator[Entry]:
    if request.first_token_s is not None and request.last_token_s is not None:
        took_s = request.last_token_s - request.first_token_s
        num_tokens = request.num_completion_tokens
        pace = f", {(num_tokens - 1) / took_s:.1f} a second" if took_s > 0 and num_tokens > 1 else ""
        num_drafted = sum(totals.num_tokens for totals in request.drafts.values())
        num_accepted = sum(totals.num_accepted for totals in request.drafts.values())
        guesses = f"; {num_accepted} of {num_drafted} guesses were right" if num_drafted else ""
        text = f"generated {_count(num_tokens, 'token')} in {_time(took_s)}{pace}{guesses}"
        decode = admin_pb2.TimelineDecode(
            completion_tokens=num_tokens, draft_tokens=num_drafted, accepted_draft_tokens=num_accepted
        )
        told = admin_pb2.TimelineEntry(text=text, decode=decode)
        yield Entry(request.first_token_s, request.last_token_s, told)


def _end(request: RequestRecord, code: str) -> Iterator[Entry]:
    if request.end_s is None:
        return
    reasons = [request.finish_reasons.get(index) for index in range(max(request.finish_reasons, default=-1) + 1)]
    end = admin_pb2.TimelineEnd(
        finish_reasons=[FINISH_REASONS[each] if each else FINISH_REASON_UNSPECIFIED for each in reasons],
        reason="" if request.error is None else request.error.reason,
        abandoned=request.is_abandoned,
    )
    told = admin_pb2.TimelineEntry(text=_end_text(request, code), end=end)
    yield Entry(request.end_s, request.end_s, told)


def _end_text(request: RequestRecord, code: str) -> str:
    if request.error is not None:
        if request.started_s is None:
            how = "it was refused" if not request.id or isinstance(request.error, Overloaded) else "it never ran"
            return f"{how}: {request.error}"
        return f"it failed: {request.error}"
    if request.is_abandoned:
        is_deadline = code == "DEADLINE_EXCEEDED"
        return "its deadline passed before it was done" if is_deadline else "its caller went away before it was done"
    return f"it ended: {', '.join(reason.value for _, reason in sorted(request.finish_reasons.items()))}"


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
