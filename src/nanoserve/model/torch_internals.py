"""What is private in torch, oneDNN and transformers, or may change with any version: named here, and nowhere else.

The packages are pinned to the minors that all tests have passed with. Beside each group of functions stands a `can_…`:
a trial of milliseconds, made once before the functions are used. If it fails, the log says so, and what is used instead
is slower and computes the same. What is compiled is tried where it is used, in compiled.py.
"""

import ctypes
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)


def _works(trial: Callable[[], object], what: str, instead: str) -> bool:
    """Whether a trial gives something true. If not, the log says what was tried, and what is done instead.

    A trial that gives None has learned that this machine lacks it, which is nothing to be said.
    """
    try:
        result = trial()
        if result or result is None:
            return bool(result)
        reason = "it does something else"
    except Exception as error:
        reason = repr(error)
    logger.warning("torch %s: %s cannot be used (%s); %s", torch.__version__, what, reason, instead)
    return False


# ------------------------------------------------------------------------------------------ oneDNN's packed weights


def pack_weight(weight: Tensor, num_rows: int) -> Tensor:
    """[out_features, in_features] in the layout that is best for products of num_rows rows.

    For torch the result has the shape of the weight, and no storage.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., in_features]. Returns [..., out_features]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def packed_memory(packed: Tensor) -> Tensor:
    """The memory of a packed weight, without a copy: int32, in one dimension."""
    num_bytes, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_int32 * (num_bytes // 4)).from_address(address), dtype=torch.int32)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing helps, float32 on x86, and bfloat16 on a CPU whose oneDNN computes in it; and works."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.float32 and platform.machine() not in ("x86_64", "AMD64"):
        return False

    def multiplies() -> bool | None:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        weight, x = torch.eye(8, dtype=dtype)[:4], torch.arange(16, dtype=dtype).view(2, 8)
        return torch.equal(multiply_packed(x, pack_weight(weight, 2), None), functional.linear(x, weight))

    is_there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return is_there and _works(multiplies, "oneDNN's packed weights", "weights are served unpacked")


def can_read_packed() -> bool:
    """Whether `packed_memory` gives memory of the weight's size."""

    def reads() -> bool:
        packed = pack_weight(torch.zeros(64, 64, dtype=torch.bfloat16), 1)
        return packed_memory(packed).nbytes == 64 * 64 * 2

    return _works(reads, "memory of packed weights", "one row takes up to 1.5 times as long")


# --------------------------------------------------------------------------------------- compiling ahead of serving


def compile_ahead(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], path: Path) -> None:
    """Write what torch.compile makes of a call, in a form that another process can load. Raises what the compiler does.

    Without guards: whoever loads it makes sure of what they would.
    """
    options = {**options, "guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled: Any = torch.compile(function, fullgraph=True, options=options)
    compiled.aot_compile((args, {})).save_compiled_function(str(path))


def load_compiled(path: Path, names: dict[str, Any]) -> Callable[..., Any]:
    """What compile_ahead has written; `names` are the globals of the function that was compiled."""
    with path.open("rb") as file:
        function: Any = torch.compiler.load_compiled_function(file, f_globals=names)
    function.disable_guard_check()
    return function  # type: ignore[no-any-return]


def can_load_compiled() -> bool:
    """Whether this torch can; importing what compiles, to try it, would take seconds."""
    return _works(lambda: torch.compiler.load_compiled_function, "compiled parts", "nothing is compiled")


def mark_any_size(tensor: Tensor, dimension: int) -> None:
    """Have the compiler leave the size of this dimension open."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def import_what_loads_compiled() -> None:
    """What torch does before it loads the first compiled part, which is to import much and to try out the CPU.

    The CPU's vectors are not tried by compiling something: there is something compiled already. Raises whatever is
    missing.
    """
    from torch._inductor import config, cpu_vec_isa, select_algorithm  # noqa: F401

    config.cpp.vec_isa_ok = True
    cpu_vec_isa.pick_vec_isa()


def default_compiler_cache() -> str | None:
    """The temporary folder in which torch keeps what it compiles, unless it is told another. None = unknown."""
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        return default_cache_dir()
    except ImportError:
        return None


# -------------------------------------------------------------------------------------------------- transformers


@contextmanager
def watching_bars(say: Callable[[float], None]) -> Iterator[None]:
    """Meanwhile transformers shows no bars: `say` is told the share that is done, 1 at the end, of what has one."""

    def watch(make_bar: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return watched(list(arguments[0])) if arguments else make_bar(**options)

    def watched(items: list[Any]) -> Iterator[Any]:
        for i, item in enumerate(items):
            say(i / len(items))
            yield item
        say(1.0)

    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        logger.warning("transformers does not say how many weights it has read; loading shows no progress")
        yield
        return
    before = set_hook(watch)
    try:
        yield
    finally:
        set_hook(before)
