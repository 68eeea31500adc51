"""Packed weights: the same numbers, for every architecture."""

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, tiny_model
from feeder import Feeder
from torch import nn

from nanoserve.config import ModelOptions
from nanoserve.model import layout, packing
from nanoserve.model.layout import decide_layout
from nanoserve.model.loader import load_model
from nanoserve.model.packing import PackedWeight, _as_pairs, multiply_pairs
from nanoserve.model.torch_internals import can_pack
from nanoserve.model.weights import ServedEmbedding, ServedLinear, apply_layout


def packed_layer(linear):
    return ServedLinear(PackedWeight(linear.weight.detach()), linear.bias)


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
        expected, out = linear(x), packed_layer(linear)(x)
    assert out.shape == expected.shape
    tolerance, _ = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not pack bfloat16")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (1, 2), (1, 3)])
def test_few_rows_are_multiplied_from_the_packed_memory(bias, shape, monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(96, 192, bias=bias, dtype=torch.bfloat16)
    packed = packed_layer(linear)
    if packed.matrix.pairs is None:
        pytest.skip("oneDNN has another layout here")
    used = []

    def multiply(x, pairs):
        used.append(len(x))
        return multiply_pairs(x, pairs)

    monkeypatch.setattr(packing, "kernels", {1: multiply, 2: multiply})
    x = torch.randn(*shape, 192).to(torch.bfloat16)[..., ::2]
    with torch.inference_mode():
        expected, out = linear(x), packed(x)
    num_rows = x.shape[:-1].numel()
    assert used == ([num_rows] if num_rows <= 2 else [])
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


def test_the_layout_for_few_rows_is_not_taken_on_trust():
    weight = torch.randn(128, 96).to(torch.bfloat16)
    pairs = weight.view(torch.int32).view(2, 64, 48).transpose(1, 2).contiguous()
    want = torch.ones(1, 96) @ weight.float().t()
    torch.testing.assert_close(multiply_pairs(torch.ones(1, 48, 2), pairs), want)
    shapes = [(40, 96), (128, 95)]  # rows that fill no tile, and a width without pairs
    for num_rows, width in shapes:
        assert _as_pairs(weight, torch.zeros(num_rows, width, dtype=torch.bfloat16)) is None
    assert _as_pairs(weight, torch.zeros(128, 96)) is None


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not pack bfloat16")
@pytest.mark.parametrize("row", [0, 64, 127])
def test_memory_that_lies_otherwise_is_not_read(row):
    weight = torch.randn(128, 96).to(torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    other = weight.clone()
    other[row, 95] += 1
    assert _as_pairs(packed, other) is None


@every_dtype
def test_every_plain_linear_is_packed_and_nothing_else(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.Embedding(3, 8))).to(dtype)
    apply_layout(model, decide_layout(model, torch.device("cpu"), dtype, dtype))
    assert [type(m).__name__ for m in model.modules() if not list(m.children())] == [
        "PackedWeight",
        "PackedWeight",
        "Embedding",
    ]


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not pack bfloat16")
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2)])
def test_an_embedding_is_read_from_the_packed_head(shape):
    embedding = nn.Embedding(192, 96, dtype=torch.bfloat16)
    head = nn.Linear(96, 192, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    head = packed_layer(head)
    if not head.matrix.has_rows:
        pytest.skip("oneDNN has another layout here")
    packed = ServedEmbedding(head.matrix)
    ids = torch.randint(192, shape)
    assert torch.equal(packed(ids), embedding(ids))
    assert torch.equal(packed.weight, embedding.weight)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not pack bfloat16")
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_weight_that_embedding_and_head_share_is_there_once(is_tied, tmp_path):
    model = tiny_model("qwen3", vocab_size=128, tie_word_embeddings=is_tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelOptions(path=str(tmp_path), dtype="bfloat16", device="cpu"))
    if not loaded.model.get_output_embeddings().matrix.has_rows:
        pytest.skip("oneDNN has another layout here")
    embedding = loaded.model.get_input_embeddings()
    assert type(embedding) is (ServedEmbedding if is_tied else nn.Embedding)
    want = model.get_input_embeddings().weight
    assert torch.equal(embedding(torch.arange(128)), want)
    assert sum(p.shape == want.shape for p in loaded.model.parameters()) == (0 if is_tied else 1)


@every_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_models_are_those_of_plain_ones(family, dtype, tmp_path, monkeypatch):
    tiny_model(family).to(dtype).save_pretrained(tmp_path)
    options = ModelOptions(path=str(tmp_path), dtype=str(dtype).removeprefix("torch."), device="cpu")
    packed = load_model(options)
    monkeypatch.setattr(layout, "can_pack", lambda *_: False)
    plain = load_model(options)
    assert (packed.facts.num_parameters, packed.facts.vocab_size) == (
        plain.facts.num_parameters,
        plain.facts.vocab_size,
    )
    assert any(isinstance(m, PackedWeight) for m in packed.model.modules())
    assert not any(isinstance(m, PackedWeight) for m in plain.model.modules())
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
