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

needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU's oneDNN has no bfloat16"
)


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (1, 300)])
def test_a_packed_layer_gives_what_the_plain_one_gives(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).bfloat16()
    x = torch.randn(*shape, 192).bfloat16()[..., ::2]  # not contiguous
    with torch.inference_mode():
        expected, out = linear(x), PackedLinear(linear)(x)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


@needs_bfloat16
def test_every_plain_linear_is_packed_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.Embedding(3, 8))).bfloat16()
    pack_linears(model)
    assert [type(m).__name__ for m in model.modules() if not list(m.children())] == [
        "PackedLinear",
        "PackedLinear",
        "Embedding",
    ]


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_models_are_those_of_plain_ones(family, tmp_path, monkeypatch):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    options = ModelOptions(path=str(tmp_path), dtype="bfloat16", device="cpu")
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
    assert float(error.median()) < 0.05


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float16)]
)
def test_other_devices_and_dtypes_are_left_alone(device, dtype):
    assert not can_pack(torch.device(device), dtype)
