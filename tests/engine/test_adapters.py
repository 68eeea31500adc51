"""Adapters in the scheduler: who waits for which, what becomes of a name's old content, and what is never mixed."""

import pytest
from adapter_bench import AdapterBench

from nanoserve.engine.residency import MAX_PASSED_S
from nanoserve.errors import AdapterInUse, AdapterInvalid, AdapterMemoryFull, AdapterNotFound, InvalidRequest
from nanoserve.request import Failure, RequestFailed
from nanoserve.step_record import AdapterUse, StepRecord, WaitReason

PROMPT = range(9)


def failure(bench, request_id):
    [reason] = [e.reason for e in bench.events if isinstance(e, RequestFailed) and e.request_id == request_id]
    return reason


def test_rows_of_several_adapters_and_of_none_share_a_step():
    bench = AdapterBench(num_slots=2)
    for name in ("a", "b", ""):
        bench.add(f"of {name}", PROMPT, name)
    bench.step()
    bench.step()
    assert len(bench.step().sequences) == 3
    bench.run()
    for name in ("a", "b", ""):
        bench.expect(f"of {name}", PROMPT, 5)
    assert len({tuple(bench.completion(f"of {name}")) for name in ("a", "b", "")}) == 3


def test_others_pass_while_an_adapter_is_read():
    bench = AdapterBench(is_automatic=False)
    bench.add("a", PROMPT, "a")
    bench.add("base", PROMPT)
    bench.add("also a", PROMPT, "a")
    plan = bench.step()
    assert len(plan.sequences) == 1
    assert bench.outputs("base")
    assert bench.records()[-1].wait.reason is WaitReason.ADAPTER
    assert bench.records()[-1].wait.request_id == "a"
    assert bench.scheduler.stats().num_waiting == 2
    bench.is_automatic = True
    bench.run()
    assert bench.started("a").time_s <= bench.started("also a").time_s
    assert bench.disk.reads == ["a"]


def test_a_prefix_is_never_shared_between_contents_but_within_one():
    bench = AdapterBench(num_slots=4)
    bench.disk.revisions["copy"] = "a1"
    for i, name in enumerate(["a", "b", "", "a", "copy"]):
        bench.add(f"{i}", PROMPT, name)
        bench.run()
    assert [bench.started(f"{i}").num_cached_tokens for i in range(5)] == [0, 0, 0, 8, 8]


def test_hashes_that_were_made_for_another_revision_are_made_anew():
    bench = AdapterBench()
    old = bench.add("old", PROMPT, "a", guess="a1")
    bench.scheduler.block_names.extend(old.block_hashes, old, old.prompt_token_ids, 2)
    bench.run()
    bench.disk.revisions["a"] = "a2"
    bench.load("a", may_replace=True)
    bench.store.do_all()
    bench.step()
    request = bench.add("new", PROMPT, "a", guess="a1")
    assert bench.scheduler._requests["new"][0].block_hashes == []
    assert request.adapter.revision == "a1"
    bench.run()
    assert bench.started("new").num_cached_tokens == 0
    bench.expect("new", PROMPT, 5)


def test_the_least_recently_used_adapter_makes_place():
    bench = AdapterBench(num_slots=2)
    for i, name in enumerate("abac"):
        bench.add(f"{i}", PROMPT, name)
        bench.run()
    assert bench.residency() == {"a1": "active", "b1": "host", "c1": "active"}
    assert bench.adapters.counts().num_evictions == 1


def test_a_pinned_adapter_takes_a_slot_and_keeps_it():
    bench = AdapterBench(num_slots=2)
    number = bench.load("a", is_pinned=True)
    bench.run()
    assert bench.answer(number).is_pinned
    for i, name in enumerate("bcb"):
        bench.add(f"{i}", PROMPT, name)
        bench.run()
    assert bench.residency() == {"a1": "active", "b1": "active", "c1": "host"}
    assert bench.slots.num_writes == 4, "of a once, and of each of the others as its turn came"
    [violation] = bench.settled(bench.load("c", is_pinned=True)).violations
    assert violation.field == "pinned"
    assert not bench.settled(bench.load("a")).is_pinned
    assert bench.settled(bench.load("c", is_pinned=True)).is_pinned


def test_a_pin_leaves_a_slot_also_beside_one_that_may_be_served_again():
    bench = AdapterBench(num_slots=2)
    bench.load("a", is_pinned=True)
    bench.add("long", PROMPT, "a", max_tokens=50)
    for _ in range(5):
        bench.step()
    bench.unload("a", drain_timeout_s=10)
    assert isinstance(bench.settled(bench.load("b", is_pinned=True)), InvalidRequest)


def test_a_slot_with_sequences_that_keep_coming_becomes_free_in_the_end():
    bench = AdapterBench(num_slots=1, num_blocks=256)
    bench.add("first", PROMPT, "a", max_tokens=6)
    for _ in range(4):
        bench.step()
    bench.add("other", PROMPT, "b")
    for i in range(12):
        bench.add(f"a{i}", range(i, i + 3), "a", max_tokens=6)
        bench.step()
    assert bench.outputs("other")
    passed = [
        i for i in range(12) if bench.outputs(f"a{i}") and bench.started(f"a{i}").time_s < bench.started("other").time_s
    ]
    assert passed == [0, 1][: len(passed)], "after the bound nobody passes any more"
    bench.run()
    bench.expect("other", PROMPT, 5)
    assert MAX_PASSED_S < 1, "steps of this bench last a second"


def test_a_higher_priority_goes_before_one_that_was_passed():
    bench = AdapterBench(num_slots=1)
    bench.add("runs", PROMPT, "a", max_tokens=20)
    for _ in range(4):
        bench.step()
    bench.add("passed", PROMPT, "b")
    for _ in range(4):
        bench.step()
    bench.add("urgent", PROMPT, "a", priority=1)
    bench.run()
    assert bench.started("urgent").time_s < bench.started("passed").time_s


def test_who_leaves_the_queue_opens_the_slot_again():
    bench = AdapterBench(num_slots=1)
    bench.add("runs", PROMPT, "a", max_tokens=60)
    for _ in range(4):
        bench.step()
    bench.add("passed", PROMPT, "b")
    for _ in range(3):
        bench.step()
    bench.add("late", PROMPT, "a")
    bench.step()
    assert not bench.outputs("late")
    bench.scheduler.abort("passed")
    bench.step()
    bench.step()
    assert bench.outputs("late")


def test_a_slot_is_not_written_before_the_steps_in_flight_are_over():
    bench = AdapterBench(num_slots=1, depth=2)
    bench.add("a", PROMPT, "a", max_tokens=30)
    for _ in range(4):
        bench.step()
    plan = bench.scheduler.schedule(bench.now)
    bench.executor.submit(plan)
    bench.scheduler.abort("a")
    bench.add("b", PROMPT, "b")
    bench.scheduler.keep_time(bench.now)
    bench.store.do_all()
    bench.scheduler.keep_time(bench.now)
    assert not bench.store.jobs
    bench.run()
    bench.expect("b", PROMPT, 5)


def test_a_preempted_sequence_goes_on_with_its_adapter():
    bench = AdapterBench(num_slots=1, num_blocks=12)
    bench.add("a", PROMPT, "a", max_tokens=10)
    for _ in range(5):
        bench.step()
    bench.add("b", PROMPT, "b", priority=1)
    [sequence] = bench.scheduler._running()
    bench.scheduler._preempt(sequence, sequence, {})
    bench.run()
    assert bench.slots.num_writes == 3
    bench.expect("a", PROMPT, 10)
    bench.expect("b", PROMPT, 5)


# ----------------------------------------------------------------------------------------------------- contents


def test_a_stream_ends_with_the_weights_it_began_with_and_new_ones_get_the_new():
    bench = AdapterBench(num_slots=2)
    bench.add("old", PROMPT, "a", max_tokens=20, n=2)
    for _ in range(5):
        bench.step()
    bench.disk.revisions["a"] = "a2"
    assert bench.settled(bench.load("a", may_replace=True)).adapter.revision == "a2"
    bench.add("new", PROMPT, "a")
    bench.step()
    assert {s.info.adapter.revision: s.num_running for s in bench.list().adapters}["a1"] == 2
    bench.run()
    assert (bench.revision("old"), bench.revision("new")) == ("a1", "a2")
    bench.expect("old", PROMPT, 20, index=1)
    bench.expect("new", PROMPT, 5)
    assert bench.residency() == {"a2": "active"}
    assert bench.store.num_bytes == 1


def test_who_has_not_started_gets_the_new_weights():
    bench = AdapterBench(num_slots=1)
    bench.add("blocks", PROMPT, "b", max_tokens=20)
    for _ in range(4):
        bench.step()
    bench.add("waits", PROMPT, "a")
    bench.step()
    bench.disk.revisions["a"] = "a2"
    bench.settled(bench.load("a", may_replace=True))
    bench.run()
    assert bench.revision("waits") == "a2"
    bench.expect("waits", PROMPT, 5)


def test_the_old_weights_may_come_back_while_streams_still_have_them():
    bench = AdapterBench(num_slots=2)
    bench.disk.revisions["b"] = "a1"
    bench.add("old", PROMPT, "a", max_tokens=40)
    for _ in range(5):
        bench.step()
    bench.disk.revisions["a"] = "a2"
    bench.settled(bench.load("a", may_replace=True))
    assert bench.settled(bench.load("a", "b", may_replace=True)).adapter.revision == "a1"
    bench.add("again", PROMPT, "a")
    bench.run()
    assert bench.revision("again") == "a1"
    assert bench.residency() == {"a1": "active"}


def test_the_old_weights_are_kept_in_main_memory_for_whom_they_are_all_there_is():
    bench = AdapterBench(num_slots=1, memory=2)
    bench.add("old", PROMPT, "a", max_tokens=30)
    for _ in range(5):
        bench.step()
    bench.disk.revisions["a"] = "a2"
    bench.settled(bench.load("a", may_replace=True))
    [sequence] = bench.scheduler._running()
    bench.scheduler._preempt(sequence, sequence, {})
    for name in "bcd":
        bench.add(name, PROMPT, name, priority=1)
    bench.run()
    bench.expect("old", PROMPT, 30)
    assert bench.revision("old") == "a1"


def test_two_loads_of_one_name_are_done_in_their_order():
    bench = AdapterBench()
    numbers = [bench.load("x", "a"), bench.load("x", "b"), bench.load("x", "a"), bench.load("x", "b", may_replace=True)]
    unloaded = bench.unload("x")
    bench.store.do_all()
    bench.step()
    first, refused, same, replaced = map(bench.answer, numbers)
    assert first.adapter.revision == same.adapter.revision == "a1"
    assert isinstance(refused, AdapterInUse)
    assert "replace" in str(refused)
    assert replaced.adapter.revision == "b1"
    assert bench.answer(unloaded) is None
    assert bench.served() == []


@pytest.mark.parametrize("wrong", [AdapterInvalid("a", ["rank"]), AdapterNotFound("a"), RuntimeError("disk")])
def test_a_load_that_fails_leaves_what_was(wrong):
    bench = AdapterBench()
    bench.load("a")
    bench.run()
    bench.disk.revisions["a"] = wrong
    answer = bench.settled(bench.load("a", may_replace=True))
    assert type(answer).__name__ == ("EngineFailure" if isinstance(wrong, RuntimeError) else type(wrong).__name__)
    bench.add("a", PROMPT, "a")
    bench.run()
    bench.expect("a", PROMPT, 5)


def test_weights_for_which_there_is_no_room_are_refused_and_leave_what_was():
    bench = AdapterBench(memory=2)
    bench.disk.sizes["b1"] = 3
    bench.load("a")
    bench.run()
    refused = bench.settled(bench.load("b"))
    assert isinstance(refused, AdapterMemoryFull)
    assert refused.facts == {"adapter": "b", "bytes": 3, "max_bytes": 2}
    assert bench.residency() == {"a1": "host"}
    bench.add("b", PROMPT, "b")
    bench.run()
    assert isinstance(failure(bench, "b"), AdapterMemoryFull)


def test_little_memory_sends_adapters_back_to_the_disk_and_no_request_is_lost():
    bench = AdapterBench(memory=1, num_slots=2)
    for i, name in enumerate("abcab"):
        bench.add(f"{i}", PROMPT, name)
    bench.run()
    for i in range(5):
        bench.expect(f"{i}", PROMPT, 5)
    assert bench.store.num_bytes == 1
    assert set(bench.residency().values()) == {"disk", "active"}


def test_a_folder_that_changed_is_a_new_revision_when_it_is_read_again():
    bench = AdapterBench(memory=1, num_slots=1)
    for name in "ab":
        bench.add(name, PROMPT, name)
        bench.run()
    bench.disk.revisions["a"] = "a2"
    bench.add("changed", PROMPT, "a")
    bench.run()
    assert bench.revision("changed") == "a2"
    assert bench.started("changed").num_cached_tokens == 0
    bench.expect("changed", PROMPT, 5)
    assert "a2" in bench.served()
    assert "a1" not in bench.residency()


def test_who_began_with_weights_that_are_gone_is_told():
    bench = AdapterBench(memory=1, num_slots=1)
    bench.add("began", PROMPT, "a", max_tokens=30)
    for _ in range(5):
        bench.step()
    [sequence] = bench.scheduler._running()
    bench.scheduler._preempt(sequence, sequence, {})
    bench.add("b", PROMPT, "b", priority=1)
    bench.add("waits", PROMPT, "a")
    bench.disk.revisions["a"] = "a2"
    bench.run()
    assert isinstance(failure(bench, "began"), AdapterInvalid)
    assert "changed" in str(failure(bench, "began"))
    assert bench.revision("waits") == "a2"


@pytest.mark.parametrize("wrong", [AdapterInvalid("a", ["rank"]), None, RuntimeError("disk")])
def test_an_adapter_that_cannot_be_read_fails_its_requests_and_the_next_one_may_try(wrong):
    bench = AdapterBench()
    bench.disk.revisions["a"] = wrong
    bench.add("a", PROMPT, "a", n=2)
    bench.add("base", PROMPT)
    bench.run()
    expected = {AdapterInvalid: AdapterInvalid, type(None): AdapterNotFound}.get(type(wrong))
    reason = failure(bench, "a")
    assert reason is Failure.STEP if expected is None else isinstance(reason, expected)
    bench.expect("base", PROMPT, 5)
    bench.disk.revisions["a"] = "a1"
    bench.add("later", PROMPT, "a")
    bench.run()
    bench.expect("later", PROMPT, 5)


def test_a_slot_that_cannot_be_written_fails_its_requests_alone():
    bench = AdapterBench()

    def full(_slot):
        raise MemoryError("device")

    bench.slots.check = full
    bench.add("a", PROMPT, "a")
    bench.add("base", PROMPT)
    bench.run()
    assert failure(bench, "a") is Failure.STEP
    bench.expect("base", PROMPT, 5)
    bench.slots.check = bench.check_write
    bench.add("later", PROMPT, "a")
    bench.run()
    bench.expect("later", PROMPT, 5)


# ------------------------------------------------------------------------------------------------------- unload


def test_unload_refuses_new_requests_and_waits_for_those_that_run():
    bench = AdapterBench()
    bench.add("runs", PROMPT, "a", max_tokens=10, n=3)
    for _ in range(5):
        bench.step()
    number = bench.unload("a")
    bench.add("late", PROMPT, "a")
    bench.step()
    assert isinstance(failure(bench, "late"), AdapterNotFound)
    assert isinstance(bench.settled(bench.load("a")), AdapterInUse)
    assert isinstance(bench.settled(bench.unload("a")), AdapterNotFound)
    assert not bench.answers(number)
    bench.run()
    assert bench.answer(number) is None
    bench.expect("runs", PROMPT, 10, index=2)
    assert bench.store.num_bytes == 0
    assert bench.list().adapters == ()
    bench.add("withdrawn", PROMPT, "a")
    bench.step()
    assert isinstance(failure(bench, "withdrawn"), AdapterNotFound)
    bench.settled(bench.load("a"))
    bench.add("back", PROMPT, "a")
    bench.run()
    bench.expect("back", PROMPT, 5)


def test_an_adapter_that_is_in_use_for_too_long_is_served_again():
    bench = AdapterBench()
    bench.add("runs", PROMPT, "a", max_tokens=60)
    for _ in range(5):
        bench.step()
    number = bench.unload("a", drain_timeout_s=3)
    for _ in range(3):
        bench.step()
        assert not bench.answers(number)
    bench.step()
    assert isinstance(bench.answer(number), AdapterInUse)
    assert bench.served() == ["a1"]
    bench.add("next", PROMPT, "a")
    bench.run()
    bench.expect("next", PROMPT, 5)


@pytest.mark.parametrize("end", ["abort", "deadline", "failed step"])
def test_however_requests_end_they_let_go_of_their_adapter(end):
    bench = AdapterBench(num_slots=1)
    deadline_s = 6 if end == "deadline" else None
    bench.add("a", PROMPT, "a", n=3, max_tokens=60, deadline_s=deadline_s)
    bench.add("waits", PROMPT, "b", deadline_s=deadline_s)
    for _ in range(5):
        bench.step()
    assert set(bench.adapters.counts().uses) == {AdapterUse("a", 3, 0), AdapterUse("b", 0, 1)}
    if end == "abort":
        bench.scheduler.abort("a")
        bench.scheduler.abort("waits")
    if end == "failed step":
        bench.fail_step()
        bench.scheduler.abort("waits")
    number = bench.unload("a")
    bench.run()
    assert bench.answer(number) is None
    assert not bench.adapters.counts().uses


def test_memory_is_flat_over_a_thousand_loads_and_unloads_under_traffic():
    bench = AdapterBench(memory=4, num_slots=2)
    for i in range(1000):
        bench.disk.revisions["x"] = f"x{i}"
        if not i % 10:
            bench.add(f"{i}", range(3), "x" if bench.adapters.served.adapters else "a", max_tokens=3)
        bench.load("x", may_replace=True)
        bench.step()
        number = bench.unload("x", drain_timeout_s=100)
        while not bench.answers(number):
            bench.step()
        bench.events.clear() if i % 10 else None
    bench.run()
    assert bench.store.num_bytes <= 1
    assert len(bench.adapters._served) <= 1
    assert not bench.adapters._retired
    assert not bench.adapters._num_loading


def test_names_that_may_not_be_are_refused():
    bench = AdapterBench()
    for name in ("model", "", "a\nb", "../x", "x" * 129, "a//b", ".hidden", "ä"):
        [violation] = bench.settled(bench.load(name)).violations
        assert violation.field == "name"
        assert len(violation.description) < 400
    assert bench.disk.reads == []


def test_whoever_watches_is_told_who_uses_adapters():
    bench = AdapterBench(num_slots=1)
    bench.add("a", PROMPT, "a", n=2)
    bench.add("b", PROMPT, "b")
    for _ in range(4):
        bench.step()
    record = [event for event in bench.events if isinstance(event, StepRecord)][-1]
    assert set(record.adapters.uses) == {AdapterUse("a", 2, 0), AdapterUse("b", 0, 1)}
    assert record.adapters.num_loads == 2
    assert record.wait.reason is WaitReason.ADAPTER
    assert record.wait.behind_request_id == "a"
