"""Packed weights: the same numbers, for every architecture."""

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, tiny_model
from feeder import Feeder
from torch import nn

from nanoserve.config import ModelOptions
from nanoserve.model import loader
from nanoserve.model.loader import load_model
from nanoserve.model.packing import PackedLinear, can_pack, pack_linears


def packable(dtype):
    """A parameter that is skipped where this CPU does not pack the type."""
    can = can_pack(torch.device("cpu"), dtype)
    return pytest.param(dtype, marks=pytest.mark.skipif(not can, reason=f"this CPU does not pack {dtype}"))


# How far a packed and a plain layer may be apart, and whole models.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.02, 0.05)}
every_dtype = pytest.mark.parametrize("dtype", [packable(dtype) for dtype in TOLERANCES])


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (1, 300)])
def test_a_packed_layer_gives_what_the_plain_one_gives(bias, shape, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(*shape, 192).to(dtype)[..., ::2]  # not contiguous
    with torch.inference_mode():
        expected, out = linear(x), PackedLinear(linear)(x)
    assert out.shape == expected.shape
    tolerance, _ = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@every_dtype
def test_every_plain_linear_is_packed_and_nothing_else(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.Embedding(3, 8))).to(dtype)
    pack_linears(model)
    assert [type(m).__name__ for m in model.modules() if not list(m.children())] == [
        "PackedLinear",
        "PackedLinear",
        "Embedding",
    ]


@every_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_models_are_those_of_plain_ones(family, dtype, tmp_path, monkeypatch):
    tiny_model(family).to(dtype).save_pretrained(tmp_path)
    options = ModelOptions(path=str(tmp_path), dtype=str(dtype).removeprefix("torch."), device="cpu")
    packed = load_model(options)
    monkeypatch.setattr(loader, "can_pack", lambda *_: False)
    plain = load_model(options)
    assert (packed.num_parameters, packed.vocab_size) == (plain.num_parameters, plain.vocab_size)
    assert any(isinstance(m, PackedLinear) for m in packed.model.modules())
    assert not any(isinstance(m, PackedLinear) for m in plain.model.modules())
    prompt = [[3 + 7 * i % (VOCAB_SIZE - 3) for i in range(LONGEST)]]
    logits = []
    for model in (packed, plain):
        feeder = Feeder(model, LONGEST, monkeypatch)
        feeder.step(prompt, {0: LONGEST - 1})
        feeder.step(prompt, {0: 1})
        logits.append(feeder.all_logits(0, 0, LONGEST).float())
    error = (logits[0] - logits[1]).abs().amax(-1) / logits[1].abs().max()
    # The median: a rounding may send a token to another expert, which changes all that follows it.
    assert float(error.median()) < TOLERANCES[dtype][1]


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float16)]
)
def test_other_devices_and_dtypes_are_left_alone(device, dtype):
    assert not can_pack(torch.device(device), dtype)
