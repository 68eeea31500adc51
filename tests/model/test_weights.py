"""Every plain projection is a ServedLinear, whatever its weight is, and there is one place behind all of them."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier

import pytest
import torch
from addition import addition, forward_with_addition, make_with_addition
from families import LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import Feeder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoserve.config import ModelOptions
from nanoserve.model import compiled, cpu, layout, weights
from nanoserve.model.compiled import watch_calls
from nanoserve.model.layout import decide_layout
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.weights import Kind, PlainWeight, ServedLinear, apply_layout

CPU = torch.device("cpu")
PROMPT = [3 + 7 * i % (VOCAB_SIZE - 3) for i in range(LONGEST)]


class _PlaysPart(PlainWeight):
    """A kind of weight that says how it is made."""

    threads: list[int]
    both_are_there: Barrier

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.threads.append(torch.get_num_threads())
        self.both_are_there.wait()


def test_each_weight_is_made_by_one_thread_and_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "usable_cpus", lambda: (2, "of 2 CPUs"))
    _PlaysPart.threads, _PlaysPart.both_are_there = [], Barrier(2, timeout=30)
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    apply_layout(model, {str(i): Kind(_PlaysPart, torch.float32) for i in range(4)})
    assert _PlaysPart.threads == [1, 1, 1, 1]


def test_threads_to_come_compute_with_as_many_as_before() -> None:
    def num_threads() -> int:
        with ThreadPoolExecutor(1) as other:
            return other.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)])
        apply_layout(model, decide_layout(model, CPU, torch.float32, torch.float32))
        assert (torch.get_num_threads(), num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_what_is_tied_stays_tied_and_a_model_may_look_at_it() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 8), "head": nn.Linear(8, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    before = model["head"].weight
    apply_layout(model, {name: Kind(PlainWeight, torch.float32) for name in model})
    assert model["embedding"].weight is model["head"].weight
    assert torch.equal(model["head"].weight, before)
    assert len(list(model.parameters())) == 1


@pytest.mark.parametrize(("family", "want"), [("llama", ()), ("gpt2", ("Conv1D",)), ("mixtral", ("MixtralExperts",))])
def test_what_no_kind_is_for_is_named(family: str, want: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    named = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu")).facts.left_out
    assert set(want) <= set(named)
    assert bool(want) == bool(named)


# ------------------------------------------------------------------------------ something behind every projection


def tiny(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, LoadedModel]:
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


@pytest.mark.parametrize("kind", ["plain", "packed", "narrow"])
def test_something_can_be_added_behind_every_projection(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tiny(tmp_path, kind, monkeypatch)
    if kind != "plain" and not any(kind in type(m).__name__.lower() for m in ours.model.modules()):
        pytest.skip("not on this CPU")
    assert not any(isinstance(module, nn.Linear) for module in ours.model.modules())
    assert largest_error(ours, theirs, monkeypatch) < 1e-5


# A soak, because tests of missing compilers, which run before it, leave traces in what torch keeps of this process.
@pytest.mark.soak
@pytest.mark.filterwarnings("default")  # what loads compiled parts imports what is deprecated
@pytest.mark.parametrize("kind", ["narrow", "packed", "plain"])
def test_what_is_added_is_compiled_without_a_break(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs, ours = tiny(tmp_path, kind, monkeypatch)
    trials, _ = watch_calls(ours)
    parts = [(name, part) for trial in trials for name, part in trial.parts.items()]
    job = compiled.Job(tmp_path, False, ours.dtype, ours.layout, 4, {name: part.call for name, part in parts})
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(make_with_addition, tmp_path, job).result()
    for name, part in parts:
        function = compiled._load(tmp_path, name)
        assert function is not None
        with torch.inference_mode():
            assert compiled._use_layer([part], function)
    assert largest_error(ours, theirs, monkeypatch) < 1e-5
