"""Functions of tensors alone that are compiled by themselves: products for few tokens, and attention of single tokens.

Each comes with trial arguments. The compiler sees them, and what it has made must compute from them what the function
itself does, before it takes a place in the table where the function's caller looks for it. Products are written in the
file of the weight that they are for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanoserve.model.attend import attend_singles
from nanoserve.model.attention import AttentionForm

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
        outs = (function(*self.trial) for function in (compiled, self.function))
        got, want = ([out] if isinstance(out, Tensor) else out for out in outs)
        return len(got) == len(want) and all(
            torch.allclose(a, b, atol=1e-4, rtol=2 * torch.finfo(b.dtype).eps) for a, b in zip(got, want, strict=True)
        )


# Where a compiled function is looked for: a table, and its key in it.
Place = tuple[dict[Any, Callable[..., Any]], Any]


def attention_formula(form: AttentionForm, dtype: torch.dtype, block_size: int) -> Formula:
    """Of single tokens: for any number of sequences, of blocks a sequence, and of blocks in the cache."""
    random = random_numbers()
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


def random_numbers() -> Callable[..., Tensor]:
    """Makes tensors of a shape, the same in each start."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)
