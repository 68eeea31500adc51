"""Feeds token sequences to a ModelRunner in steps, as a scheduler would, and collects the logits of every position."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model import runner as runner_module
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.loader import LoadedModel
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Place
from nanoserve.request import (
    Admission,
    Logprobs,
    SamplingParams,
    ScheduledSequence,
    SequenceResult,
    StepPlan,
    StepResult,
)

BLOCK_SIZE = 4


def admission(token_ids: list[int], adapter_slot: int | None = None, **params: Any) -> Admission:
    sampling = SamplingParams(**params)
    return Admission(sampling, 0, token_ids, len(token_ids), frozenset(), adapter_slot=adapter_slot)


class GreedySampler:
    """The sampler's interface; takes the likeliest token and keeps what it was asked."""

    def __init__(self) -> None:
        self.admitted: dict[int, Admission] = {}
        self.calls: list[tuple[list[int], list[int], Tensor]] = []

    def admit(self, row: int, admission: Admission) -> None:
        self.admitted[row] = admission

    def sample(self, places: list[Place], logits: Tensor) -> list[SequenceResult]:
        self.calls.append(([place.row for place in places], [place.position for place in places], logits))
        return [SequenceResult([token]) for token in logits.argmax(-1).tolist()]

    def keep(self, drawn: Mapping[int, list[int]]) -> None:
        pass


def execute(runner: ModelRunner, *sequences: ScheduledSequence) -> list[SequenceResult]:
    """A step of these sequences."""
    runner.submit(StepPlan(list(sequences)))
    return runner.collect().sequences


class Feeder:
    """Block tables are cut from a shuffled pool, so that no two blocks of a sequence are neighbours for long."""

    def __init__(
        self,
        model: LoadedModel,
        max_context_tokens: int,
        monkeypatch: pytest.MonkeyPatch,
        num_rows: int = 8,
        adapters: AdapterSlots | None = None,
    ) -> None:
        blocks_each = -(-max_context_tokens // BLOCK_SIZE)
        num_blocks = num_rows * blocks_each
        self.cache = PagedKVCache(model.kv_specs, num_blocks, BLOCK_SIZE, model.device)
        self.sampler = GreedySampler()
        self.runner = ModelRunner(
            *(model, self.cache, self.sampler, num_rows, num_rows * max_context_tokens),  # type: ignore[arg-type]
            max_context_tokens=max_context_tokens,
            adapters=adapters,
        )
        # Row -> the slot of its adapter, if it has one.
        self.adapter_slots: dict[int, int] = {}
        torch.set_num_threads(1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.block_tables = [order[i * blocks_each : (i + 1) * blocks_each] for i in range(num_rows)]
        self.num_fed = [0] * num_rows
        # (row, position) -> logits: [vocab_size]
        self.logits: dict[tuple[int, int], Tensor] = {}
        # Whose logits are recorded next.
        self._places: Iterator[tuple[int, int]] = iter(())
        monkeypatch.setattr(runner_module, "token_logprobs", self._record)
        watched = self.runner._result

        def watch(part: Any, *others: Any) -> SequenceResult:
            sequence = part.sequence
            self._places = ((sequence.row, sequence.start + i) for i in range(sequence.num_known))
            return watched(part, *others)

        monkeypatch.setattr(self.runner, "_result", watch)

    def _record(self, logits: Tensor, _targets: list[int], _num_top: int) -> Logprobs:
        for line in logits:
            self.logits[next(self._places)] = line
        return Logprobs(1, array("q"), array("f"), array("q"))

    def share_prefix(self, row: int, other: int, num_blocks: int) -> None:
        """Row `row` begins with blocks that `other` has filled."""
        self.block_tables[row][:num_blocks] = self.block_tables[other][:num_blocks]
        self.num_fed[row] = num_blocks * BLOCK_SIZE

    def step(self, sequences: Sequence[list[int]], counts: dict[int, int], samples: bool = False) -> StepResult:
        """Feed the next counts[row] tokens of sequences[row]; few tokens come first."""
        scheduled = []
        for row, count in sorted(counts.items(), key=lambda item: item[1]):
            start, tokens = self.num_fed[row], sequences[row]
            end = start + count
            is_new = not any(r == row for r, _ in self.logits)
            had = 0 if is_new else -(-start // BLOCK_SIZE)
            scheduled.append(
                ScheduledSequence(
                    row=row,
                    start=start,
                    num_known=count,
                    new_block_ids=self.block_tables[row][had : -(-end // BLOCK_SIZE)],
                    samples=samples,
                    admission=admission(tokens, self.adapter_slots.get(row), prompt_logprobs=0) if is_new else None,
                    num_prompt_logprobs=count,
                )
            )
            self.num_fed[row] = end
        self.runner.submit(StepPlan(scheduled))
        return self.runner.collect()

    def all_logits(self, row: int, start: int, end: int) -> Tensor:
        """[end - start, vocab_size]"""
        return torch.stack([self.logits[row, position] for position in range(start, end)])
