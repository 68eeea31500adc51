"""The flight recorder of an engine: timelines name the true cause, snapshots agree with the pool, all is bounded."""

import asyncio
import contextlib
import re
from dataclasses import replace
from unittest import mock

import pytest
from engine_bench import BLOCK, SECONDS, VOCAB, running, two_right_drafts
from fake_executor import expected_completion
from nanoserve_client.v1 import admin_pb2
from nanoserve_client.v1.admin_pb2 import (
    TimelineCacheHit,
    TimelineDecode,
    TimelineEnd,
    TimelinePreemption,
    TimelinePrefill,
    TimelineWait,
)

from nanoserve.errors import Overloaded, RequestError
from nanoserve.flight_recorder import recorder as flight_recorder
from nanoserve.flight_recorder import timeline as timelines
from nanoserve.flight_recorder.recorder import FlightRecorder
from nanoserve.flight_recorder.timeline import WAIT_REASONS
from nanoserve.observer import CallRecord, Observer, Observers, RequestRecord
from nanoserve.request import SamplingParams
from nanoserve.step_record import Preemption, StepRecord, Wait, WaitReason

ROWS, BLOCKS = admin_pb2.WAIT_REASON_ROWS, admin_pb2.WAIT_REASON_BLOCKS


def prompt(start, count):
    return [(start + i) % 256 for i in range(count)]


class Onlooker(Observer):
    """Takes a snapshot after each step."""

    def __init__(self, recorder):
        self.recorder, self.seen = recorder, []

    def step_ended(self, step):
        self.seen.append((step, *self.recorder.snapshot(self.seen[-1][2] if self.seen else None)))


@contextlib.asynccontextmanager
async def recorded(*, onlooker=None, **options):
    """A bench with a recorder; its gate is shut, so that a test says when the first step ends."""
    recorder = FlightRecorder() if onlooker is None else onlooker.recorder
    observers = Observers(*filter(None, (recorder, onlooker)))
    async with running(observers=observers, **options) as bench:
        bench.executor.gate.clear()
        yield bench, recorder


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


async def ask(bench, label, tokens, **params):
    """A request that is posted to the scheduler; its task."""
    num_posted = len(bench.engine._streams)
    task = asyncio.create_task(bench.collect(tokens, request={"label": label}, **params))
    await until(lambda: task.done() or len(bench.engine._streams) > num_posted)
    return task


async def in_a_step(bench, label, tokens, **params):
    """The same, and its first step has begun."""
    num_steps = bench.executor.num_begun
    task = await ask(bench, label, tokens, **params)
    await until(lambda: bench.executor.num_begun > num_steps)
    return task


async def finish(bench, *tasks):
    bench.executor.gate.set()
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*tasks)
    await bench.until_free()


def explained(recorder, label):
    [timeline] = recorder.explain(label)
    return timeline


def entries_of(recorder, label):
    """Before they become messages, whose times are rounded and never below zero."""
    with mock.patch.object(timelines, "_summary", return_value="") as summary:
        explained(recorder, label)
    return summary.call_args.args[0]


def event_of(told):
    return getattr(told, told.WhichOneof("event"))


def events(timeline, kind):
    return [event_of(entry) for entry in timeline.entries if isinstance(event_of(entry), kind)]


def reasons(timeline):
    """Without those that are not for the scheduler."""
    names = {number: reason for reason, number in WAIT_REASONS.items()}
    return [names[event.reason] for event in events(timeline, TimelineWait) if event.reason]


def text_of(timeline):
    return "\n".join(entry.text for entry in timeline.entries)


@pytest.mark.parametrize(
    ("options", "reason", "text"),
    [
        ({"max_num_seqs": 1}, WaitReason.ROWS, "for one of the running sequences to end behind request first"),
        ({"num_blocks": 10}, WaitReason.BLOCKS, "for KV blocks behind request first"),
        ({"batching": "static"}, WaitReason.BATCH, "for the batch to end behind request first"),
    ],
)
async def test_a_wait_names_what_it_was_for_and_behind_whom(options, reason, text):
    async with recorded(**options) as (bench, recorder):
        first = await in_a_step(bench, "first", prompt(0, 20), max_tokens=8)
        second = await ask(bench, "second", prompt(100, 20), max_tokens=4)
        third = await ask(bench, "third", prompt(200, 20), max_tokens=4)
        await finish(bench, first, second, third)
    timeline = explained(recorder, "second")
    assert reasons(timeline) == [reason]
    assert text in text_of(timeline)
    [wait] = [e for e in events(timeline, TimelineWait) if e.reason]
    assert (wait.behind_request_id, wait.requests_before) == ("first", 0)
    assert re.search(rf"Waited [\d.]+ m?s {text}\.", timeline.summary)
    # The third waited for the second to get its turn, too.
    behind_second = next(e for e in events(explained(recorder, "third"), TimelineWait) if e.reason)
    assert (behind_second.reason, behind_second.requests_before) == (WAIT_REASONS[reason], 1)
    assert "after request second, which waited" in text_of(explained(recorder, "third"))
    assert not reasons(explained(recorder, "first"))


async def test_a_wait_for_the_token_budget():
    async with recorded(max_num_batched_tokens=16) as (bench, recorder):
        blocker = await in_a_step(bench, "blocker", prompt(0, 5), max_tokens=2)
        long = await ask(bench, "long", prompt(50, 60), max_tokens=2)
        short = await ask(bench, "short", prompt(150, 6), max_tokens=2)
        await finish(bench, blocker, long, short)
    timeline = explained(recorder, "short")
    assert WaitReason.TOKENS in reasons(timeline)
    assert "for a step with room for more tokens behind request long" in text_of(timeline)


async def test_chunks_are_counted():
    async with recorded(max_num_batched_tokens=16) as (bench, recorder):
        task = await in_a_step(bench, "long", prompt(0, 40), max_tokens=3)
        await finish(bench, task)
    timeline = explained(recorder, "long")
    assert events(timeline, TimelinePrefill) == [TimelinePrefill(index=0, tokens=40, chunks=3)]
    assert "prefilled 40 tokens in 3 chunks, a step each" in text_of(timeline)
    assert events(timeline, TimelineDecode) == [TimelineDecode(completion_tokens=3)]
    assert text_of(timeline).endswith("it ended: length")
    assert "Prefilled in 3 chunks. Generated 3 tokens in " in timeline.summary


async def test_guesses_are_told():
    async with recorded() as (bench, recorder):
        bench.executor._draft = two_right_drafts
        await finish(bench, await in_a_step(bench, "guessed", prompt(0, 9), max_tokens=6))
    timeline = explained(recorder, "guessed")
    decode = TimelineDecode(completion_tokens=6, draft_tokens=4, accepted_draft_tokens=3)
    assert events(timeline, TimelineDecode) == [decode]
    assert re.search(
        r"Generated 6 tokens in [\d.]+ m?s, [\d.]+ a second; 3 of 4 guesses were right\.", timeline.summary
    )


async def test_cached_tokens_are_told():
    async with recorded() as (bench, recorder):
        await finish(bench, await in_a_step(bench, "first", prompt(0, 33), max_tokens=2))
        await finish(bench, await ask(bench, "second", [*prompt(0, 24), *prompt(99, 9)], max_tokens=2))
    assert not events(explained(recorder, "first"), TimelineCacheHit)
    timeline = explained(recorder, "second")
    assert events(timeline, TimelineCacheHit) == [TimelineCacheHit(cached_tokens=24, prompt_tokens=33)]
    assert "24 of 33 prompt tokens came from the prefix cache" in text_of(timeline)
    assert "24 of 33 prompt tokens came from the prefix cache. Prefilled in 1 chunk." in timeline.summary
    assert events(timeline, TimelinePrefill) == [TimelinePrefill(index=0, tokens=9, chunks=1)]


async def test_a_preemption_names_for_whom_and_what_came_after():
    async with recorded(num_blocks=8) as (bench, recorder):
        old = await in_a_step(bench, "old", prompt(0, 12), max_tokens=14)
        young = await ask(bench, "young", prompt(100, 12), max_tokens=14)
        await finish(bench, old, young)
    timeline = explained(recorder, "young")
    assert [e.for_request_id for e in events(timeline, TimelinePreemption)] == ["old"]
    assert "Preempted once, for request old." in timeline.summary
    assert "was preempted for request old; ran again after" in text_of(timeline)
    assert any(e.after_preemption for e in events(timeline, TimelinePrefill))
    assert reasons(timeline) == [WaitReason.BLOCKS]
    entries = entries_of(recorder, "young")
    [absence] = [e for e in entries if isinstance(event_of(e.told), TimelinePreemption)]
    [wait] = [e for e in entries if isinstance(event_of(e.told), TimelineWait) and event_of(e.told).reason]
    assert absence.start_s <= wait.start_s
    assert wait.end_s <= absence.end_s
    assert not events(explained(recorder, "old"), TimelinePreemption)


async def test_sequences_of_one_request_wait_for_each_other():
    async with recorded(max_num_seqs=1) as (bench, recorder):
        await finish(bench, await in_a_step(bench, "both", prompt(0, 9), n=2, max_tokens=5))
    timeline = explained(recorder, "both")
    [wait] = [e for e in events(timeline, TimelineWait) if e.reason]
    assert (wait.index, wait.reason) == (1, admin_pb2.WAIT_REASON_ROWS)
    assert "sequence 1 waited" in text_of(timeline)
    assert "behind its own other sequences" in text_of(timeline)


async def test_entries_lie_inside_the_request_and_are_in_order():
    async with recorded(num_blocks=8, max_num_seqs=2) as (bench, recorder):
        tasks = [await in_a_step(bench, "0", prompt(0, 12), max_tokens=12)]
        tasks += [await ask(bench, f"{i}", prompt(40 * i, 12), max_tokens=12) for i in range(1, 5)]
        await finish(bench, *tasks)
    for i in range(5):
        [request] = [request for request, _ in recorder._ended.values() if request.label == f"{i}"]
        entries = entries_of(recorder, f"{i}")
        starts = [entry.start_s for entry in entries]
        assert starts == sorted(starts)
        assert all(request.arrival_s <= e.start_s <= e.end_s <= request.end_s for e in entries)
        # What it waited, from its arrival until it began, is all there is before its first chunk.
        begun_s = next(e.start_s for e in entries if isinstance(event_of(e.told), TimelinePrefill))
        waited_s = sum(
            e.end_s - e.start_s for e in entries if isinstance(event_of(e.told), TimelineWait) and e.end_s <= begun_s
        )
        assert waited_s <= begun_s - request.arrival_s + 1e-9


async def test_a_running_request_has_a_timeline_too():
    async with recorded(max_num_seqs=1) as (bench, recorder):
        first = await in_a_step(bench, "first", prompt(0, 9), max_tokens=4)
        second = await ask(bench, "second", prompt(0, 9), max_tokens=4)
        assert not explained(recorder, "first").ended
        assert not events(explained(recorder, "second"), TimelineEnd)
        await finish(bench, first, second)
        assert explained(recorder, "first").ended


async def test_requests_with_one_label_are_all_told_newest_first():
    async with recorded() as (bench, recorder):
        for count in (9, 10, 11):
            await finish(bench, await ask(bench, "same", prompt(0, count), max_tokens=2))
    assert [timeline.prompt_tokens for timeline in recorder.explain("same")] == [11, 10, 9]


async def test_of_many_with_one_label_the_newest_are_told():
    recorder = FlightRecorder()
    for i in range(40):
        recorder.request_ended(RequestRecord("same", float(i), number=i, id=f"{i}", end_s=i + 0.5))
    assert [timeline.request_number for timeline in recorder.explain("same")] == list(range(39, 23, -1))


async def test_an_unknown_label_has_no_timeline():
    assert FlightRecorder().explain("never") == []


async def test_a_rejected_request_says_why():
    async with recorded(max_waiting=2, max_num_seqs=1) as (bench, recorder):
        first = await in_a_step(bench, "first", prompt(0, 9), max_tokens=2)
        second = await ask(bench, "second", prompt(0, 9), max_tokens=2)
        with pytest.raises(Overloaded):
            await bench.collect(prompt(0, 9), request={"label": "third"})
        [entry] = explained(recorder, "third").entries
        assert entry.text.startswith("it was refused: the queue is full")
        await finish(bench, first, second)


async def test_a_call_that_never_became_a_request_says_why():
    recorder = FlightRecorder()
    method = "nanoserve.v1.GenerationService/Generate"
    call = CallRecord(method, "mine", 1.0, code="INVALID_ARGUMENT", reason="INVALID_REQUEST", end_s=1.5)
    recorder.call_ended(call)
    [entry] = explained(recorder, "mine").entries
    assert entry.text == "it was refused: INVALID_ARGUMENT (INVALID_REQUEST)"
    assert event_of(entry).reason == "INVALID_REQUEST"
    recorder.call_ended(CallRecord("nanoserve.v1.ModelService/ListModels", "list", 1.0, end_s=1.5))
    assert not recorder.explain("list")


async def test_one_that_is_abandoned_while_it_waits_says_so():
    async with recorded(max_num_seqs=1) as (bench, recorder):
        first = await in_a_step(bench, "first", prompt(0, 9), max_tokens=2)
        second = await ask(bench, "second", prompt(0, 9), max_tokens=2)
        second.cancel()
        await finish(bench, first)
    assert text_of(explained(recorder, "second")).endswith("its caller went away before it was done")
    assert events(explained(recorder, "second"), TimelineEnd)[0].abandoned


async def test_a_failed_request_says_so():
    async with recorded() as (bench, recorder):
        bench.executor.is_broken = True
        with pytest.raises(RequestError):
            await finish(bench, await in_a_step(bench, "unlucky", prompt(0, 9)))
        assert "it failed: the engine failed" in text_of(explained(recorder, "unlucky"))


# ------------------------------------------------------------------------------------------------ snapshots


async def test_a_snapshot_before_the_first_step_is_empty():
    assert FlightRecorder().snapshot(None) == (admin_pb2.WatchEngineResponse(), 0)


async def test_snapshots_agree_with_the_pool():
    onlooker = Onlooker(FlightRecorder())
    async with recorded(onlooker=onlooker, num_blocks=20, max_num_seqs=3, max_num_batched_tokens=12) as (bench, _):
        tasks = [await ask(bench, f"{i}", prompt(i % 3, 16 + i), n=1 + i % 2, max_tokens=9) for i in range(6)]
        await finish(bench, *tasks)
    for step, snapshot, _ in onlooker.seen:
        owned = {block for state in snapshot.sequences for block in state.block_ids}
        assert len(owned) == step.num_owned_blocks
        assert len(snapshot.cached_block_ids) == step.num_cached_blocks
        assert not owned & set(snapshot.cached_block_ids)
        assert sum(bool(state.block_ids) for state in snapshot.sequences) == step.num_running
        for state in snapshot.sequences:
            assert (
                state.computed_tokens <= len(state.block_ids) * BLOCK or state.phase == admin_pb2.SEQUENCE_PHASE_ENDED
            )
    numbers = [step.number for _, snapshot, _ in onlooker.seen for step in snapshot.steps]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == len({step.number for step, _, _ in onlooker.seen if step.parts})
    phases = {state.phase for _, snapshot, _ in onlooker.seen for state in snapshot.sequences}
    assert {
        admin_pb2.SEQUENCE_PHASE_WAITING,
        admin_pb2.SEQUENCE_PHASE_PREFILL,
        admin_pb2.SEQUENCE_PHASE_DECODE,
    } <= phases


async def test_a_cache_reset_shows_while_requests_run():
    async with recorded() as (bench, recorder):
        await finish(bench, await ask(bench, "first", prompt(0, 16), max_tokens=2))
        assert recorder.snapshot(None)[0].cached_block_ids
        bench.executor.gate.clear()
        second = await in_a_step(bench, "second", prompt(100, 16), max_tokens=9)
        reset = asyncio.create_task(bench.engine.reset_cache())
        await until(lambda: bench.engine._resets)
        bench.executor.gate.set()
        assert await reset
        await finish(bench, second)
        await until(lambda: len(recorder.snapshot(None)[0].cached_block_ids) == bench.pool.num_cached)


async def test_preempted_and_ended_sequences_are_listed():
    onlooker = Onlooker(FlightRecorder())
    async with recorded(onlooker=onlooker, num_blocks=8) as (bench, recorder):
        old = await in_a_step(bench, "old", prompt(0, 12), max_tokens=14)
        young = await ask(bench, "young", prompt(100, 12), max_tokens=14)
        await finish(bench, old, young)
        states = [state for _, snapshot, _ in onlooker.seen for state in snapshot.sequences]
        assert ("young", admin_pb2.SEQUENCE_PHASE_PREEMPTED) in {(state.request_id, state.phase) for state in states}
        last = {state.request_id: state for state in recorder.snapshot(None)[0].sequences}
    assert {(label, state.phase) for label, state in last.items()} == {
        ("old", admin_pb2.SEQUENCE_PHASE_ENDED),
        ("young", admin_pb2.SEQUENCE_PHASE_ENDED),
    }
    assert last["young"].completion_tokens == 14


async def test_guesses_show_in_sequences_and_steps(monkeypatch):
    # So that the recorder has lost the first guesses, which it counts all the same.
    monkeypatch.setattr(flight_recorder, "MAX_STEPS", 1)
    onlooker = Onlooker(FlightRecorder())
    async with recorded(onlooker=onlooker) as (bench, recorder):
        bench.executor._draft = two_right_drafts
        await finish(bench, await in_a_step(bench, "guessed", prompt(0, 9), n=2, max_tokens=6))
        ended = recorder.snapshot(None)[0].sequences
    assert [(s.index, s.draft_tokens, s.accepted_draft_tokens) for s in ended] == [(1, 4, 3)]
    first = [s for _, snapshot, _ in onlooker.seen for s in snapshot.sequences if s.index == 0 and s.block_ids]
    counts = [(s.computed_tokens, s.completion_tokens, s.draft_tokens, s.accepted_draft_tokens) for s in first]
    assert counts == [(9, 1, 0, 0), (12, 4, 3, 2)]
    parts = [part for _, snapshot, _ in onlooker.seen for step in snapshot.steps for part in step.parts]
    assert [(p.start, p.tokens, p.sampled, p.draft_tokens, p.accepted_draft_tokens) for p in parts if p.index == 0] == [
        (0, 9, True, 0, 0),
        (9, 1, True, 3, 2),
        (12, 1, True, 1, 1),
    ]


async def test_a_guess_may_be_the_last_token():
    eos = expected_completion(prompt(0, 9), 7, 2, VOCAB)[1]
    async with recorded(eos=[eos]) as (bench, recorder):
        bench.executor._draft = two_right_drafts
        await finish(bench, await in_a_step(bench, "guessed", prompt(0, 9), max_tokens=6))
        [sequence] = recorder.snapshot(None)[0].sequences
    assert (sequence.computed_tokens, sequence.completion_tokens) == (10, 2)
    assert (sequence.draft_tokens, sequence.accepted_draft_tokens) == (3, 1)


async def test_a_reader_who_skips_many_steps_is_told_how_many():
    async with recorded() as (bench, recorder):
        await finish(bench, await ask(bench, "one", prompt(0, 9), max_tokens=2))
        _, position = recorder.snapshot(None)
        for i in range(5):
            await finish(bench, await ask(bench, "more", prompt(i, 9), max_tokens=100))
        snapshot, later = recorder.snapshot(position)
    assert len(snapshot.steps) == flight_recorder.MAX_STEPS_A_SNAPSHOT
    assert snapshot.lost_steps == later - position - len(snapshot.steps) > 0
    assert not recorder.snapshot(later)[0].steps


async def test_what_is_kept_is_bounded():
    """Three thousand requests, many of them abandoned, leave no more behind than the rings hold."""
    async with recorded(max_waiting=10_000) as (bench, recorder):
        for batch in range(3):
            bench.executor.gate.clear()
            num_steps = bench.executor.num_begun
            tasks = [asyncio.create_task(bench.collect(prompt(i, 5), max_tokens=1 + i % 3)) for i in range(1000)]
            await until(lambda: bench.executor.num_begun > num_steps)  # noqa: B023 (awaited at once)
            if batch % 2:
                for task in tasks[::2]:
                    task.cancel()
            bench.executor.gate.set()
            await asyncio.wait(tasks)
            await bench.until_free()
            assert len(recorder._ended) <= flight_recorder.MAX_REQUESTS
            assert len(recorder._steps) <= flight_recorder.MAX_STEPS
        assert len(recorder._ended) == flight_recorder.MAX_REQUESTS
        assert len(recorder._steps) == flight_recorder.MAX_STEPS
        recorder.snapshot(None)
        assert recorder._drafts.keys() == recorder._ended.keys()
        assert not recorder._live
        assert not recorder._absent
        assert not recorder._last_parts
        assert not recorder._kv.tables


async def test_nothing_of_what_was_asked_or_answered_is_kept():
    recorder = FlightRecorder()
    recorder.wants_content = True
    async with running(observers=Observers(recorder)) as bench:
        await bench.collect("a secret question", request={"label": "mine"}, stop=["hidden"], logit_bias={5: 1.0})
        await bench.until_free()
    [(request, _)] = recorder._ended.values()
    assert (request.label, request.num_prompt_tokens, request.prompt, request.texts) == ("mine", 17, None, None)
    assert request.params == SamplingParams(max_tokens=6)


async def test_the_status_of_the_call_is_told_although_it_comes_last():
    recorder = FlightRecorder()
    request = RequestRecord("mine", 1.0, number=1, id="1", started_s=1.5, params=SamplingParams(logit_bias={5: 1.0}))
    recorder.request_arrived(lambda: request)
    assert not explained(recorder, "mine").ended
    request = replace(request, end_s=2.0)
    recorder.request_ended(request)
    assert explained(recorder, "mine").ended
    method = "nanoserve.v1.GenerationService/Generate"
    recorder.call_ended(CallRecord(method, "mine", 1.0, request=request, code="DEADLINE_EXCEEDED"))
    assert explained(recorder, "mine").summary.endswith("Its deadline passed before it was done.")
    [(kept, _)] = recorder._ended.values()
    assert not kept.params.logit_bias


def record(number, *, wait=None, preemptions=()):
    return StepRecord(number, float(number), number + 1.0, [], list(preemptions), [], [], wait, 1, 1, 4, 0, 4, 2, False)


def test_waits_of_two_kinds_are_two_entries():
    recorder = FlightRecorder()
    request = RequestRecord("mine", 1.0, number=7, id="7", num_prompt_tokens=5)
    recorder.request_arrived(lambda: request)
    for number, reason in enumerate([WaitReason.ROWS, WaitReason.ROWS, WaitReason.BLOCKS, WaitReason.ROWS], start=1):
        recorder.step_ended(record(number, wait=Wait("7", 0, reason, "")))
    request = replace(request, started_s=5.0)
    timeline = explained(recorder, "mine")
    entries = entries_of(recorder, "mine")
    waits = [(event_of(e.told), e.start_s, e.end_s) for e in entries if isinstance(event_of(e.told), TimelineWait)]
    found = [(wait.reason, start_s, end_s) for wait, start_s, end_s in waits]
    assert found == [(ROWS, 1.0, 3.0), (BLOCKS, 3.0, 4.0), (ROWS, 4.0, 5.0)]
    assert timeline.summary == "Waited 3.00 s for one of the running sequences to end. Waited 1.00 s for KV blocks."


def test_the_wait_of_those_before_is_told_with_each_share():
    recorder = FlightRecorder()
    request = RequestRecord("mine", 1.0, number=7, id="7", num_prompt_tokens=5)
    recorder.request_arrived(lambda: request)
    for number, (head, reason) in enumerate(
        [("5", WaitReason.ROWS), ("5", WaitReason.BLOCKS), ("6", WaitReason.BLOCKS)], 1
    ):
        recorder.step_ended(record(number, wait=Wait(head, 0, reason, "")))
    request = replace(request, started_s=4.0)
    [entry] = explained(recorder, "mine").entries
    expected = "waited 3.00 s after 2 requests, which waited 2.00 s for KV blocks and 1.00 s for one of the running"
    assert entry.text == f"{expected} sequences to end"
    assert (event_of(entry).reason, event_of(entry).requests_before) == (BLOCKS, 2)


def test_one_that_ends_while_it_is_preempted_is_forgotten():
    recorder = FlightRecorder()
    request = RequestRecord("mine", 0.5, number=7, id="7", started_s=0.6)
    recorder.request_arrived(lambda: request)
    recorder.step_ended(record(1, preemptions=[Preemption("7", 0, "8")]))
    assert recorder._absent
    recorder.request_ended(replace(request, end_s=5.0))
    assert not recorder._absent
    assert "was preempted for a request that is forgotten by now; has not run again for 4.00 s" in text_of(
        explained(recorder, "mine")
    )
