"""The numbers of an adapter, as the model side takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """What an adapter adds to one linear layer: x becomes x W^T + (x a^T) b."""

    # [rank, in_features]
    a: Tensor
    # [rank, out_features], the scaling multiplied in.
    b: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Finite, in the type that the model is computed in, on the CPU."""

    revision: str
    # Path of a layer in the served model -> what is added to it.
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(len(pair.a) for pair in self.pairs.values())

    @property
    def num_bytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())


class Slots(Protocol):
    """The places on the model side in which adapters can be computed with: model/adapters.py."""

    num_slots: int

    @property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        """Path of each layer that an adapter may change -> its in_features and out_features."""

    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot, in place of what was there. On any one thread, beside steps that do not use the
        slot."""
