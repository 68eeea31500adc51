"""The model side of a step: from a StepPlan to a StepResult.

    plan ─▶ pack ─▶ trunk (attention over the paged cache) ─▶ check ─┬─▶ head ─▶ sampler ─▶ tokens
                                                                    └─▶ head ─▶ log-probabilities of the prompt

Tokens of all sequences are packed into one row without padding. The head, whose output is as wide as the vocabulary,
runs only for positions whose logits are wanted.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import torch
from torch import Tensor

from nanoserve.constraint.matcher import Masks
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.draft_model import DraftModel
from nanoserve.model.grammars import Grammars
from nanoserve.model.loader import LoadedModel
from nanoserve.model.paged_model import PagedModel
from nanoserve.model.rows import Rows
from nanoserve.model.sampler import Place, Sampler, token_logprobs
from nanoserve.model.threads import ComputeThreads
from nanoserve.request import Failure, Logprobs, ScheduledSequence, SequenceResult, StepPlan, StepResult
from nanoserve.speculation.speculator import Speculator

# Logits of prompt positions are made for so many numbers at a time, to bound memory.
PROMPT_LOGITS_AT_ONCE = 1 << 24


@dataclass(slots=True)
class _Part:
    """What a step computes of one sequence."""

    sequence: ScheduledSequence
    # Guessed tokens, behind those that are known.
    draft: list[int]
    # Place of its first token in the step.
    first: int = 0
    is_corrupt: bool = False

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_known + len(self.draft)

    @property
    def end(self) -> int:
        """The position behind the known tokens."""
        return self.sequence.start + self.sequence.num_known


class ModelRunner:
    """One model on one device, and another that drafts for it if there is one. Implements Executor. Engine thread only.

    Owns each row's tokens and block table on the device, and through the models and the sampler what is kept of a row
    besides. A step that raises leaves rows as they were.
    """

    # A CPU has nothing to do between two steps that could hide a plan.
    depth = 1

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedKVCache,
        sampler: Sampler,
        max_num_seqs: int,
        max_num_tokens: int,
        max_context_tokens: int,
        *,
        threads: ComputeThreads | None = None,
        speculator: Speculator | None = None,
        draft: tuple[LoadedModel, PagedKVCache] | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        """max_num_tokens: of a step. threads: None where no threads of a CPU compute. speculator: None = no drafts.

        draft: the model that drafts, of the same vocabulary, and its cache, of as many blocks. It knows no adapters:
        what it guesses for one is wrong more often, and found wrong. adapters: None = the model has none.
        """
        self._rows = Rows(max_num_seqs, max_context_tokens, cache.block_size, model.device)
        self.model = PagedModel(
            model,
            cache,
            self._rows,
            max_num_tokens=max_num_tokens,
            max_context_tokens=max_context_tokens,
            threads=threads,
            adapters=adapters,
        )
        self.draft_model = None
        if draft is not None:
            self.draft_model = DraftModel(
                *draft, self._rows, sampler, model.facts.vocab_size, max_context_tokens, threads=threads
            )
        self._sampler = sampler
        self._grammars = Grammars(model.facts.vocab_size)
        self._threads = threads
        self._speculator = speculator
        self._plans: deque[StepPlan] = deque()
        # Row -> alternatives to report for prompt tokens.
        self._num_prompt_top = [0] * max_num_seqs

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Compute the oldest plan's step."""
        sequences = self._plans.popleft().sequences
        self._rows.take(sequences)
        if self.draft_model is not None:
            self.draft_model.take(sequences)
        for s in sequences:
            if s.admission is not None:
                self._grammars.admit(s.row, s.admission)
        parts = self._parts(sequences)
        start_s = time.perf_counter()
        self._grammars.begin({part.sequence.row: part.draft for part in parts if part.sequence.samples})
        try:
            hidden = self.model.run(
                [part.sequence.row for part in parts],
                [part.sequence.start for part in parts],
                [part.num_tokens for part in parts],
            )
        except Exception:
            # Some layers have written, perhaps NaN, into blocks that others get next.
            self.model.cache.clear(self.model.facts.slots)
            raise
        self._clear_corrupt(parts, hidden)
        self._commit_rows(sequences)
        drawn = self._draw(parts, hidden)
        results = {part.sequence.row: self._result(part, drawn.get(part.sequence.row), hidden) for part in parts}
        if self._speculator is not None:
            num_drafted = len(hidden) - sum(s.num_known for s in sequences)
            self._speculator.add_step(len(hidden), num_drafted, time.perf_counter() - start_s)
        return StepResult(
            [results[s.row] for s in sequences], num_threads=self._threads.count if self._threads else None
        )

    def close(self) -> None:
        self._grammars.close()
        for model in self.models:
            model.cache.close()

    @property
    def models(self) -> list[PagedModel]:
        """The one that is served first."""
        return [self.model, *([self.draft_model.model] if self.draft_model is not None else [])]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Before any request."""
        for model in self.models:
            model.warm_up()

    def _commit_rows(self, sequences: list[ScheduledSequence]) -> None:
        """The trunk has run: rows that changed hands are the new sequence's."""
        self._rows.commit(sequences)
        for s in sequences:
            if s.admission is None:
                continue
            self._num_prompt_top[s.row] = s.admission.params.prompt_logprobs or 0
            self._sampler.admit(s.row, s.admission)
            if self._speculator is not None:
                self._speculator.admit(s.row, s.admission)
            if self.draft_model is not None:
                self.draft_model.admit(s.row, len(s.admission.token_ids), num_cached_tokens=s.start)

    # ------------------------------------------------------------------------------------------------- the step

    def _parts(self, sequences: list[ScheduledSequence]) -> list[_Part]:
        """What the step computes, fewer tokens first, then by adapter; drafts stand in the rows of tokens too."""
        drafts: dict[int, list[int]] = {}
        if self._speculator is not None and any(s.num_drafts for s in sequences):
            places = {s.row: s.num_drafts for s in sequences}
            num_known = sum(s.num_known for s in sequences)
            drafts = self._speculator.choose(places, num_known, self.draft_model, self._grammars)
            # A caller's prediction, or another model's draft, may hold what this model does not know.
            is_known = range(self.model.vocab_size).__contains__
            drafts = {row: list(takewhile(is_known, draft)) for row, draft in drafts.items()}
        parts = sorted((_Part(s, drafts.get(s.row, [])) for s in sequences), key=self._order)
        first = 0
        for part in parts:
            part.first = first
            first += part.num_tokens
        self._rows.write([(part.sequence.row, part.end, part.draft) for part in parts])
        return parts

    def _order(self, part: _Part) -> tuple[int, int]:
        """Tokens of neighbouring slots are computed together."""
        slot = self._rows.adapter_slots[part.sequence.row]
        return part.num_tokens, -1 if slot is None else slot

    def _clear_corrupt(self, parts: list[_Part], hidden: Tensor) -> None:
        """Look for NaN and infinity in this step; what they wrote into the cache is zeroed.

        A key or value that is not finite makes its own token's hidden state so too, because a token sees itself. Where
        that is a draft, it is dropped with those behind it.
        """
        bad = ~hidden.isfinite().all(-1)  # [num_tokens]
        if not bad.any():
            return
        is_lost = bad.clone()
        for i in set(self.model.facts.sequence_of[bad].tolist()):
            part = parts[i]
            num_good = int(bad[part.first : part.first + part.num_tokens].int().argmax())
            if num_good < part.sequence.num_known:
                part.is_corrupt = True
                is_lost[part.first : part.first + part.num_tokens] = True
            else:
                part.draft = part.draft[: num_good - part.sequence.num_known]
        self.model.cache.clear(self.model.facts.slots[is_lost])

    # ----------------------------------------------------------------------------------------------- the results

    def _draw(self, parts: list[_Part], hidden: Tensor) -> dict[int, SequenceResult]:
        """Draw behind the known tokens of every sequence that samples, and behind each of its drafts: by row.

        A token's noise is that of its position, so it is the one that would be drawn without drafts, as long as what
        stands before it is.
        """
        members = [part for part in parts if part.sequence.samples and not part.is_corrupt]
        if not members:
            return {}
        masks = self._grammars.masks()
        places = [
            Place(row, part.end + i, tuple(part.draft[:i]), masks[row][i] if row in masks else None)
            for part in members
            for row in [part.sequence.row]
            for i in range(len(part.draft) + 1)
        ]
        lines = [part.first + part.sequence.num_known - 1 + i for part in members for i in range(len(part.draft) + 1)]
        logits = self.model.logits(hidden[torch.tensor(lines, device=hidden.device)], [place.row for place in places])
        outcomes = iter(self._sampler.sample(places, logits))
        drawn = {}
        for part in members:
            result = _keep_right(part.draft, list(islice(outcomes, len(part.draft) + 1)))
            drawn[part.sequence.row] = self._learn(part, self._follow(part, result, masks))
        self._sampler.keep({row: result.token_ids for row, result in drawn.items()})
        self._rows.write((part.sequence.row, part.end, drawn[part.sequence.row].token_ids) for part in members)
        return drawn

    def _follow(self, part: _Part, result: SequenceResult, masks: Mapping[int, Masks]) -> SequenceResult:
        """Tell the grammar what was drawn. Returns the result up to where the output is complete."""
        row = part.sequence.row
        if row not in masks:
            return result
        if result.failure is Failure.NO_TOKEN and not masks[row][0].any():
            return SequenceResult(failure=Failure.CONSTRAINT)
        token_ids = self._grammars.keep(row, result.token_ids)
        if result.token_ids and not token_ids:
            return SequenceResult(failure=Failure.CONSTRAINT)
        may_end, must_end = self._grammars.state(row)
        logprobs = result.logprobs[: len(token_ids)]
        return replace(result, token_ids=token_ids, logprobs=logprobs, satisfies=may_end, is_over=must_end)

    def _learn(self, part: _Part, result: SequenceResult) -> SequenceResult:
        """Tell the drafters what was drawn. Returns the result with what there is to say of drafts."""
        if self._speculator is None or not result.token_ids:
            return result
        row, num_drafted = part.sequence.row, len(part.draft)
        source = self._speculator.learn(row, num_drafted, min(num_drafted, len(result.token_ids) - 1))
        self._speculator.extend(row, result.token_ids)
        if self.draft_model is not None:
            self.draft_model.extend(row, result.token_ids)
        return replace(
            result,
            num_drafted=num_drafted,
            draft_source=source,
            num_drafts_next=self._speculator.num_places(row),
        )

    def _result(self, part: _Part, drawn: SequenceResult | None, hidden: Tensor) -> SequenceResult:
        """What was drawn, if the sequence samples, and its prompt's log-probabilities."""
        sequence = part.sequence
        if part.is_corrupt:
            return SequenceResult(failure=Failure.CORRUPT)
        result = SequenceResult() if drawn is None else drawn
        if not sequence.num_prompt_logprobs or result.failure is not None:
            return result
        first = sequence.start + 1
        targets = self._rows.tokens[sequence.row, first : first + sequence.num_prompt_logprobs].tolist()
        size = max(1, PROMPT_LOGITS_AT_ONCE // self.model.vocab_size)
        parts: list[Logprobs] = []
        for i in range(0, len(targets), size):
            some = targets[i : i + size]
            rows = [sequence.row] * len(some)
            logits = self.model.logits(hidden[part.first + i : part.first + i + len(some)], rows)
            if not logits.isfinite().all():
                return SequenceResult(failure=Failure.CORRUPT)
            parts.append(token_logprobs(logits, some, self._num_prompt_top[sequence.row]))
        return replace(result, prompt_logprobs=Logprobs.join(parts))


def _keep_right(draft: list[int], outcomes: list[SequenceResult]) -> SequenceResult:
    """From what was drawn before and behind each draft: the tokens that were guessed right, and one more."""
    num_right = 0
    while num_right < len(draft) and outcomes[num_right].token_ids == [draft[num_right]]:
        num_right += 1
    # Where the last one failed, it fails again in the next step, which has no drafts before it.
    kept = outcomes[: num_right + 1] if outcomes[num_right].token_ids else outcomes[: max(1, num_right)]
    if len(kept) == 1:
        return kept[0]
    logprobs = [outcome.logprobs for outcome in kept if isinstance(outcome.logprobs, Logprobs)]
    return SequenceResult(
        [token_id for outcome in kept for token_id in outcome.token_ids], Logprobs.join(logprobs) if logprobs else ()
    )
