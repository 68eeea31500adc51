"""The scheduler over simulated KV memory: every completion must be the one that an undisturbed run gives."""

import hypothesis.strategies as st
import pytest
from fake_executor import (
    endless_drafts,
    expected_completion,
    num_tokens,
    random_drafts,
    right_drafts,
    wrong_drafts,
)
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_bench import Bench, WatchedBench

from nanoserve.request import (
    Failure,
    FinishReason,
    RequestFailed,
    RequestStarted,
    SequenceOutput,
    SequenceResult,
    StepResult,
)


def prompt_of(length, start=0):
    return list(range(start, start + length))


def test_a_prompt_is_computed_once_and_then_one_token_a_step():
    bench = Bench()
    bench.add("a", prompt_of(10), max_tokens=3)
    bench.run()
    assert [num_tokens(plan) for plan in bench.executor.plans] == [10, 1, 1]
    bench.expect("a", prompt_of(10), 3)
    assert bench.finish_reason("a") is FinishReason.LENGTH
    assert bench.pool.num_owned == 0


def test_long_prompt_is_chunked_and_never_stalls_a_running_sequence():
    bench = Bench(budget=8)
    bench.add("a", prompt_of(4), max_tokens=10)
    bench.step()
    bench.add("long", prompt_of(50, 100), max_tokens=1)
    for _ in range(5):
        plan = bench.step()
        assert [s.num_known for s in plan.sequences] == [1, 7]
    bench.run()
    bench.expect("a", prompt_of(4), 10)
    bench.expect("long", prompt_of(50, 100), 1)


def test_sequences_of_all_kinds_share_one_step():
    bench = Bench(budget=16)
    bench.add("a", prompt_of(3))
    bench.step()
    bench.add("b", prompt_of(5, 50))
    bench.add("c", prompt_of(30, 90))
    plan = bench.step()
    assert [s.num_known for s in plan.sequences] == [1, 5, 10]


def test_a_second_request_reads_the_prefix_of_the_first():
    bench = Bench()
    bench.add("a", prompt_of(13))
    bench.run()
    bench.add("b", [*prompt_of(9), 77, 78])
    bench.run()
    assert bench.started("a").num_cached_tokens == 0
    assert bench.started("b").num_cached_tokens == 8
    bench.expect("b", [*prompt_of(9), 77, 78], 5)


def test_a_prompt_that_a_step_computes_is_not_computed_twice():
    bench = Bench(budget=32)
    bench.add("a", range(20))
    bench.add("b", range(20))
    bench.add("c", [*range(16), 90, 91])
    bench.add("d", range(100, 104))
    first, second = bench.step(), bench.step()
    assert [(s.start, s.num_known) for s in first.sequences] == [(0, 4), (0, 20)]
    assert sorted((s.start, s.num_known) for s in second.sequences if s.admission) == [(16, 2), (16, 4)]
    bench.run()
    assert bench.completion("a") == bench.completion("b")


def test_a_long_prompt_that_others_share_does_not_hold_up_who_does_not():
    bench = Bench(budget=16, num_blocks=128)
    bench.add("a", range(60))
    bench.add("b", range(60))
    bench.step()
    bench.add("c", range(100, 104))
    rows = [num_tokens(bench.step()) for _ in range(3)]
    assert rows == [16, 16, 16]
    assert bench.outputs("a")
    assert bench.outputs("c")
    last = bench.step()
    assert [(s.start, s.num_known) for s in last.sequences if s.admission] == [(56, 4)]
    bench.run()


@pytest.mark.parametrize("options", [{"skip_cache_read": True}, {"cache_salt": "own"}, {"prompt_logprobs": 0}])
def test_who_may_not_read_the_cache_does_not_wait_for_it(options):
    bench = Bench()
    bench.add("a", range(12))
    bench.add("b", range(12), **options)
    assert len(bench.step().sequences) == 2


@pytest.mark.parametrize("options", [{"max_num_seqs": 2}, {"num_blocks": 12}])
def test_who_waits_for_a_prefix_keeps_its_place(options):
    bench = Bench(**options)
    bench.add("a", range(20))
    bench.add("b", range(20))
    bench.add("c", range(100, 112), max_tokens=20)
    assert len(bench.step().sequences) == 1
    bench.step()
    bench.step()
    assert bench.outputs("b")
    bench.run()


def test_a_static_batch_takes_equal_prompts_too():
    bench = Bench(batching="static")
    bench.add("a", range(12))
    bench.add("b", range(12))
    assert len(bench.step().sequences) == 2


def test_completions_are_cached_too():
    bench = Bench()
    bench.add("a", prompt_of(6), max_tokens=8)
    bench.run()
    follow_up = prompt_of(6) + bench.completion("a") + [5]
    bench.add("b", follow_up)
    bench.run()
    assert bench.started("b").num_cached_tokens == 12
    bench.expect("b", follow_up, 5)


def test_the_last_prompt_token_is_always_computed():
    bench = Bench()
    bench.add("a", prompt_of(8))
    bench.run()
    bench.add("b", prompt_of(8))
    bench.run()
    assert bench.started("b").num_cached_tokens == 4
    bench.expect("b", prompt_of(8), 5)


@pytest.mark.parametrize("options", [{"cache_salt": "other"}, {"skip_cache_read": True}, {"prompt_logprobs": 0}])
def test_salt_skip_read_and_prompt_logprobs_do_not_read_the_cache(options):
    bench = Bench()
    bench.add("a", prompt_of(12))
    bench.run()
    bench.add("b", prompt_of(12), **options)
    bench.run()
    assert bench.started("b").num_cached_tokens == 0
    bench.expect("b", prompt_of(12), 5)


def test_skip_read_still_writes():
    bench = Bench()
    bench.add("a", prompt_of(12), skip_cache_read=True)
    bench.run()
    bench.add("b", prompt_of(12))
    bench.run()
    assert bench.started("b").num_cached_tokens == 8


def test_without_the_prefix_cache_nothing_outlives_its_request():
    bench = Bench(cache=False)
    bench.add("a", prompt_of(12))
    bench.run()
    assert bench.pool.num_free == bench.pool.num_blocks
    bench.add("b", prompt_of(12))
    bench.add("c", prompt_of(12))
    bench.run()
    assert bench.started("b").num_cached_tokens == bench.started("c").num_cached_tokens == 0


@pytest.mark.parametrize("cache", [True, False])
def test_sequences_of_one_request_share_the_prompt(cache):
    bench = Bench(cache=cache)
    bench.add("a", prompt_of(18), n=3, max_tokens=4)
    bench.step()
    assert bench.executor.num_computed_tokens == 18
    bench.step()
    # The first goes on; the others compute only the prompt's tail, which fills no block.
    assert bench.executor.num_computed_tokens == 18 + 1 + 2 + 2
    assert bench.pool.num_owned == 4 + 3
    bench.run()
    for index in range(3):
        bench.expect("a", prompt_of(18), 4, index=index)


def test_preempted_sequence_resumes_with_the_same_tokens():
    bench = Bench(num_blocks=8, cache=False)
    bench.add("a", prompt_of(10), max_tokens=12)
    bench.add("b", prompt_of(10, 50), max_tokens=12)
    bench.run()
    bench.expect("a", prompt_of(10), 12)
    bench.expect("b", prompt_of(10, 50), 12)
    assert bench.outputs("a")[-1].num_preemptions == 0
    assert bench.outputs("b")[-1].num_preemptions > 0, "the youngest is preempted first"


def test_lower_priority_is_preempted_and_higher_runs_first():
    bench = Bench(max_num_seqs=1)
    bench.add("low", prompt_of(6), max_tokens=6, priority=-1)
    bench.step()
    bench.add("normal", prompt_of(6, 20), max_tokens=2)
    bench.add("high", prompt_of(6, 40), max_tokens=2, priority=5)
    bench.run()
    ends = [e.request_id for e in bench.events if isinstance(e, SequenceOutput) and e.finish_reason]
    assert ends == ["high", "normal", "low"]
    bench.expect("low", prompt_of(6), 6)


def test_equal_priorities_run_in_order_of_arrival():
    bench = Bench(max_num_seqs=1)
    for name in "abc":
        bench.add(name, prompt_of(3, ord(name)), max_tokens=2)
    bench.run()
    assert [e.request_id for e in bench.events if isinstance(e, RequestStarted)] == ["a", "b", "c"]


def test_static_batching_ends_a_batch_before_the_next_begins():
    bench = Bench(max_num_seqs=2, batching="static")
    for name, count in (("a", 2), ("b", 6), ("c", 2)):
        bench.add(name, prompt_of(3, ord(name)), max_tokens=count)
    bench.run()
    assert bench.started("c").time_s >= 6
    bench.expect("c", prompt_of(3, ord("c")), 2)


def test_eos_stop_token_length_and_context_end_a_sequence():
    tokens = expected_completion(prompt_of(5), 7, 10, 1000)
    bench = Bench(max_context=12)
    bench.add("eos", prompt_of(5), eos=frozenset({tokens[2]}))
    bench.add("stop", prompt_of(5), stop_token_ids=frozenset({tokens[1]}))
    bench.add("length", prompt_of(5), max_tokens=1)
    bench.add("context", prompt_of(5), max_tokens=None)
    bench.run()
    assert bench.finish_reason("eos") is FinishReason.EOS
    assert bench.completion("eos") == tokens[:3]
    assert bench.outputs("eos")[-1].stop_token_id == tokens[2]
    assert bench.finish_reason("stop") is FinishReason.STOP
    assert bench.completion("stop") == tokens[:2]
    assert bench.finish_reason("length") is FinishReason.LENGTH
    assert bench.outputs("length")[-1].stop_token_id is None
    assert bench.finish_reason("context") is FinishReason.CONTEXT
    assert bench.completion("context") == tokens[:7]


def test_expired_request_never_runs_and_a_running_one_is_cut_at_the_next_step():
    bench = Bench(max_num_seqs=1)
    bench.add("running", prompt_of(4), max_tokens=50, deadline_s=3)
    bench.add("waiting", prompt_of(4, 9), deadline_s=2)
    bench.run()
    failures = {e.request_id: e.reason for e in bench.events if isinstance(e, RequestFailed)}
    assert failures == {"running": Failure.DEADLINE, "waiting": Failure.DEADLINE}
    assert len(bench.completion("running")) == 3
    assert not bench.outputs("waiting")
    assert bench.pool.num_owned == 0


def test_time_limit_ends_with_what_there_is():
    bench = Bench(max_num_seqs=1)
    bench.add("running", prompt_of(4), max_tokens=50, n=2, time_limit_s=3)
    bench.add("waiting", prompt_of(4, 9), time_limit_s=2)
    bench.run()
    for name, index in (("running", 0), ("running", 1), ("waiting", 0)):
        assert bench.finish_reason(name, index) is FinishReason.TIME_LIMIT
    assert len(bench.completion("running")) == 3
    bench.started("waiting")


def test_a_request_starts_once_even_if_its_first_sequence_is_over_when_the_time_is():
    bench = Bench(max_num_seqs=1)
    bench.add("a", prompt_of(4), max_tokens=1, n=2, time_limit_s=1)
    bench.run()
    bench.started("a")
    assert bench.finish_reason("a", 0) is FinishReason.LENGTH
    assert bench.finish_reason("a", 1) is FinishReason.TIME_LIMIT


def test_abort_frees_everything_at_once_wherever_the_request_is():
    bench = Bench(max_num_seqs=2)
    bench.add("running", prompt_of(9), n=3)
    bench.add("waiting", prompt_of(9, 30))
    bench.step()
    bench.scheduler.abort("running", 0)
    bench.scheduler.abort("waiting")
    bench.scheduler.abort("running")
    bench.scheduler.abort("running")
    bench.scheduler.abort("unknown")
    assert not bench.scheduler.has_work
    assert bench.pool.num_owned == 0
    bench.scheduler.check_invariants()


def test_one_aborted_sequence_leaves_its_siblings():
    bench = Bench()
    bench.add("a", prompt_of(6), n=2, max_tokens=6)
    bench.step()
    bench.step()
    bench.scheduler.abort("a", 0)
    bench.run()
    bench.expect("a", prompt_of(6), 6, index=1)


def test_corrupt_sequence_fails_alone_and_its_blocks_are_never_shared():
    bench = Bench(budget=8)
    bench.add("bad", prompt_of(16))
    bench.step()
    bench.add("good", prompt_of(5, 70))
    plan = bench.scheduler.schedule(bench.now)
    result = bench.executor.execute(plan)
    outcomes = [
        SequenceResult(failure=Failure.CORRUPT) if s.start else outcome
        for s, outcome in zip(plan.sequences, result.sequences, strict=True)
    ]
    bench.events += bench.scheduler.commit(StepResult(outcomes), 1.0)
    assert RequestFailed("bad", Failure.CORRUPT) in bench.events
    bench.run()
    bench.expect("good", prompt_of(5, 70), 5)
    bench.add("again", prompt_of(16))
    bench.run()
    assert bench.started("again").num_cached_tokens == 0


def test_a_sequence_without_a_possible_token_fails_alone_and_its_blocks_stay_known():
    bench = Bench(max_num_seqs=2)
    bench.add("stuck", prompt_of(16))
    bench.add("good", prompt_of(5, 70))
    bench.scheduler.schedule(bench.now)
    stuck = SequenceResult(failure=Failure.NO_TOKEN)
    bench.events += bench.scheduler.commit(StepResult([SequenceResult([1]), stuck]), 1.0)
    assert RequestFailed("stuck", Failure.NO_TOKEN) in bench.events
    bench.scheduler.check_invariants()
    assert [s.request.id for s in bench.scheduler._running()] == ["good"]


def test_a_step_that_raised_fails_its_requests_and_no_others():
    bench = Bench(max_num_seqs=1)
    bench.add("a", prompt_of(6))
    bench.add("b", prompt_of(6, 30))
    events = bench.fail_step()
    assert RequestFailed("a", Failure.STEP) in events
    bench.scheduler.check_invariants()
    bench.run()
    bench.expect("b", prompt_of(6, 30), 5)


def test_prompt_logprobs_are_reported_once_even_after_preemption():
    bench = Bench(num_blocks=8, budget=6, max_num_seqs=2)
    bench.add("old", prompt_of(6, 200), max_tokens=14)
    bench.step()
    bench.add("b", prompt_of(20), prompt_logprobs=0, max_tokens=2)
    bench.step()
    bench.step()
    sequence = bench.scheduler._requests["b"][0]
    bench.scheduler._preempt(sequence, sequence, {})
    bench.run()
    reported = [p.token_id for e in bench.outputs("b") for p in e.prompt_logprobs]
    assert reported == prompt_of(20)[1:]
    assert bench.outputs("b")[-1].num_preemptions >= 1


def test_stats_count_every_sequence():
    bench = Bench(max_num_seqs=2)
    bench.add("a", prompt_of(9), n=2)
    bench.add("b", prompt_of(9, 50))
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_owned_blocks, stats.num_blocks) == (6, 64)


# ------------------------------------------------------------------------------------------------------ drafts

DRAFTS = [right_drafts, wrong_drafts, random_drafts, endless_drafts]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("options", [{}, {"num_blocks": 9, "budget": 9}, {"cache": False}, {"budget": 8}])
def test_drafts_change_no_token(draft, options):
    bench = Bench(draft=draft, **options)
    bench.add("a", prompt_of(7), max_tokens=17)
    bench.add("b", prompt_of(3, 40), max_tokens=9, n=2, logprobs=0)
    bench.run()
    bench.expect("a", prompt_of(7), 17)
    for index in (0, 1):
        bench.expect("b", prompt_of(3, 40), 9, index=index)
        assert [len(e.logprobs) for e in bench.outputs("b", index)] == [
            len(e.token_ids) for e in bench.outputs("b", index)
        ]
    assert bench.pool.num_owned == 0


def test_right_drafts_save_steps_and_wrong_ones_cost_none():
    num_steps = {}
    for draft in (None, right_drafts, wrong_drafts):
        bench = Bench(draft=draft)
        bench.add("a", prompt_of(7), max_tokens=21)
        bench.run()
        num_steps[draft] = len(bench.executor.plans)
    assert num_steps[right_drafts] == 1 + 4  # five tokens a step, behind the first
    assert num_steps[wrong_drafts] == num_steps[None] == 21


@pytest.mark.parametrize("place", range(6))
def test_guesses_are_counted_behind_the_cut(place):
    """Of four right ones and the token behind them, wherever a stop token ends the text."""
    prompt = prompt_of(7)
    stop = expected_completion(prompt, 7, 21, 1000)[1 + place]
    bench = Bench(draft=right_drafts)
    bench.add("a", prompt, max_tokens=21, stop_token_ids=frozenset({stop}))
    bench.run()
    drafts = [(len(e.token_ids), e.draft.num_drafted, e.draft.num_accepted) for e in bench.outputs("a") if e.draft]
    assert drafts == ([(place + 1, 4, min(place + 1, 4))] if place < 5 else [(5, 4, 4), (1, 4, 1)])


def test_guesses_take_no_block_while_somebody_waits():
    bench = Bench(draft=endless_drafts, num_blocks=6, max_context=24)
    bench.add("a", prompt_of(7), max_tokens=12)
    bench.step()
    bench.add("b", prompt_of(22, 40), max_tokens=1)
    plan = bench.step()
    assert bench.scheduler._waiting
    # As far as the last of its own blocks has room: the eighth token is computed, and none is left of eight.
    assert [(s.num_drafts, s.new_block_ids) for s in plan.sequences] == [(0, [])]


def test_a_block_is_named_when_its_tokens_are_final():
    """Four drafts of which one is right fill a block with tokens that were refused."""
    bench = Bench(draft=lambda token_ids, seed: [*right_drafts(token_ids, seed, 1), 1000, 1001, 1002])
    bench.add("a", prompt_of(7), max_tokens=6)
    bench.step()
    bench.step()
    [sequence] = bench.scheduler._running()
    assert (sequence.num_tokens, sequence.num_computed_tokens) == (7 + 1 + 2, 7 + 1 + 1)
    assert bench.pool.find(sequence.block_hashes) == sequence.block_ids[:2]
    assert len(sequence.block_hashes) == 2
    # The blocks of the refused ones are the sequence's, and are told of once.
    assert bench.step().sequences[0].new_block_ids == []
    bench.run()
    completion = bench.completion("a")
    bench.add("again", [*prompt_of(7), *completion, 5])
    bench.run()
    assert bench.started("again").num_cached_tokens == 12
    bench.expect("again", [*prompt_of(7), *completion, 5], 5)


@pytest.mark.parametrize("draft", [right_drafts, endless_drafts])
@pytest.mark.parametrize("place", range(6))
def test_nothing_comes_behind_an_end_that_was_drafted(draft, place):
    expected = expected_completion(prompt_of(6), 7, 10, 1000)
    bench = Bench(draft=draft)
    bench.add("a", prompt_of(6), max_tokens=10, eos=frozenset({expected[place]}))
    bench.run()
    assert bench.completion("a") == expected[: place + 1]
    assert bench.finish_reason("a") is FinishReason.EOS
    bench.add("again", [*prompt_of(6), *expected[: place + 1], 5], max_tokens=3)
    bench.run()
    bench.expect("again", [*prompt_of(6), *expected[: place + 1], 5], 3)


def test_no_place_is_kept_for_drafts_that_could_not_be_used():
    bench = Bench(draft=endless_drafts, max_context=24)
    bench.add("a", prompt_of(6), max_tokens=5)
    bench.add("b", prompt_of(6, 50), max_tokens=None)
    bench.run()
    assert bench.finish_reason("a") is FinishReason.LENGTH
    assert bench.finish_reason("b") is FinishReason.CONTEXT
    bench.expect("a", prompt_of(6), 5)
    bench.expect("b", prompt_of(6, 50), 18)
    for plan in bench.executor.plans:
        for s in plan.sequences:
            assert s.start + s.num_known + s.num_drafts < 24


def test_drafts_take_no_tokens_and_no_blocks_from_others():
    bench = Bench(draft=endless_drafts, budget=8, num_blocks=9)
    bench.add("a", prompt_of(4), max_tokens=12)
    bench.step()
    bench.add("b", prompt_of(16, 50), max_tokens=3)
    plan = bench.step()
    [a, b] = plan.sequences
    assert (a.num_known, a.num_drafts, b.num_known) == (1, 0, 7)
    bench.run()
    assert bench.scheduler.stats().num_preemptions == 0
    bench.expect("a", prompt_of(4), 12)
    bench.expect("b", prompt_of(16, 50), 3)


@pytest.mark.parametrize("draft", [None, *DRAFTS])
@pytest.mark.parametrize("num_blocks", [7, 12, 64])
def test_steps_planned_ahead_give_the_same_tokens_and_ends(num_blocks, draft):
    def outcome(depth):
        bench = Bench(num_blocks=num_blocks, max_num_seqs=3, budget=9, draft=draft, depth=depth)
        expected = expected_completion(prompt_of(6), 7, 9, 1000)
        bench.add("eos", prompt_of(6), max_tokens=None, eos=frozenset({expected[4]}))
        bench.add("two", prompt_of(6), n=2, max_tokens=7)
        bench.add("same prefix", prompt_of(11), max_tokens=1)
        bench.add("only the prompt", prompt_of(9, 50), max_tokens=0, prompt_logprobs=0)
        bench.add("context", prompt_of(20, 30), max_tokens=None)
        for _ in range(3):
            bench.step()
        bench.add("urgent", prompt_of(5, 90), max_tokens=3, priority=1)
        bench.run()
        assert bench.pool.num_owned == 0
        names = [("eos", 0), ("two", 0), ("two", 1), ("same prefix", 0), ("context", 0), ("urgent", 0)]
        return [(bench.completion(*name), bench.finish_reason(*name)) for name in names], [
            (entry.token_id, entry.logprob) for e in bench.outputs("only the prompt") for entry in e.prompt_logprobs
        ]

    assert outcome(1) == outcome(2) == outcome(3)


def test_a_step_is_planned_while_another_is_in_flight():
    bench = Bench(depth=2)
    bench.add("a", prompt_of(6), max_tokens=4)
    bench.step()
    assert bench.scheduler.num_in_flight == 1
    assert bench.completion("a") == expected_completion(prompt_of(6), 7, 1, 1000)
    # No place is planned for a token behind the last one.
    bench.run()
    assert [num_tokens(plan) for plan in bench.executor.plans] == [6, 1, 1, 1]


def test_who_needs_a_place_gets_it_although_steps_are_planned_ahead():
    bench = Bench(depth=2, max_num_seqs=1)
    bench.add("a", prompt_of(6), max_tokens=40)
    bench.step()
    bench.add("urgent", prompt_of(6, 50), max_tokens=3, priority=1)
    for _ in range(8):
        bench.step()
    assert bench.finish_reason("urgent") is FinishReason.LENGTH
    bench.run()
    bench.expect("a", prompt_of(6), 40)
    bench.expect("urgent", prompt_of(6, 50), 3)


def test_a_prompt_that_a_step_in_flight_computes_is_not_computed_twice():
    bench = Bench(depth=2, budget=12)
    bench.add("a", prompt_of(20), max_tokens=2)
    bench.executor.submit(bench.scheduler.schedule(0.0))
    bench.add("b", prompt_of(20), max_tokens=2)
    bench.run()
    assert bench.executor.num_computed_tokens == 20 + 1 + 4 + 1
    assert bench.started("b").num_cached_tokens == 16


def test_an_end_that_is_seen_late_takes_its_step_in_flight_along():
    bench = Bench(depth=2)
    expected = expected_completion(prompt_of(6), 7, 3, 1000)
    bench.add("a", prompt_of(6), eos=frozenset({expected[1]}))
    bench.add("b", prompt_of(6, 50))
    bench.run()
    assert bench.completion("a") == expected[:2]
    bench.expect("b", prompt_of(6, 50), 5)
    assert bench.executor.num_computed_tokens == 12 + 4 + 2


class Life(RuleBasedStateMachine):
    """Add, step, cancel, preempt, fail, reset in any order, in pools so small that everything collides."""

    def __init__(self):
        super().__init__()
        self.bench = None
        self.requests = {}

    @precondition(lambda self: self.bench is None)
    @rule(
        num_blocks=st.integers(4, 12),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(4, 12),
        cache=st.booleans(),
        batching=st.sampled_from(["continuous", "continuous", "static"]),
        draft=st.sampled_from([None, *DRAFTS]),
        depth=st.sampled_from([1, 1, 2, 3]),
    )
    def start(self, **options):
        self.bench = WatchedBench(**options)

    @precondition(lambda self: self.bench is not None)
    @rule(data=st.data())
    def add(self, data):
        limit = self.bench.scheduler._max_context_tokens
        # Few distinct tokens, so that prompts share prefixes.
        prompt = [0] * data.draw(st.integers(1, min(12, limit - 1))) + data.draw(
            st.lists(st.integers(0, 2), max_size=2)
        )
        prompt = prompt[: limit - 1]
        request_id = f"r{len(self.requests)}"
        self.requests[request_id] = self.bench.add(
            request_id,
            prompt,
            n=data.draw(st.integers(1, 3)),
            max_tokens=data.draw(st.integers(1, 12)),
            priority=data.draw(st.integers(-1, 1)),
            skip_cache_read=data.draw(st.booleans()),
            cache_salt=data.draw(st.sampled_from(["", "s"])),
            deadline_s=data.draw(st.none() | st.integers(0, 40)),
            time_limit_s=data.draw(st.none() | st.integers(0, 40)),
        )

    @precondition(lambda self: self.bench is not None)
    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.bench.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.none() | st.integers(0, 2))
    def abort(self, data, index):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if index is None or self.bench.completion(request_id, index):
            self.bench.scheduler.abort(request_id, index)

    @precondition(lambda self: self.bench is not None and any(self.bench.scheduler._running()))
    @precondition(lambda self: self.bench is not None and not self.bench.scheduler.num_in_flight)
    @rule(data=st.data())
    def preempt(self, data):
        running = list(self.bench.scheduler._running())
        sequence = running[data.draw(st.integers(0, len(running) - 1))]
        self.bench.scheduler._preempt(sequence, sequence, {})

    @precondition(lambda self: self.bench is not None)
    @rule()
    def step_raises(self):
        self.bench.fail_step()

    @precondition(lambda self: self.bench is not None)
    @rule()
    def reset_cache(self):
        self.bench.scheduler.reset_cache()

    @invariant()
    def accounts_balance(self):
        if self.bench is not None:
            self.bench.scheduler.check_invariants()

    def teardown(self):
        if self.bench is None:
            return
        self.bench.run()
        pool = self.bench.pool
        assert pool.num_owned == 0
        assert pool.num_free + pool.num_cached == pool.num_blocks
        for request_id, request in self.requests.items():
            starts = [e for e in self.bench.events if isinstance(e, RequestStarted) and e.request_id == request_id]
            assert len(starts) <= 1
            for index in range(request.params.n):
                completion = self.bench.completion(request_id, index)
                assert completion == expected_completion(request.prompt_token_ids, 7 + index, len(completion), 1000)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.soak
def test_a_hundred_thousand_random_operations():
    Life.TestCase.settings = settings(max_examples=1000, stateful_step_count=120, deadline=None)
    Life.TestCase().runTest()
