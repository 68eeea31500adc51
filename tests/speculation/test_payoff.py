"""How many guesses pay: from the clock and from what came of earlier ones."""

import pytest

from nanoserve.request import Admission, DraftSource, SamplingParams
from nanoserve.speculation.payoff import (
    FORGOTTEN_AFTER,
    MAX_STEP_DRAFTS,
    Acceptance,
    OwnAcceptance,
    StepTimes,
    choose_counts,
    may_pay,
)
from nanoserve.speculation.speculator import Speculator


def times_of(seconds, sizes=range(1, 100)):
    times = StepTimes()
    for size in sizes:
        times.add(size, seconds(size))
    return times


def flat(_size):
    return 0.03


def steep(size):
    return 0.01 * size


def test_guesses_pay_where_a_step_waits_for_memory_and_not_where_it_computes():
    assert choose_counts(times_of(flat), 1, [(0.9, 5)]) == [5]
    assert choose_counts(times_of(steep), 1, [(0.9, 5)]) == [0]


def test_the_likelier_guesses_come_first():
    # Four tokens more are free, and all others are not.
    times = times_of(lambda size: 0.03 if size <= 6 else 0.03 * size)
    assert choose_counts(times, 2, [(0.9, 5), (0.3, 5)]) == [4, 0]
    assert choose_counts(times, 2, [(0.8, 5), (0.75, 5)]) == [2, 2]


def test_prompts_of_the_step_count_as_tokens_that_it_makes():
    assert choose_counts(times_of(steep, range(1, 700)), 512, [(0.9, 8)]) == [0]


def test_a_step_without_guesses_is_measured_first():
    times = times_of(flat, [9])
    assert not may_pay(times, 1, 8)
    times.add(1, 0.03)
    assert may_pay(times, 1, 8)


def test_no_guess_is_made_where_none_could_pay():
    assert not may_pay(times_of(steep, [64, 72, 80, 96, 128, 192, 320]), 64, 256)
    assert may_pay(times_of(flat), 64, 256)
    assert not may_pay(times_of(flat), 64, 0)


def test_sizes_that_are_not_known_are_tried():
    times = times_of(flat, [1])
    assert times.expect(50) == times.expect(1)
    times.add(9, 0.1)
    assert times.expect(5) == pytest.approx((0.03 + 0.1) / 2)
    assert choose_counts(times, 1, [(0.9, 8)]) == [5]


def test_a_mean_that_nobody_renews_is_forgotten():
    times = times_of(flat, [1])
    times.add(9, 9.0)
    for _ in range(FORGOTTEN_AFTER + 1):
        times.add(1, 0.03)
    assert times.expect(9) == pytest.approx(0.03)


def test_one_step_that_was_held_up_does_not_count_for_many():
    times = times_of(flat, [1])
    times.add(1, 60.0)
    assert times.expect(1) < 0.05


def test_a_step_has_only_so_many_guesses():
    assert sum(choose_counts(times_of(flat), 64, [(0.9, 64)] * 64)) == MAX_STEP_DRAFTS


def test_what_was_right_is_expected_again_and_what_was_wrong_is_not():
    acceptance, own = Acceptance(), OwnAcceptance()
    before = acceptance.expect(DraftSource.NGRAM, 3, own)
    for _ in range(100):
        acceptance.add(DraftSource.NGRAM, 3, own, num_tried=4, num_right=0)
    assert acceptance.expect(DraftSource.NGRAM, 3, own) < 0.02
    # Another sequence begins with what is known of all.
    assert acceptance.expect(DraftSource.NGRAM, 3, OwnAcceptance()) < 0.1
    assert acceptance.expect(DraftSource.NGRAM, 4, OwnAcceptance()) > before
    for _ in range(5000):
        acceptance.forgive(DraftSource.NGRAM, 3, own)
    assert acceptance.expect(DraftSource.NGRAM, 3, own) == pytest.approx(before, abs=0.02)


def admission(**params):
    prompt = [1, 2, 3, 4, 1, 2, 3]
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
    speculator.add_step(1, 0, 0.03)
    assert len(speculator.choose({0: speculator.num_places(0)}, 1).get(0, [])) == num


def test_a_step_has_places_only_where_guesses_may_pay():
    """Places take blocks, which may have held somebody's prefix."""
    speculator = Speculator.of("auto")
    speculator.admit(0, admission())
    assert speculator.num_places(0) == 0
    for size in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        speculator.add_step(size, size - 1, 0.03)
    assert speculator.num_places(0) == 16
    for _ in range(40):
        for size in (2, 3, 4, 5, 8, 9, 16, 17):
            speculator.add_step(size, size - 1, 0.03 * 2 * size)
    assert speculator.num_places(0) == 0
