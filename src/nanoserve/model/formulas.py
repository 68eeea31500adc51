"""Functions of tensors alone that are compiled by themselves: products for few tokens, and attention of single tokens.

Each comes with trial arguments. The compiler sees them, and what it has made must compute from them what the function
itself does, before it takes a place in the table where the function's caller looks for it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from nanoserve.model import narrow, packing
from nanoserve.model.attend import attend_singles
from nanoserve.model.attention import AttentionForm, CompiledAttention
from nanoserve.model.loader import LoadedModel

# Sizes of trial arguments that stand for any size. With few sequences, the compiler spreads loops over their blocks and
# heads over threads too.
WIDTH = 37
NUM_SEQUENCES = 3
NUM_BLOCKS = 11
CACHE_BLOCKS = 23


@dataclass(frozen=True, slots=True)
class Formula:
    """A function to be compiled."""

    # Returns one tensor or several.
    function: Callable[..., Any]
    trial: tuple[Tensor | None, ...]
    # Of each argument: the dimensions that may have another size than in the trial.
    any_size: tuple[tuple[int, ...], ...]

    def is_computed_by(self, compiled: Callable[..., Any]) -> bool:
        """Whether it gives the same, but for rounding."""
        got, want = (_pytree.tree_leaves(function(*self.trial)) for function in (compiled, self.function))
        return len(got) == len(want) and all(
            torch.allclose(a, b, atol=1e-4, rtol=2 * torch.finfo(b.dtype).eps) for a, b in zip(got, want, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the compiled function is looked for."""

    table: dict[Any, Callable[..., Any]]
    key: Any


def formulas_of(
    model: LoadedModel,
    forms: Iterable[AttentionForm],
    compiled_attention: CompiledAttention,
    block_size: int,
) -> Iterator[tuple[str, Formula, Place]]:
    """What a model's steps can use, each with its name. forms: of its attention."""
    if model.narrow_dtype is not None:
        for size in narrow.BLOCK_SIZES:
            place = Place(narrow.kernels, (model.narrow_dtype, size))
            yield f"product-{size}", _narrow_product(model.narrow_dtype, size), place
    if any(packing.has_pairs(module) for module in model.model.modules()):
        for num_rows in packing.FEW_ROWS:
            yield f"product-{num_rows}", _packed_product(num_rows), Place(packing.kernels, num_rows)
    for i, form in enumerate(sorted(forms, key=repr)):
        yield f"attention-{i}", _attention(form, model.dtype, block_size), Place(compiled_attention, form)


def _narrow_product(dtype: torch.dtype, size: int) -> Formula:
    """For any size of the weight, and any number of blocks of `size` tokens."""
    random = _Random()
    trial = random(2, size, WIDTH), random(3, narrow.TILE, WIDTH, dtype=dtype)
    return Formula(narrow.multiply_blocks, trial, ((0, 2), (0, 2)))


def _packed_product(num_rows: int) -> Formula:
    """For any size of the weight."""
    random = _Random()
    weight = random(3, WIDTH, packing.TILE, 2, dtype=torch.bfloat16)
    trial = random(num_rows, WIDTH, 2, dtype=torch.bfloat16), weight.view(torch.int32).squeeze(3)
    return Formula(packing.multiply_pairs, trial, ((1,), (0, 1)))


def _attention(form: AttentionForm, dtype: torch.dtype, block_size: int) -> Formula:
    """Of single tokens: for any number of sequences, of blocks a sequence, and of blocks in the cache."""
    random = _Random()
    pool = CACHE_BLOCKS, form.num_kv_heads, block_size
    num_keys = NUM_BLOCKS * block_size
    trial = (
        random(NUM_SEQUENCES, form.num_heads, form.key_width, dtype=dtype),
        random(*pool, form.key_width, dtype=dtype),
        random(*pool, form.value_width, dtype=dtype),
        torch.arange(NUM_SEQUENCES * NUM_BLOCKS).view(NUM_SEQUENCES, NUM_BLOCKS) % CACHE_BLOCKS,
        torch.zeros(NUM_SEQUENCES, num_keys, dtype=dtype).masked_fill_(
            torch.arange(num_keys) >= num_keys - 3, -torch.inf
        ),
        random(form.num_heads, dtype=dtype) if form.has_sinks else None,
    )
    function = partial(attend_singles, scaling=form.scaling, softcap=form.softcap)
    return Formula(function, trial, ((0,), (0,), (0,), (0, 1), (0, 1), ()))


class _Random:
    """The same numbers in each start."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)
