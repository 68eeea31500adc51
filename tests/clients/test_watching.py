"""The operator's calls of both clients: snapshots as a stream, timelines, and what a newer server may add."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from nanoserve_client import (
    Cancelled,
    FinishReason,
    NotFound,
    QueueWait,
    SequencePhase,
    StepPart,
    StepPreemption,
    TimelineCacheHit,
    TimelineDecode,
    TimelineEnd,
    TimelinePreemption,
    TimelinePrefill,
    TimelineWait,
    WaitReason,
)
from nanoserve_client.v1 import admin_pb2, generation_pb2


@pytest.fixture
def server(serve):
    return serve()


def snapshot(number):
    sequence = admin_pb2.SequenceSnapshot(
        request_number=4,
        request_id="theirs",
        index=1,
        phase=admin_pb2.SEQUENCE_PHASE_DECODE,
        prompt_tokens=10,
        cached_tokens=8,
        computed_tokens=12,
        completion_tokens=3,
        max_completion_tokens=50,
        block_ids=[7, 9],
        age=Duration(seconds=2),
        preemptions=1,
        draft_tokens=6,
        accepted_draft_tokens=4,
    )
    step = admin_pb2.StepSnapshot(
        number=number,
        duration=Duration(nanos=5_000_000),
        parts=[
            admin_pb2.StepPart(
                request_number=4, index=1, start=11, tokens=1, sampled=True, draft_tokens=3, accepted_draft_tokens=2
            )
        ],
        preemptions=[admin_pb2.StepPreemption(request_number=5, index=0, for_request_number=4)],
        wait=admin_pb2.QueueWait(
            request_number=5, reason=admin_pb2.WAIT_REASON_BLOCKS, behind_request_number=4, text="blocks behind x"
        ),
        running=1,
        waiting=1,
        taken_blocks=2,
        freed_blocks=3,
    )
    return admin_pb2.WatchEngineResponse(
        stats=admin_pb2.GetStatsResponse(running=1, uptime=Duration(seconds=61)),
        sequences=[sequence],
        cached_block_ids=[1, 2],
        steps=[step],
        lost_steps=6,
    )


async def test_snapshots_come_until_the_watch_is_cancelled(face, server):
    def watch(_request, context):
        number = 0
        while context.is_active():
            number += 1
            yield snapshot(number)

    server.script.watch = watch
    stream = face.connect(server.target, api_key="boss").watch_engine(interval=0.25, request_id="mine")
    first, second = await face.next(stream), await face.next(stream)
    assert server.script.requests == [admin_pb2.WatchEngineRequest(interval=Duration(nanos=250_000_000))]
    assert server.script.metadata[0]["authorization"] == "Bearer boss"
    assert (first.stats.running, first.stats.uptime_s) == (1, 61.0)
    [sequence] = first.sequences
    assert (sequence.request_number, sequence.request_id, sequence.index) == (4, "theirs", 1)
    assert sequence.phase is SequencePhase.DECODE
    assert (sequence.block_ids, sequence.age_s, sequence.preemptions) == ((7, 9), 2.0, 1)
    [step] = first.steps
    assert (sequence.draft_tokens, sequence.accepted_draft_tokens) == (6, 4)
    assert step.parts == (StepPart(4, 1, 11, 1, 0, True, 3, 2),)
    assert step.preemptions == (StepPreemption(5, 0, 4),)
    assert step.wait == QueueWait(5, 0, WaitReason.BLOCKS, 4, "blocks behind x")
    assert (step.duration_s, step.taken_blocks, step.freed_blocks, step.failed) == (0.005, 2, 3, False)
    assert (first.cached_block_ids, first.lost_steps) == ((1, 2), 6)
    assert second.steps[0].number == 2
    stream.cancel()
    with pytest.raises(Cancelled):
        await face.deltas(stream)
    assert server.script.ended.wait(20)


async def test_without_an_interval_the_server_chooses(face, server):
    server.script.watch = lambda _request, _context: iter([snapshot(1)])
    await face.next(face.connect(server.target).watch_engine())
    assert server.script.requests == [admin_pb2.WatchEngineRequest()]


async def test_what_a_newer_server_says_is_unknown_and_no_error(face, server):
    newer = snapshot(1)
    newer.sequences[0].phase = 99
    newer.steps[0].wait.reason = 99
    server.script.watch = lambda _request, _context: iter([newer])
    seen = await face.next(face.connect(server.target).watch_engine())
    assert seen.sequences[0].phase is SequencePhase.UNKNOWN
    assert seen.steps[0].wait.reason is WaitReason.UNKNOWN
    entry = admin_pb2.TimelineEntry(text="something new")
    timeline = admin_pb2.RequestTimeline(entries=[entry])
    server.script.unary = lambda _request, _context: admin_pb2.ExplainRequestResponse(timelines=[timeline])
    [explained] = await face.call(face.connect(server.target).explain_request, "x")
    assert (explained.entries[0].text, explained.entries[0].event) == ("something new", None)


async def test_timelines(face, server):
    events = [
        {"wait": admin_pb2.TimelineWait(reason=admin_pb2.WAIT_REASON_ROWS, behind_request_id="x", requests_before=2)},
        {"wait": admin_pb2.TimelineWait()},
        {"cache_hit": admin_pb2.TimelineCacheHit(cached_tokens=96, prompt_tokens=128)},
        {"prefill": admin_pb2.TimelinePrefill(tokens=32, chunks=3)},
        {"preemption": admin_pb2.TimelinePreemption(for_request_id="y")},
        {"decode": admin_pb2.TimelineDecode(completion_tokens=5, draft_tokens=4, accepted_draft_tokens=3)},
        {
            "end": admin_pb2.TimelineEnd(
                finish_reasons=[generation_pb2.FINISH_REASON_EOS, generation_pb2.FINISH_REASON_UNSPECIFIED],
                reason="DEADLINE",
            )
        },
    ]
    entries = [
        admin_pb2.TimelineEntry(
            start=Duration(seconds=i), duration=Duration(nanos=500_000_000), text=f"text {i}", **event
        )
        for i, event in enumerate(events)
    ]
    timeline = admin_pb2.RequestTimeline(request_id="x", request_number=3, ended=True, entries=entries, summary="Slow.")
    server.script.unary = lambda _request, _context: admin_pb2.ExplainRequestResponse(timelines=[timeline])
    [explained] = await face.call(face.connect(server.target).explain_request, "x")
    assert server.script.requests == [admin_pb2.ExplainRequestRequest(request_id="x")]
    assert [entry.event for entry in explained.entries] == [
        TimelineWait(WaitReason.ROWS, 0, "x", 2),
        TimelineWait(None, 0, "", 0),
        TimelineCacheHit(96, 128),
        TimelinePrefill(0, 32, 3, False),
        TimelinePreemption(0, "y"),
        TimelineDecode(5, 4, 3),
        TimelineEnd((FinishReason.EOS, None), "DEADLINE", False),
    ]
    assert (explained.request_number, explained.ended, explained.summary) == (3, True, "Slow.")
    assert explained.text.splitlines()[1] == "   1.000 s  text 1"
    assert explained.entries[1].duration_s == 0.5


async def test_a_request_that_is_not_known(face, server):
    def refuse(_request, context):
        context.abort(grpc.StatusCode.NOT_FOUND, "no request 'x'")

    server.script.unary = refuse
    with pytest.raises(NotFound):
        await face.call(face.connect(server.target).explain_request, "x")
