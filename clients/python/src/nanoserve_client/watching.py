"""What operators see of the engine, as frozen Python values: snapshots, steps and timelines. Pure."""

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from nanoserve_client.results import FinishReason, Stats, by_number, finish_reason_of, same_fields
from nanoserve_client.v1 import admin_pb2 as pb


class SequencePhase(enum.Enum):
    """What a sequence is doing."""

    # In the queue, and not begun.
    WAITING = "waiting"
    # Its prompt, or what a preemption threw away, is being computed.
    PREFILL = "prefill"
    # It generates, in each step a token and those that were guessed right.
    DECODE = "decode"
    # It lost its KV blocks to another, and is in the queue again.
    PREEMPTED = "preempted"
    ENDED = "ended"
    # One that a newer server knows, and this client does not.
    UNKNOWN = "unknown"


_PHASES = by_number(SequencePhase, pb.SequencePhase, "SEQUENCE_PHASE_")


class WaitReason(enum.Enum):
    """What the head of the queue waits for; all others wait for the head."""

    # Too few KV blocks are free.
    BLOCKS = "blocks"
    # As many sequences run as may.
    ROWS = "rows"
    # The step has as many tokens as it may.
    TOKENS = "tokens"
    # Static batching: the batch has begun.
    BATCH = "batch"
    # Another sequence of the step computes what its prompt begins with; in the next step that is cached.
    PREFIX = "prefix"
    # Its constraint is compiled.
    CONSTRAINT = "constraint"
    # Its adapter is read, or waits for a slot; others pass meanwhile.
    ADAPTER = "adapter"
    # One that a newer server knows, and this client does not.
    UNKNOWN = "unknown"


_WAIT_REASONS = by_number(WaitReason, pb.WaitReason, "WAIT_REASON_")


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """One of a request's n sequences."""

    # The engine's own number of the request, unique since the server's start; 0 = its prompt is being encoded.
    request_number: int
    # The caller's id. Not unique.
    request_id: str
    # 0 to n - 1.
    index: int
    phase: SequencePhase
    prompt_tokens: int
    # How many of them came from the prefix cache.
    cached_tokens: int
    # Tokens whose keys and values are in the KV cache; 0 while it waits.
    computed_tokens: int
    completion_tokens: int
    # Most that it may generate.
    max_completion_tokens: int
    # KV blocks of its tokens, in order; one may be in several sequences' lists.
    block_ids: tuple[int, ...]
    # Seconds since the request arrived.
    age_s: float
    preemptions: int
    # Tokens that were guessed for it, and those of them that were right.
    draft_tokens: int
    accepted_draft_tokens: int
    # Name of the adapter that it is computed with. Empty = none.
    adapter: str

    @classmethod
    def of(cls, message: pb.SequenceSnapshot) -> Self:
        return cls(
            **same_fields(cls, message, "phase", "block_ids", "age_s"),
            phase=_PHASES.get(message.phase, SequencePhase.UNKNOWN),
            block_ids=tuple(message.block_ids),
            age_s=message.age.ToTimedelta().total_seconds(),
        )


@dataclass(frozen=True, slots=True)
class StepPart:
    """What a step computed of one sequence."""

    # As SequenceSnapshot.request_number.
    request_number: int
    index: int
    # Position of the first token.
    start: int
    # Guesses not among them: several of a prompt, one of a sequence that generates.
    tokens: int
    # How many of them are of the prompt.
    prompt_tokens: int
    # It gave the sequence a new token, and before it those that were guessed right.
    sampled: bool
    # Tokens that were guessed, and those of them that were right.
    draft_tokens: int
    accepted_draft_tokens: int


@dataclass(frozen=True, slots=True)
class StepPreemption:
    """A sequence lost its KV blocks, and waits again."""

    request_number: int
    index: int
    # The request whose turn it was; its own if there was no other to yield.
    for_request_number: int


@dataclass(frozen=True, slots=True)
class QueueWait:
    """The head of the queue in one step."""

    request_number: int
    index: int
    reason: WaitReason
    # The running request that has most of what it waits for. 0 = none runs.
    behind_request_number: int
    # What it waits for and behind whom, in plain English, such as "KV blocks behind request order-17".
    text: str

    @classmethod
    def of(cls, message: pb.QueueWait) -> Self:
        reason = _WAIT_REASONS.get(message.reason, WaitReason.UNKNOWN)
        return cls(**same_fields(cls, message, "reason"), reason=reason)


@dataclass(frozen=True, slots=True)
class StepSnapshot:
    """One step of the engine."""

    # Counts from 1, since the server's start.
    number: int
    # Seconds from its plan until its tokens were there.
    duration_s: float
    parts: tuple[StepPart, ...]
    preemptions: tuple[StepPreemption, ...]
    # None = nobody waits.
    wait: QueueWait | None
    # Sequences in the queue, and with KV blocks, after it.
    waiting: int
    running: int
    # KV blocks that sequences took, and that became free.
    taken_blocks: int
    freed_blocks: int
    # Its requests were given up.
    failed: bool

    @classmethod
    def of(cls, message: pb.StepSnapshot) -> Self:
        return cls(
            **same_fields(cls, message, "duration_s", "parts", "preemptions", "wait"),
            duration_s=message.duration.ToTimedelta().total_seconds(),
            # Many, so without a loop over their fields.
            parts=tuple(
                StepPart(
                    p.request_number,
                    p.index,
                    p.start,
                    p.tokens,
                    p.prompt_tokens,
                    p.sampled,
                    p.draft_tokens,
                    p.accepted_draft_tokens,
                )
                for p in message.parts
            ),
            preemptions=tuple(StepPreemption(**same_fields(StepPreemption, p)) for p in message.preemptions),
            wait=QueueWait.of(message.wait) if message.HasField("wait") else None,
        )


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine after its last step, and the steps since the snapshot before."""

    stats: Stats
    # Those that run or wait, oldest request first, at most 512; then those that ended since the snapshot before.
    sequences: tuple[SequenceSnapshot, ...]
    # KV blocks that are kept for their prefix, and that no sequence owns. Those in neither list are free.
    cached_block_ids: tuple[int, ...]
    # Oldest first, at most 256.
    steps: tuple[StepSnapshot, ...]
    # Steps before them that no snapshot has.
    lost_steps: int

    @classmethod
    def of(cls, message: pb.WatchEngineResponse) -> Self:
        return cls(
            stats=Stats.of(message.stats),
            sequences=tuple(map(SequenceSnapshot.of, message.sequences)),
            cached_block_ids=tuple(message.cached_block_ids),
            steps=tuple(map(StepSnapshot.of, message.steps)),
            lost_steps=message.lost_steps,
        )


# ------------------------------------------------------------------------------------------------- timelines


@dataclass(frozen=True, slots=True)
class TimelineWait:
    """A time in the queue."""

    # None = for the step that was running, and for the prompt to be encoded.
    reason: WaitReason | None
    index: int
    # The running request that had most of what was waited for. Empty = none, or not known any more.
    behind_request_id: str
    # Requests before it in the queue that waited in its stead; 0 = it was the head.
    requests_before: int


@dataclass(frozen=True, slots=True)
class TimelineCacheHit:
    """Prompt tokens that were read from the prefix cache."""

    cached_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TimelinePrefill:
    """Steps that computed known tokens."""

    index: int
    tokens: int
    # Of a step each.
    chunks: int
    # It repeats what was lost to a preemption.
    after_preemption: bool


@dataclass(frozen=True, slots=True)
class TimelinePreemption:
    """A sequence lost its KV blocks; the entry lasts until it ran again."""

    index: int
    # The request that they were for; its own if no other was left to yield; empty = not known any more.
    for_request_id: str


@dataclass(frozen=True, slots=True)
class TimelineDecode:
    """Generation, of all sequences."""

    completion_tokens: int
    # Tokens that were guessed, and those of them that were right.
    draft_tokens: int
    accepted_draft_tokens: int


@dataclass(frozen=True, slots=True)
class TimelineEnd:
    """How it ended."""

    # By index; None for a sequence that did not come to its own end.
    finish_reasons: tuple[FinishReason | None, ...]
    # Of a refusal or failure, such as "OVERLOADED"; None if there is none.
    reason: str | None
    # Its caller went away.
    abandoned: bool


TimelineEvent = TimelineWait | TimelineCacheHit | TimelinePrefill | TimelinePreemption | TimelineDecode | TimelineEnd


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One thing that happened."""

    # Seconds since the request arrived.
    start_s: float
    # 0 for what takes no time.
    duration_s: float
    # In plain English.
    text: str
    # None = of a kind that a newer server knows, and this client does not.
    event: TimelineEvent | None

    @classmethod
    def of(cls, message: pb.TimelineEntry) -> Self:
        start_s = message.start.ToTimedelta().total_seconds()
        return cls(start_s, message.duration.ToTimedelta().total_seconds(), message.text, _event(message))


def _event(message: pb.TimelineEntry) -> TimelineEvent | None:
    match message.WhichOneof("event"):
        case "wait":
            wait = message.wait
            reason = _WAIT_REASONS.get(wait.reason, WaitReason.UNKNOWN) if wait.reason else None
            return TimelineWait(reason, wait.index, wait.behind_request_id, wait.requests_before)
        case "cache_hit":
            return TimelineCacheHit(message.cache_hit.cached_tokens, message.cache_hit.prompt_tokens)
        case "prefill":
            prefill = message.prefill
            return TimelinePrefill(prefill.index, prefill.tokens, prefill.chunks, prefill.after_preemption)
        case "preemption":
            return TimelinePreemption(message.preemption.index, message.preemption.for_request_id)
        case "decode":
            decode = message.decode
            return TimelineDecode(decode.completion_tokens, decode.draft_tokens, decode.accepted_draft_tokens)
        case "end":
            end = message.end
            return TimelineEnd(tuple(map(finish_reason_of, end.finish_reasons)), end.reason or None, end.abandoned)
    return None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A request's way through the engine."""

    request_id: str
    # The engine's own number; 0 = it has none.
    request_number: int
    # When it arrived.
    create_time: datetime
    # Seconds until its end, or until now.
    duration_s: float
    ended: bool
    prompt_tokens: int
    cached_tokens: int
    # Of all its sequences.
    completion_tokens: int
    # By their begin.
    entries: tuple[TimelineEntry, ...]
    # All of it in a few sentences.
    summary: str
    # The adapter that it was computed with, and the digest of its content. Empty = none, or it was refused before.
    adapter: str
    adapter_revision: str

    @classmethod
    def of(cls, message: pb.RequestTimeline) -> Self:
        return cls(
            **same_fields(cls, message, "create_time", "duration_s", "entries"),
            create_time=message.create_time.ToDatetime(UTC),
            duration_s=message.duration.ToTimedelta().total_seconds(),
            entries=tuple(map(TimelineEntry.of, message.entries)),
        )

    @property
    def text(self) -> str:
        """All entries, a line each, with the second at which each began."""
        return "\n".join(f"{entry.start_s:8.3f} s  {entry.text}" for entry in self.entries)
