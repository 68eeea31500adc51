"""Weights in the layout that a CPU's matrix units want, made once at load.

A product works on tiles of the weight. Given a plain weight, the library rearranges it in every call, which for a few
rows costs as much as the product itself; given a packed one it does not. On AVX2 in float32, a 1024 x 3072 layer runs
3.4 times as fast at 4 rows, 2.7 times at 8, 1.4 times at 32, and 0.85 times at 2048; on AVX-512 in bfloat16 it is 1.6
times at 1 and at 8 rows, 1.3 times at 32, and equal at 1024. Packing changes no number and no result beyond rounding.

In bfloat16 one or two rows take oneDNN 1.5 times as long as the weight takes to come from memory. `multiply_pairs`
reads the same packed memory and, once compiled, takes no longer than that. It knows one layout, that of AVX-512:

    for 64 rows of the weight
      for two neighbours k, k + 1 in a row
        64 pairs (weight[0, k], weight[0, k + 1]), (weight[1, k], weight[1, k + 1]), ...    one 32-bit number each

Each layer is compared with it when it is packed. Where oneDNN has another layout, it multiplies alone.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from nanoserve.model.formulas import WIDTH, Formula, Place, random_numbers
from nanoserve.model.torch_internals import can_read_packed, multiply_packed, pack_weight, packed_memory
from nanoserve.model.weights import Weight

# Rows that the layout is chosen for. On AVX-512 this one is as good at 1 and 1024 rows as those made for them.
TYPICAL_ROWS = 32
# The weight's rows in a tile of the layout, and how many of them are summed side by side: a vector of AVX-512.
TILE = 64
LANES = 16
# Rows that are multiplied by multiply_pairs, one compilation for each.
FEW_ROWS = (1, 2)

# Number of rows -> multiply_pairs, compiled. Filled while the server runs, by compiled.py.
kernels: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}


class PackedWeight(Weight):
    """Packed by oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.packed = pack_weight(weight, TYPICAL_ROWS)
        # The same memory for multiply_pairs.
        self.pairs = _as_pairs(self.packed, weight)
        self.has_rows = self.pairs is not None
        self.form = None if self.pairs is None else "packed"

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return _multiply(x, self.packed, self.pairs, bias, self.out_features)
        out: Tensor
        if self.pairs is not None and x.shape[:-1].numel() == 1:  # a part of the compiled layer
            out = multiply_pairs(x.reshape(1, -1, 2), self.pairs).view(*x.shape[:-1], -1)
            return out if bias is None else out + bias
        out = torch.ops.nanoserve.packed_linear(x, self.packed, self.pairs, bias, self.out_features)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        if self.pairs is None:
            raise AttributeError("a packed weight of unknown layout cannot be read")
        pairs: Tensor = self.pairs[ids // TILE, :, ids % TILE]  # [..., in_features / 2]
        return pairs.view(torch.bfloat16)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.rows(torch.arange(self.out_features))

    def formulas(self) -> Iterator[tuple[str, Formula, Place]]:
        for num_rows in FEW_ROWS:
            yield f"{self.form}-{num_rows}", _formula(num_rows), (kernels, num_rows)


def _formula(num_rows: int) -> Formula:
    """For any size of the weight."""
    random = random_numbers()
    weight = random(3, WIDTH, TILE, 2, dtype=torch.bfloat16)
    trial = random(num_rows, WIDTH, 2, dtype=torch.bfloat16), weight.view(torch.int32).squeeze(3)
    return Formula(multiply_pairs, trial, ((1,), (0, 1)))


# oneDNN's product as an operator of our own: torch.compile would put its own in place, which wants its weight as a
# constant.
_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "packed_linear(Tensor x, Tensor packed, Tensor? pairs, Tensor? bias, int out_features) -> Tensor"
)


@torch.library.impl(_library, "packed_linear", "CPU")
@torch.library.impl(_library, "packed_linear", "MkldnnCPU")
def _multiply(x: Tensor, packed: Tensor, pairs: Tensor | None, bias: Tensor | None, _out_features: int) -> Tensor:
    num_rows = x.shape[:-1].numel()
    kernel = kernels.get(num_rows)
    if pairs is None or kernel is None:
        return multiply_packed(x, packed, bias)
    out: Tensor = kernel(x.reshape(num_rows, -1, 2), pairs).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


@torch.library.impl(_library, "packed_linear", "Meta")
def _shape_of_product(x: Tensor, _packed: Tensor, _pairs: object, _bias: object, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def multiply_pairs(x: Tensor, pairs: Tensor) -> Tensor:
    """x: [num_rows, width / 2, 2]; pairs: [num_tiles, width / 2, TILE], int32. Returns [num_rows, num_tiles * TILE].

    To be compiled for a fixed number of rows. As it stands, it makes large tensors.
    """
    # A number of bfloat16 is the upper half of one of float32.
    low = torch.split((pairs << 16).view(torch.float32), LANES, dim=2)
    high = torch.split((pairs & -0x10000).view(torch.float32), LANES, dim=2)
    outs = []
    for first, second in zip(*x.float().unbind(2), strict=True):  # of each row: [width / 2]
        sums = [(first[:, None] * a + second[:, None] * b).sum(1) for a, b in zip(low, high, strict=True)]
        outs.append(torch.cat(sums, dim=1).flatten())
    return torch.stack(outs).to(x.dtype)


# Tried once.
_can_read_packed = cache(can_read_packed)


def _as_pairs(packed: Tensor, weight: Tensor) -> Tensor | None:
    """The packed memory as multiply_pairs takes it, if it has that layout: [num_tiles, width / 2, TILE]."""
    num_rows, width = weight.shape
    if weight.dtype != torch.bfloat16 or num_rows % TILE or width % 2 or not _can_read_packed():
        return None
    memory = packed_memory(packed)
    if memory.nbytes != weight.nbytes:
        return None
    pairs = memory.view(-1, width // 2, TILE)
    tiles = weight.contiguous().view(torch.int32).view(-1, TILE, width // 2)
    is_as_expected = all(torch.equal(pairs[i], tiles[i].t()) for i in (0, len(tiles) // 2, -1))
    return pairs if is_as_expected else None
