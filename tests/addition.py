"""Something small behind every projection, as an adapter will be. A file of its own, for the process that compiles."""

from pathlib import Path

import torch
from torch import Tensor

from nanoserve.model import compile_worker
from nanoserve.model.compiled import Job
from nanoserve.model.weights import ServedLinear

_library = torch.library.Library("nanoserve_tests", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("addition(Tensor x, Tensor y) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "addition", "CPU")
def addition(x: Tensor, y: Tensor) -> Tensor:
    """Of a projection's input and output, as an adapter's two small products."""
    return (x.float().mean(-1, keepdim=True) * torch.linspace(-0.2, 0.2, y.shape[-1])).to(y.dtype)


@torch.library.impl(_library, "addition", "Meta")
def _shape_of_addition(_x: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


_forward = ServedLinear.forward


def forward_with_addition(self: ServedLinear, x: Tensor) -> Tensor:
    """In the place of ServedLinear.forward."""
    y = _forward(self, x)
    return y + torch.ops.nanoserve_tests.addition(x, y)  # type: ignore[no-any-return]


def make_with_addition(folder: Path, job: Job) -> None:
    """What the process that compiles does, in one that has the addition."""
    ServedLinear.forward = forward_with_addition  # type: ignore[method-assign]
    with torch.inference_mode():
        for name in job.parts:
            compile_worker._make(folder, name, job)
