"""What adapters add in a step of many, against one model at a time, each with its own adapter."""

import random
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import Feeder
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoserve.adapter.weights import AdapterWeights, Pair
from nanoserve.config import ModelOptions
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.weights import LINEAR

TOLERANCE = 1e-5
RNG = random.Random(0)
NUM_ROWS = 6
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(LONGEST)] for _ in range(NUM_ROWS)]
# Row -> the rank of its adapter. None = it has none.
RANKS = [4, None, 16, 3, 64, None]


def random_weights(targets: dict[str, tuple[int, int]], rank: int, seed: int) -> AdapterWeights:
    """Changes all of them."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(width: int, size: float) -> Tensor:
        return torch.randn(rank, width, generator=generator) * size / width**0.5

    # What is added is about as large as what is there.
    pairs = {path: Pair(matrix(i, 1.0), matrix(o, 2.0 * (o / rank) ** 0.5)) for path, (i, o) in targets.items()}
    return AdapterWeights(str(seed), pairs)


def logits_with(model: PreTrainedModel, weights: AdapterWeights | None, token_ids: list[int]) -> Tensor:
    """Of transformers' model: [len(token_ids), vocab_size]."""
    hooks = []
    for path, pair in weights.pairs.items() if weights is not None else ():
        layer = model.get_submodule(path)
        assert isinstance(layer, LINEAR)
        hooks.append(layer.register_forward_hook(lambda _, args, out, pair=pair: out + args[0] @ pair.a.t() @ pair.b))
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def load(folder: Path) -> LoadedModel:
    return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


def adapted(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Feeder, list[Tensor]]:
    """One adapter for each row that has a rank, in a slot of its own, and what the logits of each row must be."""
    theirs = save_tiny_model(family, folder)
    ours = load(folder)
    slots = AdapterSlots(ours, NUM_ROWS)
    feeder = Feeder(ours, LONGEST, monkeypatch, NUM_ROWS, slots)
    all_weights: list[AdapterWeights | None] = []
    for row, rank in enumerate(RANKS):
        weights = None if rank is None else random_weights(dict(slots.targets), rank, row)
        all_weights.append(weights)
        if weights is not None:
            feeder.adapter_slots[row] = NUM_ROWS - 1 - row
            slots.write(NUM_ROWS - 1 - row, weights)
    return feeder, [logits_with(theirs, all_weights[row], PROMPTS[row]) for row in range(NUM_ROWS)]


def assert_equal(feeder: Feeder, row: int, want: Tensor, start: int = 0) -> None:
    got = feeder.all_logits(row, start, feeder.num_fed[row])
    error = (got - want[start : feeder.num_fed[row]]).abs().max() / want.abs().max()
    assert error < TOLERANCE, (row, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_mixed_step_are_those_of_each_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeder, want = adapted(family, tmp_path, monkeypatch)
    assert (want[0] - want[1]).abs().max() > 0.1
    # Whole prompts and chunks, then single tokens of all beside a chunk.
    feeder.step(PROMPTS, {0: LONGEST - 3, 1: LONGEST - 3, 2: 20, 3: 7, 4: 30})
    feeder.step(PROMPTS, {0: 1, 1: 1, 2: 1, 3: LONGEST - 9, 5: 4})
    feeder.step(PROMPTS, dict.fromkeys(range(NUM_ROWS), 1))
    feeder.step(PROMPTS, {0: 1, 1: 1, 3: 1, 4: 3, 5: 3})
    for row in range(NUM_ROWS):
        assert_equal(feeder, row, want[row])


def test_every_linear_layer_of_a_plain_model_can_be_changed(tmp_path: Path) -> None:
    theirs = save_tiny_model("llama", tmp_path)
    linear = {path: (m.in_features, m.out_features) for path, m in theirs.named_modules() if isinstance(m, nn.Linear)}
    assert AdapterSlots(load(tmp_path), 1).targets == linear
    assert "lm_head" in linear


def test_experts_cannot_be_changed_and_what_all_tokens_pass_can(tmp_path: Path) -> None:
    save_tiny_model("deepseek-v3", tmp_path)
    names = {path.split(".", 4)[-1] for path in AdapterSlots(load(tmp_path), 1).targets if ".layers.1." in path}
    assert {"kv_b_proj", "shared_experts.up_proj"} <= names
    assert not any(".experts." in name for name in names)
