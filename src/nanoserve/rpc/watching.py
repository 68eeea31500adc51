"""What the flight recorder knows, as messages of the contract. Pure."""

import time
from collections.abc import Mapping
from typing import Any

from nanoserve_client.v1 import admin_pb2
from nanoserve_client.v1.generation_pb2 import FINISH_REASON_UNSPECIFIED

from nanoserve.observability.flight_recorder import SequencePhase, SequenceState, Snapshot
from nanoserve.observability.timeline import (
    WANTED,
    CacheHit,
    Decoded,
    Ended,
    Entry,
    Prefilled,
    Timeline,
    Waited,
    WasPreempted,
)
from nanoserve.rpc.messages import FINISH_REASONS, duration, timestamp
from nanoserve.step_record import StepRecord, WaitReason

# The contract has the same names, with a prefix.
_PHASES = {phase: admin_pb2.SequencePhase.Value(f"SEQUENCE_PHASE_{phase.name}") for phase in SequencePhase}
_WAIT_REASONS: Mapping[WaitReason | None, "admin_pb2.WaitReason.ValueType"] = {
    None: admin_pb2.WAIT_REASON_UNSPECIFIED,
    **{reason: admin_pb2.WaitReason.Value(f"WAIT_REASON_{reason.name}") for reason in WaitReason},
}


def snapshot(taken: Snapshot, stats: admin_pb2.GetStatsResponse) -> admin_pb2.WatchEngineResponse:
    labels = {state.request.id: state.request.label for state in taken.sequences}
    return admin_pb2.WatchEngineResponse(
        stats=stats,
        sequences=[_sequence(state, taken.time_s) for state in taken.sequences],
        cached_block_ids=taken.cached_block_ids,
        steps=[_step(step, labels) for step in taken.steps],
        lost_steps=taken.num_lost_steps,
    )


def _sequence(state: SequenceState, now_s: float) -> admin_pb2.SequenceSnapshot:
    request = state.request
    return admin_pb2.SequenceSnapshot(
        request_number=_number(request.id),
        request_id=request.label,
        index=state.index,
        phase=_PHASES[state.phase],
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.num_cached_tokens,
        computed_tokens=state.num_computed_tokens,
        completion_tokens=state.num_completion_tokens,
        max_completion_tokens=request.params.max_tokens or 0,
        block_ids=state.block_ids,
        age=duration(now_s - request.arrival_s),
        preemptions=sum(preemption.index == state.index for _, preemption in request.preemptions),
    )


def _step(step: StepRecord, labels: Mapping[str, str]) -> admin_pb2.StepSnapshot:
    """labels: the callers' ids, by the engine's."""
    releases = (*step.early_releases, *step.late_releases)
    message = admin_pb2.StepSnapshot(
        number=step.number,
        duration=duration(step.end_s - step.start_s),
        parts=[
            admin_pb2.StepPart(
                request_number=_number(part.request_id),
                index=part.sequence_index,
                start=part.start,
                tokens=part.num_tokens,
                prompt_tokens=part.num_prompt_tokens,
                sampled=part.samples,
            )
            for part in step.parts
        ],
        preemptions=[
            admin_pb2.StepPreemption(
                request_number=_number(each.request_id),
                index=each.index,
                for_request_number=_number(each.for_request_id),
            )
            for each in step.preemptions
        ],
        waiting=step.num_waiting,
        running=step.num_running,
        taken_blocks=sum(len(part.new_block_ids) for part in step.parts),
        freed_blocks=sum(len(release.freed_block_ids) for release in releases),
        failed=step.has_failed,
    )
    if (wait := step.wait) is not None:
        behind = labels.get(wait.behind_request_id)
        message.wait.CopyFrom(
            admin_pb2.QueueWait(
                request_number=_number(wait.request_id),
                index=wait.index,
                reason=_WAIT_REASONS[wait.reason],
                behind_request_number=_number(wait.behind_request_id),
                text=WANTED[wait.reason] + (f" behind request {behind}" if behind else ""),
            )
        )
    return message


def timeline(known: Timeline) -> admin_pb2.RequestTimeline:
    return admin_pb2.RequestTimeline(
        request_id=known.label,
        request_number=_number(known.id),
        create_time=timestamp(time.time() - time.monotonic() + known.arrival_s),
        duration=duration(known.end_s - known.arrival_s),
        ended=known.is_over,
        prompt_tokens=known.num_prompt_tokens,
        cached_tokens=known.num_cached_tokens,
        completion_tokens=known.num_completion_tokens,
        entries=[_entry(entry, known.arrival_s) for entry in known.entries],
        summary=known.summary,
    )


def _entry(entry: Entry, arrival_s: float) -> admin_pb2.TimelineEntry:
    # A call's own arrival is a moment before that of its request.
    start, took = duration(max(0.0, entry.start_s - arrival_s)), duration(max(0.0, entry.end_s - entry.start_s))
    return admin_pb2.TimelineEntry(start=start, duration=took, text=entry.text, **_event(entry))


def _event(entry: Entry) -> dict[str, Any]:
    match entry.event:
        case Waited(reason, index, behind, num_before):
            wait = admin_pb2.TimelineWait(
                reason=_WAIT_REASONS[reason], index=index, behind_request_id=behind, requests_before=num_before
            )
            return {"wait": wait}
        case CacheHit(num_cached_tokens, num_prompt_tokens):
            hit = admin_pb2.TimelineCacheHit(cached_tokens=num_cached_tokens, prompt_tokens=num_prompt_tokens)
            return {"cache_hit": hit}
        case Prefilled(index, num_tokens, num_chunks, is_after_preemption):
            prefill = admin_pb2.TimelinePrefill(
                index=index, tokens=num_tokens, chunks=num_chunks, after_preemption=is_after_preemption
            )
            return {"prefill": prefill}
        case WasPreempted(index, for_label):
            return {"preemption": admin_pb2.TimelinePreemption(index=index, for_request_id=for_label)}
        case Decoded(num_tokens):
            return {"decode": admin_pb2.TimelineDecode(completion_tokens=num_tokens)}
        case Ended(finish_reasons, reason, error, is_abandoned):
            reasons = {index: FINISH_REASONS[each] for index, each in finish_reasons.items()}
            num_told = max(reasons, default=-1) + 1
            end = admin_pb2.TimelineEnd(
                finish_reasons=[reasons.get(index, FINISH_REASON_UNSPECIFIED) for index in range(num_told)],
                reason=reason or ("" if error is None else error.reason),
                abandoned=is_abandoned,
            )
            return {"end": end}


def _number(engine_id: str) -> int:
    return int(engine_id or 0)
