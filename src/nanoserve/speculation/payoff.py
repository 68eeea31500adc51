"""How many drafts pay: from how long steps take, and from how often drafts of the same kind were right.

Acceptance alone is the wrong signal. A draft that is right nine times of ten still costs more than it gives where a
step waits for arithmetic, and one that is right once in three is a gift where it waits for memory. So drafts are added
as long as they raise

    tokens that the step is expected to make / seconds that it is expected to take
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from operator import mul

from nanoserve.request import DraftSource
from nanoserve.speculation.drafter import MAX_EVIDENCE, Draft

# Drafts of a step, all together: each needs logits as wide as the vocabulary.
MAX_STEP_DRAFTS = 256
# The first steps of a size may set something up. It counts as known after so many, and the shortest of them counts.
NUM_FIRST_STEPS = 3
# Weight of the newest step in the mean.
NEWEST_STEP = 0.2
# Guesses are computed if they promise so many times the tokens a second. What promises less may as well cost: times
# differ from step to step, and sequences that guess right leave those that do not behind, in smaller steps.
MIN_GAIN = 1.1
# A mean is forgotten after so many steps without a new one, and whatever is not known is tried again.
FORGOTTEN_AFTER = 2000
# Weight of the newest draft in a share.
NEWEST_DRAFT = 0.05
# While drafts of a kind are not tried, their share goes back to what is expected of them at first: by so much a step.
FORGIVENESS = 0.001
# What the drafts of one sequence say about it counts as much as that of all after so many were expected to be right.
TRUSTED_AFTER = 8.0
# Nothing is sure.
MAX_CHANCE = 0.99


class StepTimes:
    """Mean seconds of a step by the tokens that it computes."""

    def __init__(self) -> None:
        # Those that are known, in order.
        self._sizes: list[int] = []
        # Size -> mean, and the number of the step that was the last of that size.
        self._means: dict[int, tuple[float, int]] = {}
        # Of sizes that are not known yet.
        self._first: dict[int, list[float]] = {}
        self._num_steps = 0

    def add(self, num_tokens: int, seconds: float) -> None:
        self._num_steps += 1
        size = _rounded(num_tokens)
        if size not in self._means:
            first = self._first.setdefault(size, [])
            first.append(seconds)
            if len(first) < NUM_FIRST_STEPS:
                return
            insort(self._sizes, size)
            seconds = min(self._first.pop(size))
        mean, _ = self._means.get(size, (seconds, 0))
        # Steps of a size differ by their contexts; one that was held up does not count for more than twice its like.
        self._means[size] = mean + NEWEST_STEP * (min(seconds, 2 * mean) - mean), self._num_steps
        oldest = min(self._sizes, key=lambda size: self._means[size][1])
        if self._num_steps - self._means[oldest][1] > FORGOTTEN_AFTER:
            self._sizes.remove(oldest)
            del self._means[oldest]

    def knows(self, num_tokens: int) -> bool:
        return _rounded(num_tokens) in self._means

    def expect(self, num_tokens: int) -> float:
        """Between two sizes that are known, what lies between.

        Nothing is ruled out untried: a larger size takes as long as the largest, a smaller one less than the smallest,
        in proportion, and any of them no time if none is known.
        """
        if not self._sizes:
            return 0.0
        size = _rounded(num_tokens)
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return self._means[self._sizes[-1]][0]
        below, above = self._sizes[place - 1] if place else 0, self._sizes[place]
        low, high = self._means[below][0] if place else 0.0, self._means[above][0]
        return low + (high - low) * (size - below) / (above - below)


def _rounded(num_tokens: int) -> int:
    """To three significant bits, but for small numbers: sizes that take about as long are one."""
    step = 1 << max(0, num_tokens.bit_length() - 4)
    return -(-num_tokens // step) * step


@dataclass(slots=True)
class _Share:
    """How often drafts of a kind were right."""

    prior: float
    mean: float

    def add(self, outcome: float) -> None:
        """1 if it was right, 0 if not."""
        self.mean += NEWEST_DRAFT * (outcome - self.mean)

    def forgive(self) -> None:
        self.mean += FORGIVENESS * (self.prior - self.mean)


class Acceptance:
    """How often a token of a draft is right, if those before it were: by source and evidence, and by sequence."""

    def __init__(self) -> None:
        self._shares = {
            (source, evidence): _Share(prior, prior)
            for source in DraftSource
            for evidence in range(MAX_EVIDENCE + 1)
            for prior in [0.9 if source is DraftSource.PREDICTION else 0.4 + 0.03 * evidence]
        }
        # Of the next token of a source that takes time to guess, before its evidence is known.
        self._next_shares = {source: _Share(prior=0.7, mean=0.7) for source in DraftSource}

    def chances(self, draft: Draft, own: "OwnAcceptance") -> list[float]:
        """Of each token of the draft, how likely it is that it and all before it are right."""
        shares = (self._shares[draft.source, evidence].mean for evidence in draft.evidence)
        return list(accumulate((own.adapt(share) for share in shares), mul))

    def expect_next(self, source: DraftSource, own: "OwnAcceptance") -> float:
        """How likely its next token is right, if those before it are."""
        return own.adapt(self._next_shares[source].mean)

    def add_guess(self, source: DraftSource, evidence: int) -> None:
        """It has guessed one more token."""
        self._next_shares[source].add(self._shares[source, evidence].mean)

    def add(self, draft: Draft, own: "OwnAcceptance", num_tried: int, num_right: int) -> None:
        """So many tokens of the draft were tried. Those behind the first wrong one say nothing."""
        outcomes = [True] * num_right + [False] * (num_right < num_tried)
        for evidence, was_right in zip(draft.evidence, outcomes, strict=False):
            share = self._shares[draft.source, evidence]
            own.add(was_right, share.mean)
            share.add(was_right)

    def forgive(self, draft: Draft, own: "OwnAcceptance") -> None:
        """The draft was left out."""
        self._shares[draft.source, draft.evidence[0]].forgive()
        own.forgive()

    def forgive_source(self, source: DraftSource, own: "OwnAcceptance") -> None:
        """It was not asked for a draft."""
        self._next_shares[source].forgive()
        own.forgive()


@dataclass(slots=True)
class OwnAcceptance:
    """Of one sequence: how many tokens of its drafts were right, and of how many that was expected.

    The newest count most.
    """

    num_right: float = 0.0
    num_expected: float = 0.0

    def adapt(self, share: float) -> float:
        """What is expected of this sequence where `share` is expected of all."""
        factor = (self.num_right + TRUSTED_AFTER) / (self.num_expected + TRUSTED_AFTER)
        return min(MAX_CHANCE, share * factor)

    def add(self, was_right: bool, share: float) -> None:
        """Of a token of which `share` was expected."""
        self.num_right = self.num_right * (1 - NEWEST_DRAFT) + was_right
        self.num_expected = self.num_expected * (1 - NEWEST_DRAFT) + share

    def forgive(self) -> None:
        self.num_right *= 1 - FORGIVENESS
        self.num_expected *= 1 - FORGIVENESS


def may_pay(times: StepTimes, num_tokens: int, most: int) -> bool:
    """Whether guesses would pay if all of them were right: if not, none need be made. most: how many there can be.

    The step without them is what all others are compared with, so as long as its time is not known none are made.
    """
    if not times.knows(num_tokens):
        return False
    rate = num_tokens / times.expect(num_tokens)
    numbers = [num for power in range(MAX_STEP_DRAFTS.bit_length()) if (num := 1 << power) <= most]
    return any((num_tokens + num) / times.expect(num_tokens + num) > rate for num in numbers)


def choose_counts(times: StepTimes, num_tokens: int, chances: Sequence[Sequence[float]]) -> list[int]:
    """How many tokens of each draft to compute beside the `num_tokens` that a step computes anyway.

    chances: of each draft, those that Acceptance gives.
    """
    gains = sorted(((chance, i) for i, draft in enumerate(chances) for chance in draft), key=lambda gain: -gain[0])
    del gains[MAX_STEP_DRAFTS:]
    best_rate, best_num, made = MIN_GAIN * num_tokens / times.expect(num_tokens), 0, float(num_tokens)
    for num, (gain, _) in enumerate(gains, start=1):
        made += gain
        rate = made / times.expect(num_tokens + num)
        if rate > best_rate:
            best_rate, best_num = rate, num
    counts = [0] * len(chances)
    for _, i in gains[:best_num]:
        counts[i] += 1
    return counts


@dataclass(frozen=True, slots=True)
class Prospect:
    """What more guesses of a model may bring for a row."""

    # That all guesses so far are right, and that each further one is, if those before it are.
    chance: float
    next_chance: float
    # How many more there may be.
    room: int

    @property
    def gains(self) -> list[float]:
        """What each of them is expected to add to the tokens that the step makes."""
        return [self.chance * self.next_chance**place for place in range(1, self.room + 1)]

    def worth(self, step_s: float, pass_s: float) -> float:
        """As many tokens that cost nothing would be worth the same. step_s: of the step; pass_s: of each pass."""
        made = accumulate(self.gains, initial=1.0)
        return max(num * step_s / (step_s + num_passes * pass_s) for num_passes, num in enumerate(made)) - 1


def may_guess_more(
    times: StepTimes,
    pass_times: StepTimes,
    num_tokens: int,
    made: float,
    prospects: Sequence[Prospect],
    *,
    least_rate: float = 0.0,
) -> bool:
    """Whether one more pass of a model that guesses pays, or several: each of them takes time too.

    num_tokens: that the step computes as it stands, and made: those that it is expected to make. least_rate: tokens a
    second that the step must come to at least.
    """
    best_rate, seconds = max(least_rate, made / times.expect(num_tokens)), 0.0
    for gains in zip_longest(*(prospect.gains for prospect in prospects), fillvalue=None):
        of_pass = [gain for gain in gains if gain is not None]
        made += sum(of_pass)
        num_tokens += len(of_pass)
        seconds += pass_times.expect(len(of_pass))
        if made / (times.expect(num_tokens) + seconds) > best_rate:
            return True
    return False
