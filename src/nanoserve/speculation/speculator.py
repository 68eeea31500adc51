"""The drafts of all rows: who makes them, how many of them a step computes, and what came of them."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nanoserve.request import Admission, DraftSource
from nanoserve.speculation.drafter import MAX_EVIDENCE, Draft, Drafter, Guide, ModelDrafter
from nanoserve.speculation.ngram import NgramDrafter
from nanoserve.speculation.payoff import (
    MAX_STEP_DRAFTS,
    MIN_GAIN,
    Acceptance,
    OwnAcceptance,
    Prospect,
    StepTimes,
    choose_counts,
    may_guess_more,
    may_pay,
)
from nanoserve.speculation.prediction import PredictionDrafter
from nanoserve.speculation.suffix import SuffixCounts, SuffixDrafter

DEFAULT_MAX_DRAFT_TOKENS = 16
# By the choice of --speculate: what the server itself does. A caller's own prediction is used in any case.
SOURCES: dict[str, tuple[DraftSource, ...]] = {
    "auto": (DraftSource.NGRAM, DraftSource.SUFFIX, DraftSource.DRAFT_MODEL),
    "ngram": (DraftSource.NGRAM,),
    "suffix": (DraftSource.SUFFIX,),
    "draft": (DraftSource.DRAFT_MODEL,),
    "off": (),
}


def read_choice(choice: str, *, has_draft_model: bool) -> tuple[tuple[DraftSource, ...], int]:
    """What --speculate says as WAYS or WAYS:K: how the server guesses, and the most tokens of a sequence at once."""
    ways, _, limit = choice.partition(":")
    sources = (source for source in SOURCES[ways] if has_draft_model or source is not DraftSource.DRAFT_MODEL)
    return tuple(sources), int(limit or DEFAULT_MAX_DRAFT_TOKENS)


@dataclass(slots=True)
class _Row:
    """What drafting needs of the sequence in a row."""

    max_draft_tokens: int
    drafters: list[Drafter]
    # It has a grammar, which may force tokens.
    is_guided: bool
    acceptance: OwnAcceptance = field(default_factory=OwnAcceptance)
    # The last that was computed.
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
        # Of passes of the model that drafts.
        self._pass_times = StepTimes()
        # Guesses could pay in a step like the last.
        self._may_pay = False

    @classmethod
    def of(cls, choice: str, *, has_draft_model: bool = False) -> "Speculator":
        """choice: that of --speculate."""
        return cls(*read_choice(choice, has_draft_model=has_draft_model))

    def admit(self, row: int, admission: Admission) -> None:
        """A sequence takes the row."""
        wanted = admission.params.max_draft_tokens
        limit = self._max_draft_tokens if wanted is None else min(wanted, self._max_draft_tokens)
        drafters = self._drafters(admission) if limit else []
        self._rows[row] = _Row(limit, drafters, is_guided=admission.grammar is not None)

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
        can_guess = state.drafters or state.is_guided or DraftSource.DRAFT_MODEL in self._sources
        return state.max_draft_tokens if self._may_pay and can_guess else 0

    def choose(
        self,
        places: Mapping[int, int],
        num_tokens: int,
        model: ModelDrafter | None = None,
        guide: Guide | None = None,
    ) -> dict[int, list[int]]:
        """What to compute of the rows' drafts: row -> tokens, for rows that have any.

        places: row -> how many tokens the step has room for. num_tokens: that it computes anyway. model: the one that
        drafts, if there is one. guide: of rows that have a grammar.
        """
        if not may_pay(self._times, num_tokens, most=sum(places.values())):
            return {}
        drafts = {
            row: draft
            for row, room in places.items()
            if room and (draft := self._propose(row, room, guide)) is not None
        }
        if model is not None:
            guesses = self._guess_by_model(model, places, num_tokens, drafts)
            drafts |= {row: cut for row, draft in guesses.items() if (cut := self._cut(guide, row, draft)) is not None}
        chances = [self._chances(row, draft) for row, draft in drafts.items()]
        chosen = {}
        for (row, draft), count in zip(drafts.items(), choose_counts(self._times, num_tokens, chances), strict=True):
            state = self._rows[row]
            if count:
                state.draft = draft
                chosen[row] = draft.token_ids[:count]
            else:
                self._acceptance.forgive(draft, state.acceptance)
        return chosen

    def _propose(self, row: int, count: int, guide: Guide | None) -> Draft | None:
        """Of what the drafters say, and what must be, what promises the most tokens."""
        state = self._rows[row]
        drafts = [draft for drafter in state.drafters if (draft := drafter.propose(count)) is not None]
        if state.is_guided and guide is not None:
            drafts = [cut for draft in drafts if (cut := self._cut(guide, row, draft)) is not None]
            if forced := guide.forced(row)[:count]:
                drafts.append(Draft(DraftSource.GRAMMAR, forced, [MAX_EVIDENCE] * len(forced)))
        return max(drafts, key=lambda draft: sum(self._chances(row, draft)), default=None)

    def _cut(self, guide: Guide | None, row: int, draft: Draft) -> Draft | None:
        """As much of the draft as the row's grammar allows, if it has one; None if nothing is left."""
        if guide is None or not self._rows[row].is_guided:
            return draft
        token_ids = guide.cut(row, draft.token_ids)
        return replace(draft, token_ids=token_ids, evidence=draft.evidence[: len(token_ids)]) if token_ids else None

    def _chances(self, row: int, draft: Draft) -> list[float]:
        return self._acceptance.chances(draft, self._rows[row].acceptance)

    def _guess_by_model(
        self, model: ModelDrafter, places: Mapping[int, int], num_tokens: int, others: Mapping[int, Draft]
    ) -> dict[int, Draft]:
        """Drafts of the model for rows where it is worth more than other drafters are, pass by pass while that pays.

        others: their drafts, which cost nothing.
        """
        most = MAX_STEP_DRAFTS // len(places)
        rooms = {row: min(room, model.room(row), most) for row, room in places.items()}
        empty = Draft(DraftSource.DRAFT_MODEL, [], [])
        promised = {row: sum(self._chances(row, draft)) for row, draft in others.items()}
        step_s, pass_s = self._times.expect(num_tokens), self._pass_times.expect(len(places))
        drafts = {
            row: replace(empty, token_ids=[], evidence=[])
            for row, room in rooms.items()
            if self._prospect(row, empty, room).worth(step_s, pass_s) > promised.get(row, 0)
        }
        made = num_tokens + sum(promise for row, promise in promised.items() if row not in drafts)
        num_tokens += sum(len(draft.token_ids) for row, draft in others.items() if row not in drafts)
        least_rate = MIN_GAIN * made / self._times.expect(num_tokens)
        open_rows = list(drafts)
        while open_rows:
            prospects = [self._prospect(row, drafts[row], rooms[row]) for row in open_rows]
            if not may_guess_more(self._times, self._pass_times, num_tokens, made, prospects, least_rate=least_rate):
                break
            guesses = self._pass(model, {row: drafts[row].token_ids for row in open_rows})
            for row, (token_id, evidence) in guesses.items():
                drafts[row].token_ids.append(token_id)
                drafts[row].evidence.append(evidence)
                self._acceptance.add_guess(DraftSource.DRAFT_MODEL, evidence)
                made += self._chances(row, drafts[row])[-1]
            num_tokens += len(guesses)
            open_rows = [row for row in guesses if len(drafts[row].token_ids) < rooms[row]]
        for row, draft in drafts.items():
            if not draft.token_ids:
                self._acceptance.forgive_source(draft.source, self._rows[row].acceptance)
        return {row: d for row, d in drafts.items() if sum(self._chances(row, d)) > promised.get(row, 0)}

    def _prospect(self, row: int, draft: Draft, room: int) -> Prospect:
        chance = self._chances(row, draft)[-1] if draft.token_ids else 1.0
        next_chance = self._acceptance.expect_next(draft.source, self._rows[row].acceptance)
        return Prospect(chance, next_chance, room - len(draft.token_ids))

    def _pass(self, model: ModelDrafter, drafts: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, int]]:
        start_s = time.perf_counter()
        guesses, num_computed = model.guess(drafts)
        self._pass_times.add(num_computed, time.perf_counter() - start_s)
        return guesses

    def learn(self, row: int, num_tried: int, num_right: int) -> DraftSource | None:
        """Of the row's draft so many tokens were computed, and the first so many were right. Returns its source."""
        if not num_tried:
            return None
        state = self._rows[row]
        assert state.draft is not None
        self._acceptance.add(state.draft, state.acceptance, num_tried, num_right)
        return state.draft.source

    def add_step(self, num_tokens: int, num_drafted: int, seconds: float) -> None:
        """A step computed so many tokens, drafts included."""
        self._times.add(num_tokens, seconds)
        self._may_pay = may_pay(self._times, num_tokens - num_drafted, most=self._max_draft_tokens)
