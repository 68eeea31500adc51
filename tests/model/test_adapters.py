"""What adapters add in a step of many, against one model at a time, each with its own adapter."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from adapted import NUM_ROWS, PROMPTS, TOLERANCE, Adapted, choose_kind, error_of_compiled, random_weights
from families import FAMILIES, save_tiny_model
from torch import nn

from nanoserve.adapter.weights import AdapterWeights, Pair
from nanoserve.config import ModelOptions
from nanoserve.model import adapter_products
from nanoserve.model.adapter_products import SHORT, add_few, make_groups
from nanoserve.model.adapters import AdapterSlots, _Stack
from nanoserve.model.loader import LoadedModel, load_model

CPU = torch.device("cpu")
# Stack of one layer of 3 inputs and 5 outputs.
EMPTY = _Stack(torch.empty(0, 3), torch.empty(0, 5), (None,) * 4)


def load(folder: Path) -> LoadedModel:
    return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


# ------------------------------------------------------------------------------------------------ the logits


@pytest.mark.parametrize("few", [None, add_few], ids=["masked", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_mixed_step_are_those_of_each_alone(
    family: str, few: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_products, "kernels", {} if few is None else {torch.float32: few})
    adapted = Adapted(family, tmp_path, monkeypatch)
    assert (adapted.want[0] - adapted.want[1]).abs().max() > 0.1
    assert adapted.largest_error() < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "packed", "narrow"])
def test_every_kind_of_weight_has_adapters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kind(kind, monkeypatch)
    adapted = Adapted("qwen3", tmp_path, monkeypatch, hidden_size=64, intermediate_size=128)
    if kind != "plain" and not any(kind in type(m).__name__.lower() for m in adapted.model.model.modules()):
        pytest.skip("not on this CPU")
    assert not any(isinstance(module, nn.Linear) for module in adapted.model.model.modules())
    assert adapted.largest_error() < TOLERANCE


@pytest.mark.parametrize(
    "kind", ["narrow", pytest.param("packed", marks=pytest.mark.soak), pytest.param("plain", marks=pytest.mark.soak)]
)
def test_compiled_parts_have_adapters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: tests of missing compilers leave traces in what torch keeps of this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(error_of_compiled, tmp_path, kind).result() < TOLERANCE


def test_numbers_too_large_in_one_adapter_change_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = Adapted("llama", tmp_path, monkeypatch)
    huge = random_weights(dict(adapted.slots.targets), 4, 0)
    pairs = {path: Pair(pair.a * 1e30, pair.b * 1e30) for path, pair in huge.pairs.items()}
    adapted.slots.write(NUM_ROWS - 1, AdapterWeights("huge", pairs))  # that of row 0
    adapted.feeder.step(PROMPTS, dict.fromkeys(range(NUM_ROWS), 9))
    result = adapted.feeder.step(PROMPTS, dict.fromkeys(range(NUM_ROWS), 1), samples=True)
    assert [s.failure is not None for s in result.sequences] == [True] + [False] * (NUM_ROWS - 1)
    for row in range(1, NUM_ROWS):
        assert adapted._error(row) < TOLERANCE


# -------------------------------------------------------------------------------------------------- the layers


def test_every_linear_layer_of_a_plain_model_can_be_changed(tmp_path: Path) -> None:
    theirs = save_tiny_model("llama", tmp_path)
    linear = {path: (m.in_features, m.out_features) for path, m in theirs.named_modules() if isinstance(m, nn.Linear)}
    assert AdapterSlots(load(tmp_path), 1).targets == linear
    assert "lm_head" in linear


def test_experts_cannot_be_changed_and_what_all_tokens_pass_can(tmp_path: Path) -> None:
    save_tiny_model("deepseek-v3", tmp_path)
    names = {path.split(".", 3)[-1] for path in AdapterSlots(load(tmp_path), 1).targets if ".layers.1." in path}
    assert {"self_attn.kv_b_proj", "mlp.shared_experts.up_proj"} <= names
    assert not any(".experts." in name for name in names)


def test_a_layer_of_gpt2_is_a_linear_one(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path)
    assert AdapterSlots(load(tmp_path), 1).targets["transformer.h.0.attn.c_attn"] == (32, 96)


def test_a_written_slot_takes_the_place_of_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a step like the one before, of one token."""
    adapted = Adapted("llama", tmp_path, monkeypatch)
    targets, slot = dict(adapted.slots.targets), adapted.feeder.adapter_slots[0]

    def logits() -> torch.Tensor:
        for _ in range(2):
            adapted.feeder.step(PROMPTS, {0: 1})
        return adapted.feeder.logits[0, adapted.feeder.num_fed[0] - 1]

    before = logits()
    adapted.feeder.num_fed[0] = 0
    assert torch.equal(logits(), before)
    adapted.slots.write(slot, random_weights(targets, 9, seed=99))
    adapted.feeder.num_fed[0] = 0
    assert not torch.allclose(logits(), before)


# --------------------------------------------------------------------------------------------------- the stacks


def pair(rank: int, value: float) -> Pair:
    return Pair(torch.full((rank, 3), value), torch.full((rank, 5), value))


def held(stack: _Stack) -> list[tuple[int, float] | None]:
    """Of each slot, the rank and the number that it is full of."""
    found = []
    for place in stack.places:
        a, b = (None, None) if place is None else (stack.a[slice(*place)], stack.b[slice(*place)])
        found.append(None if a is None else (len(a), a[0, 0].item()))
        assert a is None or (a.eq(a[0, 0]).all() and b.eq(a[0, 0]).all())
    return found


def test_a_stack_is_as_large_as_the_ranks_in_it() -> None:
    stack = EMPTY.with_pair(2, pair(4, 1.0)).with_pair(0, pair(64, 2.0)).with_pair(3, None)
    assert held(stack) == [(64, 2.0), None, (4, 1.0), None]
    assert len(stack.a) == len(stack.b) == 68


def test_a_gap_is_used_again_and_steps_that_run_keep_what_they_have() -> None:
    stack = EMPTY.with_pair(0, pair(8, 1.0)).with_pair(1, pair(8, 2.0)).with_pair(2, pair(8, 3.0))
    # Smaller, then two in the place of one; nothing moves.
    after = stack.with_pair(1, pair(2, 4.0)).with_pair(3, pair(6, 5.0))
    assert held(after) == [(8, 1.0), (2, 4.0), (8, 3.0), (6, 5.0)]
    assert after.a.data_ptr() == stack.a.data_ptr()
    # Larger than any gap: the others are copied, without gaps, and the old ones stay as they are.
    larger = after.with_pair(1, None).with_pair(0, pair(11, 6.0))
    assert held(larger) == [(11, 6.0), None, (8, 3.0), (6, 5.0)]
    assert len(larger.a) == 25
    assert held(after)[2:] == [(8, 3.0), (6, 5.0)]


def test_a_slot_of_the_same_rank_stays_where_it_is() -> None:
    stack = EMPTY.with_pair(0, pair(8, 1.0)).with_pair(1, pair(8, 2.0))
    assert stack.with_pair(0, pair(8, 3.0)).places == stack.places


# --------------------------------------------------------------------------------------------------- the groups


def shape(runs: list[tuple[int, int, tuple[int, int]]]) -> list[tuple[int, int, int, int]]:
    groups = make_groups(runs, CPU)
    return [(g.tokens.start, g.tokens.stop, g.columns.start, g.columns.stop) for g in groups]


def test_short_runs_are_computed_together_and_long_ones_alone() -> None:
    runs = [(1, 2, (16, 32)), (2, 3, (0, 16)), (3, 5, (40, 56)), (5, 5 + SHORT + 1, (0, 16))]
    assert shape(runs) == [(1, 5, 0, 56), (5, 5 + SHORT + 1, 0, 16)]


def test_nobody_is_padded_to_the_rank_of_another() -> None:
    assert shape([(0, 1, (0, 64)), (1, 2, (64, 68)), (2, 3, (70, 80))]) == [(0, 1, 0, 64), (1, 3, 64, 80)]


def test_columns_of_one_product_are_bounded() -> None:
    runs = [(i, i + 1, (16 * i, 16 * i + 16)) for i in range(32)]
    assert shape(runs) == [(0, 16, 0, 256), (16, 32, 256, 512)]


def test_both_ways_give_the_same() -> None:
    """Tokens without an adapter between them, several pieces, and ranks of part of a piece."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*size, generator=generator) for size in ((9, 7), (90, 7), (90, 11)))
    a[0] = torch.inf  # nobody's
    runs = [(0, 1, (3, 23)), (2, 4, (23, 55)), (4, 5, (60, 83))]
    (group,) = make_groups(runs, CPU)
    want = torch.zeros(9, 11)
    for first, end, (low, high) in runs:
        want[first:end] = x[first:end] @ a[low:high].t() @ b[low:high]
    torch.testing.assert_close(group.add(x, a, b), want[:5])
    own = sum(add_few(x[:5], a, b, *piece) for piece in group.pieces)
    torch.testing.assert_close(own, want[:5])
