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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from nanoserve.model.compiled import NUM_TOKENS, Job, LayerJob
from nanoserve.model.formulas import Formula
from nanoserve.model.loader import load_skeleton
from nanoserve.model.narrow import NarrowLinear
from nanoserve.model.packing import pack_linears


def main(folder: Path) -> None:
    job, names = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(5)
    with torch.inference_mode():
        for name in names:
            _make(folder, name, partial(compile_part, job, name))
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()


def _die_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not by sys.stdin, which would be locked when this process ends
        pass
    os._exit(1)


def _make(folder: Path, name: str, compile: Callable[[], Any]) -> None:
    unfinished = folder / f"{name}.{os.getpid()}"
    try:
        compile().save_compiled_function(str(unfinished))
        unfinished.replace(folder / f"{name}.compiled")
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        unfinished.write_text(f"{name}: {type(error).__name__}: {reason[0]}")
        unfinished.replace(folder / f"{name}.error")


def compile_part(job: Job, name: str) -> Any:
    """Raises whatever the compiler does."""
    return compile_layer(job.layers[name], job) if name in job.layers else compile_formula(job.formulas[name])


def _compile(function: Callable[..., Any], *args: Any) -> Any:
    options: Any = {
        # Without guards: compiled.py makes sure of what they would.
        "guard_filter_fn": lambda guards: [False for _ in guards],
        # Multiply and add in one instruction, which rounds once.
        "cpp.enable_floating_point_contract_flag": "fast",
        # The number of threads is chosen in each step. Made for as many as there are CPUs, code leaves it open anyway,
        # and keeps loops that are too short for threads free of them.
        "cpp.dynamic_threads": torch.get_num_threads() != os.cpu_count(),
    }
    compiled: Any = torch.compile(function, fullgraph=True, options=options)
    return compiled.aot_compile((args, {}))


def compile_layer(job: LayerJob, whole: Job) -> Any:
    """For any number of tokens, or for one if it was called with one."""
    model = load_skeleton(whole.folder, whole.dtype, trust_remote_code=whole.trust_remote_code)
    layer = model.get_submodule(job.name).to_empty(device="cpu")
    for name in job.attention_names:
        layer.get_submodule(name).paged_index = torch.tensor(0)
    for name in job.narrow_names:
        linear: Any = layer.get_submodule(name)
        layer.set_submodule(name, NarrowLinear(linear, linear.weight.detach().to(whole.narrow_dtype)))
    if whole.is_packed:
        pack_linears(layer)
    for leaf in _pytree.tree_leaves((job.args, job.kwargs)):
        if isinstance(leaf, Tensor):
            for dimension, size in enumerate(leaf.shape):
                if size == NUM_TOKENS:
                    torch._dynamo.mark_dynamic(leaf, dimension)
    return _compile(_run_layer, layer, job.args, job.kwargs)


def _run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer(*args, **kwargs)


def compile_formula(formula: Formula) -> Any:
    """For all sizes that it says."""
    for tensor, dimensions in zip(formula.trial, formula.any_size, strict=True):
        for dimension in dimensions:
            torch._dynamo.mark_dynamic(tensor, dimension)
    return _compile(formula.function, *formula.trial)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
