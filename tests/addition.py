"""Something small behind every projection, as an adapter will be. A file of its own, for the process that compiles."""

from pathlib import Path

import pytest
import torch
from families import LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import Feeder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoserve.config import ModelOptions
from nanoserve.model import compile_worker, compiled, cpu, layout
from nanoserve.model.compiled import watch_calls
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.weights import ServedLinear

PROMPT = [3 + 7 * i % (VOCAB_SIZE - 3) for i in range(LONGEST)]

_library = torch.library.Library("nanoserve_tests", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("addition(Tensor x, Tensor y) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "addition", "CPU")
def addition(x: Tensor, y: Tensor) -> Tensor:
    """Of a projection's input and output, as an adapter's two small products."""
    return (x.float().mean(-1, keepdim=True) * torch.linspace(-0.2, 0.2, y.shape[-1])).to(y.dtype)


@torch.library.impl(_library, "addition", "Meta")
def _shape_of_addition(_x: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


_forward = ServedLinear.forward


def forward_with_addition(self: ServedLinear, x: Tensor) -> Tensor:
    """In the place of ServedLinear.forward."""
    y = _forward(self, x)
    return y + torch.ops.nanoserve_tests.addition(x, y)  # type: ignore[no-any-return]


def with_addition(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, LoadedModel]:
    """transformers' model, and ours with an addition, whose weights are of one kind."""
    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)
    monkeypatch.setattr(layout, "can_narrow", lambda *_: kind == "narrow")
    if kind == "plain":
        monkeypatch.setattr(layout, "can_pack", lambda *_: False)
    stored = save_tiny_model("qwen3", folder, hidden_size=64, intermediate_size=128)
    stored.to(torch.bfloat16).save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, y: y + addition(args[0], y))
    monkeypatch.setattr(ServedLinear, "forward", forward_with_addition)
    return theirs, load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


def largest_error(ours: LoadedModel, theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> float:
    feeder = Feeder(ours, LONGEST, monkeypatch)
    feeder.step([PROMPT], {0: LONGEST - 2})
    for _ in range(2):
        feeder.step([PROMPT], {0: 1})
    with torch.inference_mode():
        want = theirs(torch.tensor([PROMPT])).logits[0]
    return float((feeder.all_logits(0, 0, LONGEST) - want).abs().max() / want.abs().max())


def error_of_compiled(folder: Path, kind: str) -> float:
    """The same of a model whose layers are compiled, which this process does and uses, as two of the product do."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs, ours = with_addition(folder, kind, monkeypatch)
        trials, _ = watch_calls(ours)
        parts = [(name, part) for trial in trials for name, part in trial.parts.items()]
        job = compiled.Job(folder, False, ours.dtype, ours.layout, 4, {name: part.call for name, part in parts})
        with torch.inference_mode():
            for name, part in parts:
                compile_worker._make(folder, name, job)
                function = compiled._load(folder, name)
                assert function is not None, (folder / f"{name}.error").read_text()
                assert compiled._use_layer([part], function)
        return largest_error(ours, theirs, monkeypatch)
