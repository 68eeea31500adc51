"""How many guesses pay: from the clock and from what came of earlier ones."""

from dataclasses import replace

import pytest

from nanoserve.request import Admission, DraftSource, SamplingParams
from nanoserve.speculation import speculator as speculator_module
from nanoserve.speculation.drafter import Draft
from nanoserve.speculation.payoff import (
    FORGOTTEN_AFTER,
    MAX_STEP_DRAFTS,
    NUM_FIRST_STEPS,
    Acceptance,
    OwnAcceptance,
    Prospect,
    StepTimes,
    choose_counts,
    may_guess_more,
    may_pay,
)
from nanoserve.speculation.speculator import Speculator, read_choice


def times_of(seconds, sizes=range(1, 100)):
    times = StepTimes()
    for size in sizes:
        measure(times, size, seconds(size))
    return times


def measure(times, size, seconds):
    """Until it is known."""
    for _ in range(NUM_FIRST_STEPS):
        times.add(size, seconds)


def chances(share, length):
    return [share**place for place in range(1, length + 1)]


def flat(_size):
    return 0.03


def steep(size):
    return 0.01 * size


def test_guesses_pay_where_a_step_waits_for_memory_and_not_where_it_computes():
    assert choose_counts(times_of(flat), 1, [chances(0.9, 5)]) == [5]
    assert choose_counts(times_of(steep), 1, [chances(0.9, 5)]) == [0]


def test_guesses_that_would_hardly_pay_are_left_out():
    assert choose_counts(times_of(lambda size: 0.03 if size == 1 else 0.045), 1, [chances(0.6, 1)]) == [0]
    assert choose_counts(times_of(lambda size: 0.03 if size == 1 else 0.045), 1, [chances(0.9, 1)]) == [1]


def test_the_likelier_guesses_come_first():
    # Four tokens more are free, and all others are not.
    times = times_of(lambda size: 0.03 if size <= 6 else 0.03 * size)
    assert choose_counts(times, 2, [chances(0.9, 5), chances(0.3, 5)]) == [4, 0]
    assert choose_counts(times, 2, [chances(0.8, 5), chances(0.75, 5)]) == [2, 2]


def test_prompts_of_the_step_count_as_tokens_that_it_makes():
    assert choose_counts(times_of(steep, range(1, 700)), 512, [chances(0.9, 8)]) == [0]


def test_a_step_without_guesses_is_measured_first():
    times = times_of(flat, [9])
    assert not may_pay(times, 1, 8)
    measure(times, 1, 0.03)
    assert may_pay(times, 1, 8)


def test_no_guess_is_made_where_none_could_pay():
    assert not may_pay(times_of(steep, [64, 72, 80, 96, 128, 192, 320]), 64, 256)
    assert may_pay(times_of(flat), 64, 256)
    assert not may_pay(times_of(flat), 64, 0)


def test_sizes_that_are_not_known_are_tried():
    times = times_of(flat, [1])
    assert times.expect(50) == times.expect(1)
    assert StepTimes().expect(1) == 0
    assert times_of(flat, [60]).expect(6) == pytest.approx(0.003)
    measure(times, 9, 0.1)
    assert times.expect(5) == pytest.approx((0.03 + 0.1) / 2)
    assert choose_counts(times, 1, [chances(0.9, 8)]) == [5]


def test_a_mean_that_nobody_renews_is_forgotten():
    times = times_of(flat, [1])
    measure(times, 9, 9.0)
    for _ in range(FORGOTTEN_AFTER + 1):
        times.add(1, 0.03)
    assert times.expect(9) == pytest.approx(0.03)


def test_of_the_first_steps_of_a_size_the_shortest_counts():
    """Some set something up."""
    times = StepTimes()
    times.add(1, 0.5)
    times.add(1, 0.03)
    assert not times.knows(1)
    times.add(1, 0.4)
    assert times.expect(1) == pytest.approx(0.03)


def test_one_step_that_was_held_up_does_not_count_for_many():
    times = times_of(flat, [1])
    times.add(1, 60.0)
    assert times.expect(1) < 0.05


def test_a_step_has_only_so_many_guesses():
    assert sum(choose_counts(times_of(flat), 64, [chances(0.9, 64)] * 64)) == MAX_STEP_DRAFTS


def test_what_was_right_is_expected_again_and_what_was_wrong_is_not():
    acceptance, own = Acceptance(), OwnAcceptance()
    draft = Draft(DraftSource.NGRAM, [5, 6, 7, 8], [3, 3, 3, 3])
    before = acceptance.chances(draft, own)[0]
    for _ in range(100):
        acceptance.add(draft, own, num_tried=4, num_right=0)
    assert acceptance.chances(draft, own)[0] < 0.02
    # Another sequence begins with what is known of all.
    assert acceptance.chances(draft, OwnAcceptance())[0] < 0.1
    assert acceptance.chances(replace(draft, evidence=[4]), OwnAcceptance())[0] > before
    for _ in range(5000):
        acceptance.forgive(draft, own)
    assert acceptance.chances(draft, own)[0] == pytest.approx(before, abs=0.02)


def test_more_is_expected_of_a_sequence_whose_drafts_are_right_more_often_than_others():
    acceptance, lucky, unlucky = Acceptance(), OwnAcceptance(), OwnAcceptance()
    draft = Draft(DraftSource.NGRAM, [5, 6], [3, 3])
    for _ in range(30):
        acceptance.add(draft, lucky, num_tried=2, num_right=2)
        acceptance.add(draft, unlucky, num_tried=2, num_right=0)
    of_all = acceptance.chances(draft, OwnAcceptance())[0]
    assert acceptance.chances(draft, lucky)[0] > 1.2 * of_all
    assert acceptance.chances(draft, unlucky)[0] < of_all / 2


def test_each_token_is_expected_by_its_own_evidence():
    acceptance, own = Acceptance(), OwnAcceptance()
    strong, weak = (acceptance.chances(Draft(DraftSource.SUFFIX, [5], [e]), own)[0] for e in (16, 2))
    draft = Draft(DraftSource.SUFFIX, [5, 6, 7], [16, 2, 16])
    assert acceptance.chances(draft, own) == pytest.approx([strong, strong * weak, strong * weak * strong])
    # Of the three, one was right: the third says nothing.
    acceptance.add(draft, own, num_tried=3, num_right=1)
    others = OwnAcceptance()
    assert acceptance.chances(Draft(DraftSource.SUFFIX, [5], [16]), others)[0] > strong
    assert acceptance.chances(Draft(DraftSource.SUFFIX, [5], [2]), others)[0] < weak


def admission(prompt=(1, 2, 3, 4, 1, 2, 3), **params):
    prompt = list(prompt)
    return Admission(SamplingParams(**params), 0, prompt, len(prompt), frozenset())


@pytest.mark.parametrize(
    ("choice", "params", "num"),
    [
        ("auto", {}, 16),
        ("ngram:5", {}, 5),
        ("off", {}, 0),
        ("suffix", {}, 0),
        ("auto", {"max_draft_tokens": 0}, 0),
        ("auto", {"max_draft_tokens": 2}, 2),
        ("auto:4", {"max_draft_tokens": 9}, 4),
        ("off", {"prediction": (7, 8, 9)}, 3),
        ("off", {"prediction": (7, 8, 9), "max_draft_tokens": 0}, 0),
    ],
)
def test_who_may_guess_and_how_much(choice, params, num):
    speculator = Speculator.of(choice)
    speculator.admit(0, admission(**params))
    for _ in range(NUM_FIRST_STEPS):
        speculator.add_step(1, 0, 0.03)
    assert len(speculator.choose({0: speculator.num_places(0)}, 1).get(0, [])) == num


@pytest.mark.parametrize(
    ("choice", "has_draft_model", "sources", "most"),
    [
        ("auto", True, [DraftSource.NGRAM, DraftSource.SUFFIX, DraftSource.DRAFT_MODEL], 16),
        ("auto:4", False, [DraftSource.NGRAM, DraftSource.SUFFIX], 4),
        ("draft:64", True, [DraftSource.DRAFT_MODEL], 64),
        # What a caller predicts is followed.
        ("off", False, [], 16),
    ],
)
def test_the_choice_says_which_sources_and_how_many_tokens(choice, has_draft_model, sources, most):
    assert read_choice(choice, has_draft_model=has_draft_model) == (tuple(sources), most)


def test_a_step_has_places_only_where_guesses_may_pay():
    """Places take blocks, which may have held somebody's prefix."""
    speculator = Speculator.of("auto")
    speculator.admit(0, admission())
    assert speculator.num_places(0) == 0
    for size in (1, 2, 3, 4, 5, 8, 9, 16, 17) * NUM_FIRST_STEPS:
        speculator.add_step(size, size - 1, 0.03)
    assert speculator.num_places(0) == 16
    for _ in range(40):
        for size in (2, 3, 4, 5, 8, 9, 16, 17):
            speculator.add_step(size, size - 1, 0.03 * 2 * size)
    assert speculator.num_places(0) == 0


# ------------------------------------------------------------------------------------- a model that drafts


def test_a_pass_of_a_model_pays_if_what_it_guesses_is_worth_its_time():
    cheap, dear = times_of(lambda _: 0.002), times_of(lambda _: 0.030)
    prospects = [Prospect(1.0, 0.8, 5)]
    assert may_guess_more(times_of(flat), cheap, 1, 1.0, prospects)
    assert not may_guess_more(times_of(flat), dear, 1, 1.0, prospects)
    assert not may_guess_more(times_of(flat), cheap, 1, 1.0, [Prospect(0.02, 0.8, 5)])
    assert not may_guess_more(times_of(flat), cheap, 1, 1.0, [])


def test_one_guess_that_does_not_pay_may_be_the_way_to_five_that_do():
    # Two tokens take as long as six.
    times = times_of(lambda size: 0.03 if size == 1 else 0.06)
    passes = times_of(lambda _: 0.001)
    assert may_guess_more(times, passes, 1, 1.0, [Prospect(1.0, 0.9, 5)])
    assert not may_guess_more(times, passes, 1, 1.0, [Prospect(1.0, 0.9, 1)])


def test_a_model_is_worth_what_it_guesses_less_the_time_that_it_takes():
    prospect = Prospect(1.0, 0.5, 3)
    assert prospect.worth(0.03, 0.0) == pytest.approx(0.5 + 0.25 + 0.125)
    # One pass of a third of a step: 1.5 tokens in four thirds of the time. A second pass would be too many.
    assert prospect.worth(0.03, 0.01) == pytest.approx(1.5 * 3 / 4 - 1)
    assert prospect.worth(0.03, 0.03) == 0


def test_a_model_that_was_never_timed_is_tried():
    assert may_guess_more(times_of(flat), StepTimes(), 1, 1.0, [Prospect(1.0, 0.5, 1)])


@pytest.fixture
def clock(monkeypatch):
    """Stands still, but for the passes of a Talker."""
    seconds = [0.0]
    monkeypatch.setattr(speculator_module.time, "perf_counter", lambda: seconds[0])
    return seconds


class Talker:
    """Takes a draft model's place: it guesses the numbers from 100 on, and is sure of the first few."""

    def __init__(self, clock, room=9, num_sure=9, pass_s=0.0):
        self.clock, self.room_of, self.num_sure, self.pass_s, self.num_passes = clock, room, num_sure, pass_s, 0

    def room(self, _row):
        return self.room_of

    def guess(self, drafts):
        self.num_passes += 1
        self.clock[0] += self.pass_s
        guesses = {row: (100 + len(d), 16 if len(d) < self.num_sure else 0) for row, d in drafts.items()}
        return guesses, len(drafts)


def speculator_with_times(choice="draft:6", step=flat, num_rows=1, **params):
    speculator = Speculator.of(choice, has_draft_model=True)
    for row in range(num_rows):
        speculator.admit(row, admission(**params))
    for size in (*range(1, 80),) * NUM_FIRST_STEPS:
        speculator.add_step(size, size - 1, step(size))
    return speculator


@pytest.mark.parametrize(("room", "num"), [(9, 6), (2, 2), (0, 0)])
def test_a_model_guesses_as_far_as_it_may(clock, room, num):
    talker = Talker(clock, room)
    chosen = speculator_with_times().choose({0: 6}, 1, talker)
    assert chosen == ({0: list(range(100, 100 + num))} if num else {})
    assert talker.num_passes == num


def test_a_model_is_not_asked_where_guesses_cannot_pay(clock):
    talker = Talker(clock)
    assert speculator_with_times(step=steep).choose({0: 6}, 1, talker) == {}
    assert talker.num_passes == 0


def test_a_model_stops_where_it_is_not_sure(clock):
    talker = Talker(clock, num_sure=2)
    speculator = speculator_with_times(step=lambda size: 0.03 + 0.004 * size)
    for _ in range(60):
        guess = speculator.choose({0: 6}, 1, talker).get(0, [])
        speculator.learn(0, len(guess), min(2, len(guess)))
        speculator.extend(0, [*guess[:2], 5])
    assert len(guess) == 2


def test_what_costs_nothing_is_taken_first(clock):
    """The prompt says what comes; and where that was wrong, the model is asked."""
    for is_right, expected in ((True, 4), (False, 100)):
        speculator = speculator_with_times("auto:6", prompt=[1, 2, 3, 4, 5, 6, 7, 8] * 3 + [1, 2, 3])
        for _ in range(40):
            chosen = speculator.choose({0: 6}, 1, Talker(clock))
            speculator.learn(0, len(chosen[0]), len(chosen[0]) if is_right or chosen[0][0] == 100 else 0)
        assert chosen[0][0] == expected


def test_a_model_that_is_never_right_is_seldom_asked(clock):
    talker = Talker(clock, num_sure=0, pass_s=0.002)
    speculator = speculator_with_times()
    for num_passes_allowed in (100, 10):
        talker.num_passes = 0
        for _ in range(100):
            guess = speculator.choose({0: 6}, 1, talker).get(0, [])
            speculator.learn(0, len(guess), 0)
        assert talker.num_passes <= num_passes_allowed
