"""What the scheduler tells those who watch: records agree with the blocks, rows and tokens that they speak of."""

import pickle

import pytest
from fake_executor import expected_completion, random_drafts, right_drafts
from scheduler_bench import Bench, WatchedBench

from nanoserve.step_record import Preemption, StepRecord, WaitReason


def test_nobody_watches_by_default():
    bench = Bench()
    bench.add("a", range(10))
    bench.run()
    assert not [event for event in bench.events if isinstance(event, StepRecord)]


def test_a_record_ends_the_events_of_each_step():
    bench = WatchedBench()
    bench.add("a", range(10), max_tokens=3)
    bench.run()
    assert isinstance(bench.events[-1], StepRecord)
    records = bench.records()
    assert [record.number for record in records] == [1, 2, 3]
    assert [(r.num_prompt_tokens, r.num_completion_tokens) for r in records] == [(10, 0), (0, 1), (0, 1)]
    assert [r.start_s for r in records] == [0.0, 1.0, 2.0]
    assert [len(r.late_releases) for r in records] == [0, 0, 1]


def test_a_record_travels_between_processes():
    bench = WatchedBench(max_num_seqs=2)
    for name in ("a", "b", "c"):
        bench.add(name, range(10), max_tokens=2)
    bench.run()
    idle = bench.scheduler.settle(9.0)
    for record in [*bench.records(), *idle]:
        assert pickle.loads(pickle.dumps(record)) == record


def test_a_long_prompt_comes_in_parts():
    bench = WatchedBench(budget=8, max_num_seqs=4)
    bench.add("a", range(20), max_tokens=1)
    bench.run()
    parts = [part for record in bench.records() for part in record.parts]
    assert [(p.start, p.num_tokens, p.num_new_tokens) for p in parts] == [(0, 8, 0), (8, 8, 0), (16, 4, 1)]


def guesses(bench):
    """(known tokens, new ones, guessed, right) of each part."""
    parts = [part for record in bench.records() for part in record.parts]
    return [(p.num_tokens, p.num_new_tokens, p.num_drafted, p.num_accepted) for p in parts]


def test_guesses_are_told_beside_the_known_tokens():
    bench = WatchedBench(draft=lambda token_ids, seed: [*right_drafts(token_ids, seed, 2), 1000])
    bench.add("a", range(10), max_tokens=6)
    bench.run()
    assert guesses(bench) == [(10, 1, 0, 0), (1, 3, 3, 2), (1, 2, 1, 1)]
    assert [record.num_completion_tokens for record in bench.records()] == [0, 1, 1]


def test_guesses_behind_a_stop_token_are_not_told_as_right():
    bench = WatchedBench(draft=right_drafts)
    stop = expected_completion(range(10), 7, 3, 1000)[2]
    bench.add("a", range(10), max_tokens=20, stop_token_ids=frozenset({stop}))
    bench.run()
    assert guesses(bench) == [(10, 1, 0, 0), (1, 2, 4, 2)]


def test_one_that_is_aborted_while_its_step_runs_gets_nothing():
    bench = WatchedBench()
    bench.add("a", range(10))
    bench.executor.submit(bench.scheduler.schedule(0.0))
    bench.scheduler.abort("a")
    bench.events = bench.scheduler.commit(bench.executor.collect(), 1.0)
    bench.take(bench.records()[-1])
    assert guesses(bench) == [(10, 0, 0, 0)]


def test_blocks_from_the_cache_are_told():
    bench = WatchedBench()
    bench.add("a", range(13), max_tokens=1)
    bench.run()
    bench.add("b", range(13), max_tokens=1)
    bench.run()
    [part] = bench.records()[-1].parts
    assert (part.num_cached_blocks, part.start, part.num_tokens) == (3, 12, 1)
    assert len(part.new_block_ids) == 4


@pytest.mark.parametrize(
    ("options", "reason", "behind"),
    [
        ({"max_num_seqs": 2}, WaitReason.ROWS, "a"),
        ({"num_blocks": 10}, WaitReason.BLOCKS, "b"),
        ({"budget": 28}, WaitReason.TOKENS, "b"),
        ({"batching": "static"}, WaitReason.BATCH, "a"),
    ],
)
def test_the_head_of_the_queue_waits_for_a_reason(options, reason, behind):
    bench = WatchedBench(**options)
    bench.add("a", range(8))
    bench.add("b", range(100, 120))
    if reason is WaitReason.BATCH:
        bench.step()
    bench.add("c", range(200, 216))
    bench.add("d", range(300, 303))
    bench.step()
    wait = bench.records()[-1].wait
    assert (wait.request_id, wait.reason, wait.behind_request_id) == ("c", reason, behind)
    bench.run()
    assert bench.records()[-1].wait is None


def test_who_waits_for_a_prefix_says_so():
    bench = WatchedBench()
    bench.add("a", range(20))
    bench.add("b", range(20))
    bench.add("c", range(100, 103))
    bench.step()
    [record] = bench.records()
    assert [part.request_id for part in record.parts] == ["c", "a"]
    assert (record.wait.request_id, record.wait.reason, record.wait.behind_request_id) == ("b", WaitReason.PREFIX, "a")


def test_a_preemption_names_both():
    bench = WatchedBench(num_blocks=6)
    bench.add("old", range(8), max_tokens=12)
    bench.add("young", range(100, 108), max_tokens=12)
    bench.run()
    preemptions = [p for record in bench.records() for p in record.preemptions]
    assert preemptions[0] == Preemption("young", 0, "old")


def test_aborts_between_steps_are_told_by_the_next_record():
    bench = WatchedBench()
    bench.add("a", range(10))
    bench.add("b", range(100, 110))
    bench.step()
    bench.scheduler.abort("a")
    bench.step()
    assert [r.request_id for r in bench.records()[-1].early_releases] == ["a"]


def test_aborts_that_no_step_follows_are_told_all_the_same():
    bench = WatchedBench()
    bench.add("a", range(10))
    bench.step()
    bench.scheduler.abort("a")
    [record] = bench.scheduler.settle(5.0)
    bench.take(record)
    assert (record.number, record.parts, record.num_owned_blocks) == (1, [], 0)


def test_a_failed_step_is_told():
    bench = WatchedBench()
    bench.add("a", range(10))
    record = bench.fail_step()[-1]
    assert record.has_failed
    assert [r.request_id for r in record.late_releases] == ["a"]


@pytest.mark.parametrize("draft", [None, random_drafts])
@pytest.mark.parametrize("num_blocks", [10, 14, 40])
def test_an_observer_can_keep_the_map_of_all_blocks(num_blocks, draft):
    bench = WatchedBench(num_blocks=num_blocks, max_num_seqs=5, budget=9, draft=draft)
    for i in range(12):
        bench.add(f"{i}", range(i % 3, i % 3 + 9 + i), max_tokens=9, n=1 + i % 3)
    bench.run()
    assert not bench.tables
    if num_blocks == 10:
        assert any(record.preemptions for record in bench.records())
