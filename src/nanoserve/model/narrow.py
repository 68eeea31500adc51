"""Weights of 16 bits under float32 arithmetic: half the memory, and half of what a product with few rows waits for.

A CPU without arithmetic in bfloat16 computes in float32, but most checkpoints say a weight in 16 bits. A step of a few
tokens takes as long as its weights take to come from memory. So they stay as the checkpoint has them, and become
float32 in registers, when they are multiplied: exact, because every 16-bit number is one of float32.

torch has no such product. `multiply_blocks` is its formula in a form that torch.compile turns into a good one:

    for 32 rows of the weight                  they stay in the second cache,
      for each block of 1, 2, 4 or 6 tokens      and these in the first
        for each of the 32
          for k: widen weight[k] once, multiply it with each token's x[k], add to that token's sum in a register

On AVX2, of a layer 1024 x 3072, against the packed float32 of packing.py: 1.5 times as fast at 1 token, 1.8 at 4, 1.3
at 8, 0.85 at 32. From some fifty tokens on it is faster to widen the weight as a whole, part by part, and let torch
multiply: as fast as packed float32 at 512 tokens.
"""

import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.model.formulas import WIDTH, Formula, Place, random_numbers
from nanoserve.model.weights import Weight

# The weight's rows in one tile. Other numbers of outputs are not served in this way.
TILE = 32
# Tokens in a block, one compilation for each: their sums must fit in 16 registers.
BLOCK_SIZES = (1, 2, 4, 6)
MAX_TOKENS = 56
# Numbers that are widened at a time.
WIDENED_AT_ONCE = 1 << 20

# (type of the weight, tokens in a block) -> multiply_blocks, compiled. Filled while the server runs, by compiled.py.
kernels: dict[tuple[torch.dtype, int], Callable[[Tensor, Tensor], Tensor]] = {}


class NarrowWeight(Weight):
    """Of 16 bits, multiplied in float32. out_features is a multiple of TILE, or only rows can be read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.form = f"narrow-{str(weight.dtype).removeprefix('torch.')}"
        self.weight = weight.contiguous()  # no parameter: it must not change its type with those

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether it can be multiplied."""
        return len(weight) % TILE == 0

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor
        if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
            out = (x.flatten() * self.weight.float()).sum(-1).view(*x.shape[:-1], -1)  # a part of the compiled layer
        else:
            out = torch.ops.nanoserve.narrow_linear(x, self.weight)
        return out if bias is None else out + bias

    def rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight).float()

    def formulas(self) -> Iterator[tuple[str, Formula, Place]]:
        for size in BLOCK_SIZES:
            yield f"{self.form}-{size}", _formula(self.weight.dtype, size), (kernels, (self.weight.dtype, size))


def _formula(dtype: torch.dtype, size: int) -> Formula:
    """For any size of the weight, and any number of blocks of `size` tokens."""
    random = random_numbers()
    trial = random(2, size, WIDTH), random(3, TILE, WIDTH, dtype=dtype)
    return Formula(multiply_blocks, trial, ((0, 2), (0, 2)))


_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("narrow_linear(Tensor x, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "narrow_linear", "CPU")
def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_tokens, width = rows.shape
    size = _block_size(num_tokens)
    kernel = kernels.get((weight.dtype, size))
    if kernel is None or num_tokens > MAX_TOKENS:
        out = _multiply_widened(rows, weight)
    else:
        if num_tokens % size:
            rows = functional.pad(rows, (0, 0, 0, -num_tokens % size))
        out = kernel(rows.view(-1, size, width), weight.view(-1, TILE, width)).view(len(rows), -1)[:num_tokens]
    return out.view(*x.shape[:-1], len(weight))


@torch.library.impl(_library, "narrow_linear", "Meta")
def _shape_of_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _block_size(num_tokens: int) -> int:
    """Little padding for few tokens, few blocks for many."""
    if num_tokens <= 2:
        return num_tokens
    return 4 if num_tokens in (3, 4, 7, 8) else 6


def multiply_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x: [num_blocks, size, width]; weight: [num_tiles, TILE, width]. Returns [num_blocks, size, num_tiles, TILE].

    To be compiled for a fixed size. As it stands, it makes large tensors.
    """
    wide = weight[:, None].float()  # [num_tiles, 1, TILE, width]
    tokens = x[None, :, None].unbind(3)  # of each place in a block: [1, num_blocks, 1, width]
    sums = [(token * wide).sum(-1) for token in tokens]  # each [num_tiles, num_blocks, TILE]
    return torch.stack(sums, 2).permute(1, 2, 0, 3).contiguous()


def _multiply_widened(x: Tensor, weight: Tensor) -> Tensor:
    """x: [num_tokens, width]. Returns [num_tokens, out_features]."""
    out = x.new_empty(len(x), len(weight))
    size = max(1, WIDENED_AT_ONCE // x.shape[1])
    for start in range(0, len(weight), size):
        part = weight[start : start + size].float()
        torch.mm(x, part.t(), out=out[:, start : start + size])
    return out


def can_narrow(device: torch.device, dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a model that is computed in `dtype` there may keep the weights of its checkpoint in their type."""
    is_x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return is_x86 and dtype == torch.float32 and stored.itemsize == 2


def is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers of a weight, [rows, width], are numbers of `dtype` too."""
    parts = torch.split(weight, max(1, WIDENED_AT_ONCE // weight.shape[1]))
    return weight.dtype == dtype or all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts)
