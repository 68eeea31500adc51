"""What each drafter guesses, and that it does so at a cost that does not grow with the text."""

import itertools
import random
import sys

import pytest

from nanoserve.request import DraftSource
from nanoserve.speculation.drafter import INDEXED_AT_ONCE, MAX_EVIDENCE
from nanoserve.speculation.ngram import NgramDrafter
from nanoserve.speculation.prediction import PredictionDrafter
from nanoserve.speculation.suffix import SuffixCounts, SuffixDrafter


def tokens_of(draft):
    return None if draft is None else draft.token_ids


def naive_ngram(text, count):
    """What followed the latest earlier place of the last three tokens, found by looking everywhere."""
    for place in range(len(text) - 1, 2, -1):
        if text[place - 3 : place] == text[-3:]:
            return list(itertools.islice(itertools.cycle(text[place:]), count))
    return None


@pytest.mark.parametrize("seed", range(20))
def test_an_ngram_is_found_at_its_latest_place(seed):
    chance = random.Random(seed)
    text, drafter = [], NgramDrafter([])
    for _ in range(120):
        new = [chance.randrange(4) for _ in range(chance.randrange(1, 4))]
        text += new
        drafter.extend(new)
        assert tokens_of(drafter.propose(6)) == naive_ngram(text, 6)


def test_a_draft_that_reaches_the_end_goes_on_with_itself():
    assert tokens_of(NgramDrafter([1, 2, 3, 1, 2, 3]).propose(7)) == [1, 2, 3, 1, 2, 3, 1]
    assert tokens_of(NgramDrafter([7, 7, 7, 7]).propose(3)) == [7, 7, 7]


def test_a_text_is_not_walked_through_for_a_draft():
    """Lines of Python do not show that."""

    class Text(list):
        def __iter__(self):
            raise AssertionError("walked through from its beginning")

    drafter = NgramDrafter([1, 2, 3, 4, 5, 6, 1, 2, 3])
    drafter._token_ids = Text(drafter._token_ids)
    assert tokens_of(drafter.propose(2)) == [4, 5]


def test_evidence_is_the_length_of_the_match():
    assert NgramDrafter([9, 1, 2, 3, 4, 8, 1, 2, 3]).propose(1).evidence == [3]
    assert NgramDrafter([*range(40), *range(30)]).propose(1).evidence == [MAX_EVIDENCE]


def test_ids_that_do_not_fit_the_key_are_not_mistaken_for_others():
    large = 1 << 21
    assert NgramDrafter([1, 2, 3, 5, large + 1, 2, 3]).propose(2) is None


def lines_of(work):
    """How many lines of Python it runs: a cost that no busy machine changes."""
    num = 0

    def count(_frame, _event, _argument):
        nonlocal num
        num += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return num


@pytest.mark.parametrize("kind", [NgramDrafter, PredictionDrafter])
def test_a_long_text_is_indexed_with_the_next_steps_and_then_costs_nothing(kind):
    chance = random.Random(1)
    text = [chance.randrange(2, 9000) for _ in range(50_000)]
    drafters = []
    assert lines_of(lambda: drafters.append(kind(text))) < 5 * INDEXED_AT_ONCE
    [drafter] = drafters
    drafter.extend([1])
    assert lines_of(lambda: drafter.extend([1])) < 5 * INDEXED_AT_ONCE
    for _ in range(50_000 // INDEXED_AT_ONCE):
        drafter.extend([1])
    assert lines_of(lambda: (drafter.extend([1]), drafter.propose(8))) < 100
    # All of it was read.
    drafter.extend(text[-9:-3])
    assert tokens_of(drafter.propose(3)) == text[-3:]


def test_a_prediction_is_followed_and_found_again():
    predicted = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    drafter = PredictionDrafter(predicted)
    assert tokens_of(drafter.propose(3)) == [1, 2, 3]
    drafter.extend([1, 2])
    assert tokens_of(drafter.propose(3)) == [3, 4, 5]
    drafter.extend([99])  # in place of 3
    assert drafter.propose(3) is None
    drafter.extend([4])
    assert drafter.propose(3) is None
    drafter.extend([5])
    assert tokens_of(drafter.propose(9)) == [6, 7, 8, 9]
    drafter.extend([6, 7, 8, 9])
    assert drafter.propose(3) is None


def test_a_prediction_is_found_rather_further_on_than_back():
    drafter = PredictionDrafter([1, 2, 10, 1, 2, 20, 1, 2, 30])
    drafter.extend([1, 2, 10, 5, 1, 2])
    assert tokens_of(drafter.propose(1)) == [20]


def test_an_empty_prediction_guesses_nothing():
    drafter = PredictionDrafter([])
    drafter.extend([1, 2, 3])
    assert drafter.propose(4) is None


def test_a_suffix_is_what_most_often_followed():
    counts = SuffixCounts()
    for last in (5, 5, 5, 6):
        SuffixDrafter(counts, "me", []).extend([1, 2, 3, last])
    draft = SuffixDrafter(counts, "me", [1, 2, 3]).propose(4)
    assert (draft.source, draft.token_ids, draft.evidence) == (DraftSource.SUFFIX, [5], [12])


def test_nothing_of_another_owner_is_seen():
    counts = SuffixCounts()
    SuffixDrafter(counts, "me", []).extend([1, 2, 3, 4, 5, 6])
    assert SuffixDrafter(counts, "you", [1, 2, 3]).propose(4) is None
    assert tokens_of(SuffixDrafter(counts, "me", [1, 2, 3]).propose(9)) == [4, 5, 6]


def test_the_prompt_is_read_and_not_counted():
    counts = SuffixCounts()
    SuffixDrafter(counts, "me", [1, 2, 3, 4, 5, 6])
    assert len(counts) == 0


def test_counts_are_bounded_and_the_oldest_go_first():
    counts = SuffixCounts(max_contexts=10)
    drafter = SuffixDrafter(counts, "me", [])
    drafter.extend(list(range(100)))
    assert len(counts) == 10
    assert SuffixDrafter(counts, "me", [1, 2, 3]).propose(1) is None
    assert tokens_of(SuffixDrafter(counts, "me", [96, 97, 98]).propose(1)) == [99]
