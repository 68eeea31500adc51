"""Feeds token sequences to a ModelRunner in steps, as a scheduler would, and collects the logits of every position."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model import runner as runner_module
from nanoserve.model.loader import LoadedModel
from nanoserve.model.runner import ModelRunner
from nanoserve.request import Admission, SamplingParams, ScheduledSequence, SequenceResult, StepPlan, StepResult

BLOCK_SIZE = 4


def admission(token_ids: list[int], **params: Any) -> Admission:
    return Admission(SamplingParams(**params), 0, token_ids, len(token_ids), frozenset())


class GreedySampler:
    """The sampler's interface; takes the likeliest token and keeps what it was asked."""

    def __init__(self) -> None:
        self.admitted: dict[int, Admission] = {}
        self.calls: list[tuple[list[int], list[int], Tensor]] = []

    def admit(self, row: int, admission: Admission) -> None:
        self.admitted[row] = admission

    def sample(self, rows: list[int], positions: list[int], logits: Tensor) -> list[SequenceResult]:
        self.calls.append((rows, positions, logits))
        return [SequenceResult([token]) for token in logits.argmax(-1).tolist()]


class Feeder:
    """Block tables are cut from a shuffled pool, so that no two blocks of a sequence are neighbours for long."""

    def __init__(
        self, model: LoadedModel, max_context_tokens: int, monkeypatch: pytest.MonkeyPatch, num_rows: int = 8
    ) -> None:
        blocks_each = -(-max_context_tokens // BLOCK_SIZE)
        num_blocks = num_rows * blocks_each
        self.cache = PagedKVCache(model.kv_specs, num_blocks, BLOCK_SIZE, model.device)
        self.sampler = GreedySampler()
        self.runner = ModelRunner(model, self.cache, self.sampler, num_rows, max_context_tokens)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.block_tables = [order[i * blocks_each : (i + 1) * blocks_each] for i in range(num_rows)]
        self.num_fed = [0] * num_rows
        # (row, position) -> logits: [vocab_size]
        self.logits: dict[tuple[int, int], Tensor] = {}
        monkeypatch.setattr(runner_module, "token_logprobs", self._record)

    def _record(self, logits: Tensor, targets: list[int], _num_top: int) -> list[Any]:
        for row_and_position, line in zip(targets, logits, strict=True):
            self.logits[divmod(row_and_position, 1000)] = line
        return []

    def share_prefix(self, row: int, other: int, num_blocks: int) -> None:
        """Row `row` begins with blocks that `other` has filled."""
        self.block_tables[row][:num_blocks] = self.block_tables[other][:num_blocks]
        self.num_fed[row] = num_blocks * BLOCK_SIZE

    def step(self, sequences: Sequence[list[int]], counts: dict[int, int], samples: bool = False) -> StepResult:
        """Feed the next counts[row] tokens of sequences[row]; single tokens come first."""
        scheduled = []
        for row, count in sorted(counts.items(), key=lambda item: item[1] > 1):
            start, tokens = self.num_fed[row], sequences[row]
            end = start + count
            is_new = not any(r == row for r, _ in self.logits)
            had = 0 if is_new else -(-start // BLOCK_SIZE)
            scheduled.append(
                ScheduledSequence(
                    row=row,
                    start=start,
                    token_ids=tokens[start:end],
                    new_block_ids=self.block_tables[row][had : -(-end // BLOCK_SIZE)],
                    samples=samples,
                    admission=admission(tokens, prompt_logprobs=0) if is_new else None,
                    prompt_targets=[row * 1000 + position for position in range(start, end)],
                )
            )
            self.num_fed[row] = end
        return self.runner.execute(StepPlan(scheduled))

    def all_logits(self, row: int, start: int, end: int) -> Tensor:
        """[end - start, vocab_size]"""
        return torch.stack([self.logits[row, position] for position in range(start, end)])
