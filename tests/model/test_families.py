"""The logits of every position equal those of transformers' own model, whatever the steps, for every family."""

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import BLOCK_SIZE, Feeder
from torch import Tensor

from nanoserve.config import ModelOptions
from nanoserve.model import paged_model
from nanoserve.model.attend import attend
from nanoserve.model.attention import AttentionCall, attend_reference
from nanoserve.model.loader import LoadedModel, load_model

# Of the largest logit. float32 keeps 1e-7 of a number; sums in another order over two layers lose about a digit.
TOLERANCE = 1e-5

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(LONGEST)] for _ in range(4)]
NUM_SHARED_BLOCKS = 5
PROMPTS[3][: NUM_SHARED_BLOCKS * BLOCK_SIZE] = PROMPTS[0][: NUM_SHARED_BLOCKS * BLOCK_SIZE]


@functools.cache
def family_model(family: str) -> tuple[LoadedModel, Tensor]:
    """The model as we load it, and transformers' logits for PROMPTS: [4, LONGEST, vocab_size]."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = save_tiny_model(family, Path(folder))
        ours = load_model(ModelOptions(path=folder, dtype="float32", device="cpu"))
    with torch.inference_mode():
        return ours, theirs(torch.tensor(PROMPTS)).logits


def assert_equal_logits(feeder: Feeder, row: int, want: Tensor, start: int = 0) -> None:
    got = feeder.all_logits(row, start, LONGEST)
    error = (got - want[start:]).abs().max() / want.abs().max()
    assert error < TOLERANCE, f"row {row}: {error:.1e} of the largest logit"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_one_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, want = family_model(family)
    feeder = Feeder(model, LONGEST, monkeypatch)
    feeder.step(PROMPTS, {0: LONGEST})
    assert_equal_logits(feeder, 0, want[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_of_seven_then_token_by_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, want = family_model(family)
    feeder = Feeder(model, LONGEST, monkeypatch)
    for _ in range(5):
        feeder.step(PROMPTS, {1: 7})
    while feeder.num_fed[1] < LONGEST:
        feeder.step(PROMPTS, {1: 1})
    assert_equal_logits(feeder, 1, want[1])


@pytest.mark.parametrize("implementation", [attend, attend_reference])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_mix_chunks_and_single_tokens(
    family: str, implementation: Callable[[AttentionCall], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, want = family_model(family)
    monkeypatch.setattr(paged_model, "attend", implementation)
    feeder = Feeder(model, LONGEST, monkeypatch)
    rng = random.Random(family)
    feeder.step(PROMPTS, {0: NUM_SHARED_BLOCKS * BLOCK_SIZE, 1: 2})
    feeder.share_prefix(3, 0, NUM_SHARED_BLOCKS)
    num_mixed = 0
    while left := {row: LONGEST - fed for row, fed in enumerate(feeder.num_fed[:4]) if fed < LONGEST}:
        counts = {row: min(rng.choice([0, 1, 1, 1, 2, 9]), left[row]) for row in left}
        counts = {row: count for row, count in counts.items() if count}
        num_mixed += 1 in counts.values() and max(counts.values()) > 1
        if counts:
            feeder.step(PROMPTS, counts)
    assert num_mixed > 3
    for row in range(3):
        assert_equal_logits(feeder, row, want[row])
    assert_equal_logits(feeder, 3, want[3], start=NUM_SHARED_BLOCKS * BLOCK_SIZE)
