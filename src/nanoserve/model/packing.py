"""Weights in the layout that a CPU's matrix units want, made once at load.

A product works on tiles of the weight. Given a plain weight, the library rearranges it in every call, which for a few
rows costs as much as the product itself; given a packed one it does not. On AVX2 in float32, a 1024 x 3072 layer runs
3.4 times as fast at 4 rows, 2.7 times at 8, 1.4 times at 32, and 0.85 times at 2048; on AVX-512 in bfloat16 it is 1.6
times at 1 and at 8 rows, 1.3 times at 32, and equal at 1024. Packing changes no number and no result beyond rounding.
Only plain linear layers are packed; experts that are 3-D tensors, and GPT-2's transposed layers, stay as they are.
"""

import platform

import torch
from torch import Tensor, nn

# Rows that the layout is chosen for. On AVX-512 this one is as good at 1 and 1024 rows as those made for them.
TYPICAL_ROWS = 32


class PackedLinear(nn.Module):
    """Stands for an nn.Linear whose weight is packed. Takes [..., in_features], gives [..., out_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # Opaque: it has the shape of the weight, and no storage that torch can read.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.nanoserve.packed_linear(x, self._packed, self.bias, self.out_features)
            return compiled
        return _multiply(x, self._packed, self.bias, self.out_features)


# oneDNN's product as an operator of our own: torch.compile would put its own in place, which wants its weight as a
# constant.
_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor"
)


@torch.library.impl(_library, "packed_linear", "CPU")
@torch.library.impl(_library, "packed_linear", "MkldnnCPU")
def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, _out_features: int) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@torch.library.impl(_library, "packed_linear", "Meta")
def _shape_of_product(x: Tensor, _packed: Tensor, _bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing helps: float32 on x86, and bfloat16 on a CPU whose oneDNN computes in it."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and platform.machine() in ("x86_64", "AMD64")


def pack_linears(model: nn.Module) -> None:
    """Replace every plain linear layer; originals are released one by one, so that memory stays flat.

    A weight that the embedding shares stays there too.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
