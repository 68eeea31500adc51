"""A model with random adapters in its slots, and what transformers computes with each of them."""

import random
from pathlib import Path

import pytest
import torch
from families import LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import Feeder
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoserve.adapter.weights import AdapterWeights, Pair
from nanoserve.config import ModelOptions
from nanoserve.model import adapter_products, cpu, layout
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.compiled import BackgroundCompiler
from nanoserve.model.loader import load_model
from nanoserve.model.weights import LINEAR

# Of the largest logit.
TOLERANCE = 3e-5
NUM_ROWS = 6
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(LONGEST)] for _ in range(NUM_ROWS)]
# Of each row's adapter. None = it has none.
RANKS = (4, None, 16, 3, 64, 1)


def random_weights(targets: dict[str, tuple[int, int]], rank: int, seed: int) -> AdapterWeights:
    """Changes all of these layers, each about as much as what is there."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(width: int, size: float) -> Tensor:
        return torch.randn(rank, width, generator=generator) * size

    pairs = {path: Pair(matrix(i, i**-0.5), matrix(o, 2 * rank**-0.5)) for path, (i, o) in targets.items()}
    return AdapterWeights(str(seed), pairs)


def logits_with(model: PreTrainedModel, weights: AdapterWeights | None, token_ids: list[int]) -> Tensor:
    """Of transformers' model: [len(token_ids), vocab_size]."""
    hooks = []
    for path, pair in weights.pairs.items() if weights is not None else ():
        layer = model.get_submodule(path)
        assert isinstance(layer, LINEAR)
        add = lambda _, args, out, pair=pair: out + args[0] @ pair.a.t() @ pair.b  # noqa: E731
        hooks.append(layer.register_forward_hook(add))
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


class Adapted:
    """Rows 0 to 5, with an adapter of each rank of RANKS, and what their logits must be."""

    def __init__(self, family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **config_changes: object) -> None:
        theirs = save_tiny_model(family, folder, **config_changes)
        if config_changes:  # which make it large enough for other kinds of weights
            theirs.to(torch.bfloat16).save_pretrained(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))
        self.slots = AdapterSlots(self.model, NUM_ROWS)
        self.feeder = Feeder(self.model, LONGEST, monkeypatch, NUM_ROWS, self.slots)
        self._theirs = theirs
        self.want: list[Tensor] = []
        targets = dict(self.slots.targets)
        for row, rank in enumerate(RANKS):
            # One of them leaves half of the layers alone.
            some = dict(list(targets.items())[::2]) if row == 3 else targets
            weights = None if rank is None else random_weights(some, rank, row)
            self.want.append(logits_with(theirs, weights, PROMPTS[row]))
            if weights is not None:
                self.feeder.adapter_slots[row] = NUM_ROWS - 1 - row
                self.slots.write(NUM_ROWS - 1 - row, weights)

    def largest_error(self) -> float:
        """Of whole prompts and chunks, then of single tokens of all, of two and of one row."""
        self.feeder.step(PROMPTS, {0: LONGEST - 4, 1: LONGEST - 4, 2: 20, 3: 7, 4: 30, 5: 12})
        self.feeder.step(PROMPTS, {0: 1, 1: 1, 2: 1, 3: LONGEST - 10, 5: 4})
        self.feeder.step(PROMPTS, dict.fromkeys(range(NUM_ROWS), 1))
        self.feeder.step(PROMPTS, {0: 1, 2: 1, 4: 3, 5: 3})
        for row in (0, 1, 3, 2, 5, 4):
            self.feeder.step(PROMPTS, {row: 1})
        return max(self._error(row) for row in range(NUM_ROWS))

    def error_after_writing_anew(self) -> float:
        """Of a row whose slot is written between two steps of one token, both its own."""
        row = 2
        self.feeder.step(PROMPTS, {row: 1})
        weights = random_weights(dict(self.slots.targets), 7, seed=99)
        self.slots.write(self.feeder.adapter_slots[row], weights)
        self.want[row] = logits_with(self._theirs, weights, PROMPTS[row])
        self.feeder.logits, self.feeder.num_fed[row] = {}, 0
        for _ in range(3):
            self.feeder.step(PROMPTS, {row: 1})
        return self._error(row)

    def _error(self, row: int) -> float:
        num_fed = self.feeder.num_fed[row]
        got, want = self.feeder.all_logits(row, 0, num_fed), self.want[row]
        return float((got - want[:num_fed]).abs().max() / want.abs().max())


def choose_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights become plain, packed or narrow ones, where the CPU has these."""
    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)
    monkeypatch.setattr(layout, "can_narrow", lambda *_: kind == "narrow")
    if kind == "plain":
        monkeypatch.setattr(layout, "can_pack", lambda *_: False)


def error_of_compiled(folder: Path, kind: str) -> float:
    """Of a model whose parts are all compiled."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose_kind(kind, monkeypatch)
        adapted = Adapted("qwen3", folder, monkeypatch, hidden_size=64, intermediate_size=128)
        attention = adapted.feeder.runner.model.attention
        compiler = BackgroundCompiler(adapted.model, attention.compiled, block_size=4, trust_remote_code=False)
        compiler.start()
        compiler.wait()
        assert compiler._num_used == len(compiler._job.parts)
        assert sum("adapters" in name for name in compiler._job.parts) == (3 if kind == "narrow" else 2)
        assert adapter_products.kernels
        return max(adapted.largest_error(), adapted.error_after_writing_anew())
