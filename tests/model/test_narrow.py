"""Weights of 16 bits under float32 arithmetic: the same numbers, for every architecture, in half the memory."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, save_tiny_model, tiny_model
from feeder import Feeder
from torch import Tensor, nn

from nanoserve.config import ModelOptions
from nanoserve.model import cpu, layout, narrow
from nanoserve.model.layout import decide_layout
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.narrow import BLOCK_SIZES, TILE, NarrowWeight, can_narrow, multiply_blocks
from nanoserve.model.packing import PackedWeight
from nanoserve.model.weights import ServedLinear, apply_layout

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "kernels", {})
    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)


def use_kernels(dtype: torch.dtype) -> list[tuple[int, ...]]:
    """The formula in place of what would be compiled from it. Returns the shapes that it gets, as they come."""
    shapes: list[tuple[int, ...]] = []

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append((*x.shape,))
        assert x.is_contiguous()
        assert weight.is_contiguous()
        return multiply_blocks(x, weight)

    narrow.kernels.update({(dtype, size): multiply for size in BLOCK_SIZES})
    return shapes


def linear(dtype: torch.dtype, *, bias: bool = True) -> tuple[nn.Linear, ServedLinear]:
    """The same layer, plain and narrow."""
    torch.manual_seed(0)
    plain = nn.Linear(70, 3 * TILE, bias=bias).to(dtype).float()
    return plain, ServedLinear(NarrowWeight(plain.weight.detach().to(dtype)), plain.bias)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (3, 1), (1, 5), (2, 4), (1, 9), (1, 40), (1, 127), (1, 129), (4, 100)]
)
def test_a_narrow_layer_gives_what_the_plain_one_gives(
    shape: tuple[int, int], bias: bool, is_compiled: bool, dtype: torch.dtype
) -> None:
    plain, layer = linear(dtype, bias=bias)
    if is_compiled:
        use_kernels(dtype)
    x = torch.randn(*shape, 140)[..., ::2]  # not contiguous
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "want"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (3, (1, 4)),
        (4, (1, 4)),
        (5, (1, 6)),
        (6, (1, 6)),
        (8, (2, 4)),
        (9, (2, 6)),
        (32, (6, 6)),
    ],
)
def test_tokens_are_cut_into_blocks_with_little_padding(num_tokens: int, want: tuple[int, int]) -> None:
    _, layer = linear(torch.bfloat16)
    shapes = use_kernels(torch.bfloat16)
    layer(torch.randn(1, num_tokens, 70))
    assert shapes == [(*want, 70)]


def test_many_tokens_are_multiplied_by_torch_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, layer = linear(torch.bfloat16)
    shapes = use_kernels(torch.bfloat16)
    monkeypatch.setattr(narrow, "WIDENED_AT_ONCE", 70 * 25)  # the last part is smaller
    x = torch.randn(1, narrow.MAX_TOKENS + 1, 70)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    assert not shapes


def test_what_is_plain_and_fits_is_replaced_and_nothing_else() -> None:
    class Special(nn.Linear):
        pass

    with torch.no_grad():
        model = nn.ModuleDict(
            {
                "linear": nn.Linear(8, TILE),
                "odd": nn.Linear(8, TILE + 1),
                "special": Special(8, TILE),
                "exact": nn.Linear(8, TILE),
                "embedding": nn.Embedding(7, 8),
                "norm": nn.LayerNorm(8),
            }
        )
        model.to(torch.bfloat16).float()
        model["exact"].weight[3, 5] = 1 + 2**-20  # type: ignore[index,operator]
    layout = decide_layout(model, CPU, torch.float32, torch.bfloat16)
    assert {name: kind.make is NarrowWeight for name, kind in layout.items()} == {
        "linear": True,
        "odd": False,
        "exact": False,
        "embedding": True,
    }
    apply_layout(model, layout)
    assert {name: type(module).__name__ for name, module in model.items()} == {
        "linear": "ServedLinear",
        "odd": "ServedLinear",
        "special": "Special",
        "exact": "ServedLinear",
        "embedding": "ServedEmbedding",
        "norm": "LayerNorm",
    }


def test_what_is_tied_stays_tied_but_not_to_what_must_stay_wide() -> None:
    class Scaled(nn.Embedding):
        pass

    for kind, is_tied in ((nn.Embedding, True), (Scaled, False)):
        model = nn.ModuleDict({"embedding": kind(TILE, 8), "head": nn.Linear(8, TILE, bias=False)})
        model.to(torch.bfloat16).float()
        model["head"].weight = model["embedding"].weight
        apply_layout(model, decide_layout(model, CPU, torch.float32, torch.bfloat16))
        embedding, head = model["embedding"].weight, model["head"].weight
        assert isinstance(model["head"].matrix, NarrowWeight)
        assert (embedding is head) == is_tied
        assert embedding.dtype == (torch.bfloat16 if is_tied else torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_narrow_models_are_those_of_wide_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    options = ModelOptions(path=str(tmp_path), dtype="float32", device="cpu")
    small = load_model(options)
    monkeypatch.setattr(layout, "can_narrow", lambda *_: False)
    wide = load_model(options)
    assert (small.facts.num_parameters, small.facts.vocab_size) == (wide.facts.num_parameters, wide.facts.vocab_size)
    assert any(isinstance(m, NarrowWeight) for m in small.model.modules())
    assert not any(isinstance(m, NarrowWeight) for m in wide.model.modules())
    use_kernels(torch.bfloat16)
    logits = [logits_of(model, monkeypatch) for model in (small, wide)]
    error = (logits[0] - logits[1]).abs().amax(-1) / logits[1].abs().max()
    # The median: a rounding may send a token to another expert, which changes all that follows it.
    assert float(error.median()) < 1e-5


def logits_of(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of a prompt in chunks of many tokens and of one: [LONGEST, vocab_size]."""
    prompt = [[3 + 7 * i % (VOCAB_SIZE - 3) for i in range(LONGEST)]]
    feeder = Feeder(model, LONGEST, monkeypatch)
    feeder.step(prompt, {0: LONGEST - 1})
    feeder.step(prompt, {0: 1})
    return feeder.all_logits(0, 0, LONGEST)


@pytest.mark.parametrize(
    ("stored", "changes", "is_narrow"),
    [
        (torch.bfloat16, {}, True),
        (torch.float16, {}, True),
        (torch.float32, {}, False),
        (torch.bfloat16, {"compile": False}, False),
        (torch.bfloat16, {"dtype": "bfloat16"}, False),
    ],
)
def test_weights_stay_narrow_where_that_is_faster_and_exact(
    stored: torch.dtype, changes: dict[str, object], is_narrow: bool, tmp_path: Path
) -> None:
    save_tiny_model("qwen3", tmp_path).to(stored).save_pretrained(tmp_path)
    model = load_model(ModelOptions(**{"path": str(tmp_path), "dtype": "float32", "device": "cpu", **changes}))  # type: ignore[arg-type]
    assert any(isinstance(m, NarrowWeight) for m in model.model.modules()) == is_narrow
    dtypes = {kind.dtype for kind in model.layout.values() if kind.make is NarrowWeight}
    assert dtypes == ({stored} if is_narrow else set())


def test_without_a_compiler_weights_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu"))
    assert not model.is_compiled
    assert any(isinstance(m, PackedWeight) for m in model.model.modules())
    assert not any(isinstance(m, NarrowWeight) for m in model.model.modules())


@pytest.mark.parametrize(
    ("device", "dtype", "stored"),
    [
        ("cuda", torch.float32, torch.bfloat16),
        ("cpu", torch.bfloat16, torch.bfloat16),
        ("cpu", torch.float16, torch.float16),
        ("cpu", torch.float32, torch.float32),
    ],
)
def test_other_devices_and_dtypes_are_left_alone(device: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    assert can_narrow(CPU, torch.float32, torch.bfloat16)
    assert not can_narrow(torch.device(device), dtype, stored)
