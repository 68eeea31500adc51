"""Every plain projection is a ServedLinear, whatever its weight is, and there is one place behind all of them."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier

import pytest
import torch
from addition import error_of_compiled, largest_error, with_addition
from families import save_tiny_model
from torch import Tensor, nn

from nanoserve.config import ModelOptions
from nanoserve.model import weights
from nanoserve.model.layout import decide_layout
from nanoserve.model.loader import load_model
from nanoserve.model.weights import Kind, PlainWeight, apply_layout

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("family", "want"), [("llama", ()), ("gpt2", ()), ("mixtral", ("MixtralExperts",))])
def test_what_no_kind_is_for_is_named(family: str, want: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    named = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu")).facts.left_out
    assert set(want) <= set(named)
    assert bool(want) == bool(named)


# ------------------------------------------------------------------------------ something behind every projection


@pytest.mark.parametrize("kind", ["plain", "packed", "narrow"])
def test_something_can_be_added_behind_every_projection(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = with_addition(tmp_path, kind, monkeypatch)
    if kind != "plain" and not any(kind in type(m).__name__.lower() for m in ours.model.modules()):
        pytest.skip("not on this CPU")
    assert not any(isinstance(module, nn.Linear) for module in ours.model.modules())
    assert largest_error(ours, theirs, monkeypatch) < 1e-5


@pytest.mark.parametrize(
    "kind", ["narrow", pytest.param("packed", marks=pytest.mark.soak), pytest.param("plain", marks=pytest.mark.soak)]
)
def test_what_is_added_is_compiled_without_a_break(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: tests of missing compilers leave traces in what torch keeps of this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(error_of_compiled, tmp_path, kind).result() < 1e-5
