"""The arithmetic of a step with many adapters: for some tokens of a linear layer, what their adapters add.

Weights of all adapters lie one behind the other, a column for each of their ranks:

    A [columns, in_features], B [columns, out_features]      y += (x A^T) B, with a token's own columns alone

A run is tokens, one behind the other, with the same adapter. A long one, such as a chunk of a prompt, is computed by
itself with its columns, in two products. Short ones are computed together, in one of two ways:

- With all columns from the first to the last of theirs; between the two products, what a token got from columns of
  others becomes zero. That multiplies in vain, but reads each weight once, and works everywhere:

      where(own, x A^T, 0) B                                 own: [tokens, columns]

- By `add_few`, once it is compiled: each token with its own columns, and no others. In bfloat16 on AVX-512 it takes
  about half as long at 8 tokens of 8 adapters of rank 16, and a third at 32 of 32.

Gathering the weights of each token for a batched product, which is common, copies them first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.model.formulas import Formula, Place, random_numbers

# A run is short up to so many tokens; and short ones are together as long as they have so many columns.
SHORT = 8
MAX_COLUMNS = 256
# Columns that add_few adds at a time: unrolled, because a loop over them would be made a gather of single numbers.
PIECE = 16
# What it is tried with: enough that the compiler spreads the tokens over threads.
TRIAL_TOKENS, TRIAL_IN, TRIAL_OUT = 9, 1037, 1553

# Type of the weights -> add_few, compiled. Filled while the server runs, by compiled.py.
kernels: dict[torch.dtype, Callable[..., Tensor]] = {}

# The first column, and the one behind the last.
Columns = tuple[int, int]
# The first token, the one behind the last, and the columns of their adapter.
Run = tuple[int, int, Columns]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that are computed together."""

    tokens: slice
    columns: slice
    # [tokens, columns]: not a token's own. None = all columns are everybody's.
    foreign: Tensor | None = None
    # Of each PIECE of the largest rank: which columns, and whether they are a token's own, both [tokens, PIECE].
    pieces: tuple[tuple[Tensor, Tensor], ...] = ()

    def add(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x: [num_tokens, in_features], of the step. Returns [tokens, out_features]."""
        x = x[self.tokens] if self.tokens != slice(0, len(x)) else x
        if self.foreign is None:
            return functional.linear(x, a[self.columns]) @ b[self.columns]
        if (kernel := kernels.get(b.dtype)) is not None:
            first, *others = (kernel(x, a, b, columns, own) for columns, own in self.pieces)
            return sum(others, first)
        inner = functional.linear(x, a[self.columns])
        # Filled and not multiplied: what is infinite times zero is not a number.
        return inner.masked_fill_(self.foreign, 0) @ b[self.columns]


def make_groups(runs: Sequence[Run], device: torch.device) -> list[Group]:
    """runs: in order; between them may be tokens without an adapter."""
    groups = []
    for together in _join(runs):
        first, end = together[0][0], together[-1][1]
        low, high = min(low for _, _, (low, _) in together), max(high for _, _, (_, high) in together)
        tokens, columns = slice(first, end), slice(low, high)
        if len(together) == 1:
            groups.append(Group(tokens, columns))
            continue
        lows, ranks = torch.zeros(2, end - first, 1, dtype=torch.long)  # of each token
        for run_first, run_end, (run_low, run_high) in together:
            lows[run_first - first : run_end - first] = run_low
            ranks[run_first - first : run_end - first] = run_high - run_low
        all_columns = torch.arange(low, high)
        foreign = (all_columns < lows) | (all_columns >= lows + ranks)
        pieces = []
        for start in range(0, int(ranks.max()), PIECE):
            place = torch.arange(start, start + PIECE)
            pieces.append(((lows + place).clamp(max=high - 1).to(device), (place < ranks).to(device)))
        groups.append(Group(tokens, columns, foreign.to(device), tuple(pieces)))
    return groups


def _join(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Those that are computed together. Only such of about the same rank are, so that none is padded to another's."""
    together: list[Run] = []
    for run in runs:
        joined = [*together, run]
        is_short = all(end - first <= SHORT for first, end, _ in joined)
        num_pieces = {-(-(high - low) // PIECE) for _, _, (low, high) in joined}
        width = max(high for _, _, (_, high) in joined) - min(low for _, _, (low, _) in joined)
        if together and not (is_short and len(num_pieces) == 1 and width <= MAX_COLUMNS):
            yield together
            joined = [run]
        together = joined
    if together:
        yield together


def add_few(x: Tensor, a: Tensor, b: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    """x: [tokens, in_features]; columns, own: [tokens, PIECE]. Returns [tokens, out_features].

    To be compiled for any sizes. As it stands, it makes large tensors.
    """
    inner = (x.float()[:, None] * a[columns].float()).sum(-1)  # [tokens, PIECE]
    inner = torch.where(own, inner, 0.0)
    first, *others = (inner[:, i, None] * b[columns[:, i]].float() for i in range(PIECE))
    return sum(others, first).to(x.dtype)


def formulas(dtype: torch.dtype) -> Iterator[tuple[str, Formula, Place]]:
    """To be compiled for a model of this type: name, formula, and where Group looks for it."""
    random = random_numbers()
    tokens = torch.arange(TRIAL_TOKENS)[:, None]
    num_columns = TRIAL_TOKENS * PIECE
    trial = (
        random(TRIAL_TOKENS, TRIAL_IN, dtype=dtype) / TRIAL_IN**0.5,
        random(num_columns, TRIAL_IN, dtype=dtype),
        random(num_columns, TRIAL_OUT, dtype=dtype),
        tokens * PIECE + torch.arange(PIECE),
        torch.arange(PIECE) <= tokens,
    )
    yield "adapters", Formula(add_few, trial, ((0, 1), (0, 1), (0, 1), (0,), (0,))), (kernels, dtype)
