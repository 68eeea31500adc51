"""The drafts of all rows: who makes them, how many of them a step computes, and what came of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nanoserve.request import Admission, DraftSource
from nanoserve.speculation.drafter import Draft, Drafter
from nanoserve.speculation.ngram import NgramDrafter
from nanoserve.speculation.payoff import Acceptance, OwnAcceptance, StepTimes, choose_counts, may_pay
from nanoserve.speculation.prediction import PredictionDrafter
from nanoserve.speculation.suffix import SuffixCounts, SuffixDrafter

DEFAULT_MAX_DRAFT_TOKENS = 16
# By the choice of --speculate: what the server itself does. A caller's own prediction is used in any case.
SOURCES: dict[str, tuple[DraftSource, ...]] = {
    "auto": (DraftSource.NGRAM, DraftSource.SUFFIX),
    "ngram": (DraftSource.NGRAM,),
    "suffix": (DraftSource.SUFFIX,),
    "off": (),
}


@dataclass(slots=True)
class _Row:
    """What drafting needs of the sequence in a row."""

    max_draft_tokens: int
    drafters: list[Drafter]
    acceptance: OwnAcceptance = field(default_factory=OwnAcceptance)
    # Of the step that runs.
    draft: Draft | None = None


class Speculator:
    """Drafts for the rows of one model. Engine thread only."""

    def __init__(self, sources: Iterable[DraftSource], max_draft_tokens: int) -> None:
        """max_draft_tokens: of a sequence in a step."""
        self._sources = frozenset(sources)
        self._max_draft_tokens = max_draft_tokens
        self._rows: dict[int, _Row] = {}
        self._suffixes = SuffixCounts()
        self._acceptance = Acceptance()
        self._times = StepTimes()
        # Guesses could pay in a step like the last.
        self._may_pay = False

    @classmethod
    def of(cls, choice: str) -> "Speculator":
        """choice: that of --speculate, WAYS or WAYS:K."""
        ways, _, limit = choice.partition(":")
        return cls(SOURCES[ways], int(limit or DEFAULT_MAX_DRAFT_TOKENS))

    def admit(self, row: int, admission: Admission) -> None:
        """A sequence takes the row."""
        wanted = admission.params.max_draft_tokens
        limit = self._max_draft_tokens if wanted is None else min(wanted, self._max_draft_tokens)
        self._rows[row] = _Row(limit, self._drafters(admission) if limit else [])

    def _drafters(self, admission: Admission) -> list[Drafter]:
        drafters: list[Drafter] = []
        if admission.params.prediction:
            assert not isinstance(admission.params.prediction, str), "a prediction is encoded before it is told"
            prediction = PredictionDrafter(admission.params.prediction)
            prediction.extend(admission.token_ids[admission.num_prompt_tokens :])
            drafters.append(prediction)
        if DraftSource.NGRAM in self._sources:
            drafters.append(NgramDrafter(admission.token_ids))
        if DraftSource.SUFFIX in self._sources:
            drafters.append(SuffixDrafter(self._suffixes, admission.owner, admission.token_ids))
        return drafters

    def extend(self, row: int, token_ids: Sequence[int]) -> None:
        """These tokens were drawn."""
        for drafter in self._rows[row].drafters:
            drafter.extend(token_ids)

    def num_places(self, row: int) -> int:
        """How many tokens may be guessed for the row in the next step. None where guesses could not pay: places take
        blocks."""
        state = self._rows[row]
        return state.max_draft_tokens if self._may_pay and state.drafters else 0

    def _propose(self, row: int, count: int) -> Draft | None:
        """Of what the drafters say, what promises the most tokens."""
        state = self._rows[row]
        drafts = [draft for drafter in state.drafters if (draft := drafter.propose(count)) is not None]
        state.draft = max(drafts, key=lambda draft: self._expected_tokens(state, draft), default=None)
        return state.draft

    def _chance(self, row: _Row, draft: Draft) -> float:
        return self._acceptance.expect(draft.source, draft.evidence, row.acceptance)

    def _expected_tokens(self, row: _Row, draft: Draft) -> float:
        chance = self._chance(row, draft)
        return sum(chance**place for place in range(1, len(draft.token_ids) + 1))

    def choose(self, places: Mapping[int, int], num_tokens: int) -> dict[int, list[int]]:
        """What to compute of the rows' drafts: row -> tokens, for rows that have any.

        places: row -> how many tokens the step has room for. num_tokens: that it computes anyway.
        """
        if not may_pay(self._times, num_tokens, most=sum(places.values())):
            return {}
        drafts = {
            row: draft for row, room in places.items() if room and (draft := self._propose(row, room)) is not None
        }
        chances = [(self._chance(self._rows[row], draft), len(draft.token_ids)) for row, draft in drafts.items()]
        chosen = {}
        for (row, draft), count in zip(drafts.items(), choose_counts(self._times, num_tokens, chances), strict=True):
            if count:
                chosen[row] = draft.token_ids[:count]
            else:
                self._acceptance.forgive(draft.source, draft.evidence, self._rows[row].acceptance)
        return chosen

    def learn(self, row: int, num_tried: int, num_right: int) -> DraftSource | None:
        """Of the row's draft so many tokens were computed, and the first so many were right. Returns its source."""
        state = self._rows[row]
        if state.draft is None or not num_tried:
            return None
        self._acceptance.add(state.draft.source, state.draft.evidence, state.acceptance, num_tried, num_right)
        return state.draft.source

    def add_step(self, num_tokens: int, num_drafted: int, seconds: float) -> None:
        """A step computed so many tokens, drafts included."""
        self._times.add(num_tokens, seconds)
        self._may_pay = may_pay(self._times, num_tokens - num_drafted, most=self._max_draft_tokens)
