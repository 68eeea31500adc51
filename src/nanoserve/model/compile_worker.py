"""The process that compiles: python -m nanoserve.model.compile_worker FOLDER, and from standard input a Job and the
names of its parts to make, pickled.

Started by compiled.py, which reads from standard output the name of each part that the folder now has. It builds the
model without its weights, gives memory only to the layers that it compiles, and ends when its standard input does, that
is, with its parent.
"""

import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoserve.model.adapters import put_trial_adapters
from nanoserve.model.compiled import NUM_TOKENS, Job, LayerCall, map_tensors
from nanoserve.model.formulas import Formula
from nanoserve.model.loader import load_skeleton
from nanoserve.model.torch_internals import compile_ahead, mark_any_size
from nanoserve.model.weights import apply_layout

OPTIONS = {
    # Multiply and add in one instruction, which rounds once.
    "cpp.enable_floating_point_contract_flag": "fast",
    # The number of threads is chosen in each step. Made for as many as there are CPUs, code leaves it open anyway, and
    # keeps loops that are too short for threads free of them.
    "cpp.dynamic_threads": torch.get_num_threads() != os.cpu_count(),
}


def main(folder: Path) -> None:
    job, names = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(5)
    with torch.inference_mode():
        for name in names:
            _make(folder, name, job)
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()


def _die_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not by sys.stdin, which would be locked when this process ends
        pass
    os._exit(1)


def _make(folder: Path, name: str, job: Job) -> None:
    unfinished = folder / f"{name}.{os.getpid()}"
    try:
        part = job.parts[name]
        function, args = prepare_formula(part) if isinstance(part, Formula) else prepare_layer(part, job)
        compile_ahead(function, args, OPTIONS, unfinished)
        unfinished.replace(folder / f"{name}.compiled")
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        unfinished.write_text(f"{name}: {type(error).__name__}: {reason[0]}")
        unfinished.replace(folder / f"{name}.error")


def prepare_layer(call: LayerCall, job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What to compile, and as what call: for any number of tokens, or for one if it was called with one."""
    model = load_skeleton(job.folder, job.dtype, trust_remote_code=job.trust_remote_code)
    layer = model.get_submodule(call.path).to_empty(device="cpu")
    apply_layout(model, {path: kind for path, kind in job.layout.items() if path.startswith(f"{call.path}.")})
    for adapted in put_trial_adapters(layer, call.adapted, job.dtype):
        mark_any_size(adapted.a, 0)
        mark_any_size(adapted.b, 0)
    for module in layer.modules():
        module.paged_index = torch.tensor(0)  # of which attention looks at its own

    def mark(tensor: Tensor) -> None:
        for dimension, size in enumerate(tensor.shape):
            if size == NUM_TOKENS:
                mark_any_size(tensor, dimension)

    map_tensors(mark, (call.args, call.kwargs))
    return _run_layer, (layer, call.args, call.kwargs)


def _run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer(*args, **kwargs)


def prepare_formula(formula: Formula) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What to compile, and as what call: for all sizes that it says."""
    for tensor, dimensions in zip(formula.trial, formula.any_size, strict=True):
        for dimension in dimensions:
            assert tensor is not None
            mark_any_size(tensor, dimension)
    return formula.function, formula.trial


if __name__ == "__main__":
    main(Path(sys.argv[1]))
