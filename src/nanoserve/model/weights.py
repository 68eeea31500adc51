"""Every plain projection of a model, whatever form its weight has, and what the form is decided by.

    nn.Linear, nn.Embedding ── apply_layout ──▶ ServedLinear, ServedEmbedding ──▶ Weight.multiply, Weight.rows

A Layout says of each module's path, which is Hugging Face's, what its weight becomes. layout.py decides it, once. The
loader applies it, and so does the process that compiles, which has to see the same products. A kind of weight is one
file with one class, and a line in layout.py; PlainWeight shows all that it must have.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nanoserve.model.formulas import Formula, Place
from nanoserve.model.threads import one_thread, usable_cpus


class Weight(nn.Module):
    """A matrix [out_features, in_features] in a form that products want. Made once, from a plain one."""

    # Names the compiled products that it uses. With them, the product of one token becomes a part of a compiled layer.
    # None = it has none.
    form: str | None = None
    # Its rows can be read, so that an embedding may share it.
    has_rows = True
    # The numbers themselves, for a model that looks at them; not every kind has them.
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [..., in_features]. Returns x times the transposed matrix, plus the bias: [..., out_features]."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """[...] to [..., in_features]."""
        raise NotImplementedError

    def formulas(self) -> Iterator[tuple[str, Formula, Place]]:
        """Products to be compiled, for all weights of this form: name, formula, and where `multiply` looks for it."""
        yield from ()


class PlainWeight(Weight):
    """As the checkpoint has it, multiplied by torch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.weight, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)


class Adapted(Protocol):
    """Stands behind a linear layer."""

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x: [..., in_features], of all tokens of the step; out: [..., out_features], the product.

        Returns what adapters make of the product.
        """


class _Served(nn.Module):
    def __init__(self, matrix: Weight) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        """For a model that looks at it."""
        return self.matrix.weight


class ServedLinear(_Served):
    """Stands for an nn.Linear. Takes [..., in_features], gives [..., out_features].

    `forward` is the one place where something is added behind every projection: what adapters change, after the
    product, whatever computes that.
    """

    def __init__(self, matrix: Weight, bias: nn.Parameter | None) -> None:
        super().__init__(matrix)
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.bias = bias
        # Set by adapters.py. None = no adapter may change it.
        self.adapted: Adapted | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.matrix.multiply(x, self.bias)
        return out if self.adapted is None else self.adapted.add(x, out)


class ServedEmbedding(_Served):
    """Stands for an nn.Embedding; may share its matrix with a head. Takes [...], gives [..., embedding_dim]."""

    def __init__(self, matrix: Weight) -> None:
        super().__init__(matrix)
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a weight becomes."""

    make: type[Weight]
    # Of the numbers that it is made from.
    dtype: torch.dtype


# Path of a plain linear layer, or of an embedding -> its kind.
Layout = dict[str, Kind]


# GPT-2's Conv1D is a linear layer with its weight transposed.
LINEAR = (nn.Linear, Conv1D)


def plain_weight(module: nn.Module) -> Tensor:
    """Of a linear layer [out_features, in_features], or of an embedding."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def apply_layout(model: nn.Module, layout: Layout) -> None:
    """Replace the modules that it names. What shares a weight still does, if it is to be of one kind.

    Originals are released one by one, so that memory stays flat. Each is replaced by one thread, several at a time:
    beside a thread that does something else, as when a server starts, threads that share one would wait for each other.
    """
    uses: dict[tuple[int, Kind], list[str]] = {}
    for path, kind in layout.items():
        uses.setdefault((id(model.get_submodule(path).weight), kind), []).append(path)

    def replace(use: tuple[tuple[int, Kind], list[str]]) -> None:
        (_, kind), paths = use
        modules = {path: model.get_submodule(path) for path in paths}
        matrix = kind.make(plain_weight(modules[paths[0]]).detach().to(kind.dtype).contiguous())
        for path, module in modules.items():
            if isinstance(module, LINEAR):
                model.set_submodule(path, ServedLinear(matrix, module.bias))
            elif matrix.has_rows:
                model.set_submodule(path, ServedEmbedding(matrix))

    num_threads, _ = usable_cpus()
    with one_thread(), ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for _ in threads.map(replace, uses.items()):
            pass
