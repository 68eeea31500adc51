"""What a process that computes on a CPU sets once, before it does: what libraries keep, and what is compiled.

Called by the loader. Whoever runs the process may choose otherwise by the same environment variables.
"""

import ctypes
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from nanoserve.config import environment
from nanoserve.model.torch_internals import can_load_compiled, default_compiler_cache, import_what_loads_compiled

# oneDNN makes a kernel for every shape that it multiplies, and shapes follow the number of tokens in a step. With what
# describes it a kernel takes up to a megabyte, whatever the model's size, and by default 1024 of each kind are kept. A
# step needs about twelve, so that these do for ten sizes of steps in turn; any other costs a few milliseconds more.
NUM_KERNELS = 128
# Parameters of a model below which a step takes so little that compiling is not worth its minute of CPU time.
MIN_COMPILED = 50_000_000

logger = logging.getLogger(__name__)


def prepare_cpu() -> None:
    """Before the first computation: libraries read some of it only once."""
    # The first is read by oneDNN, the second by what stands between torch and oneDNN.
    environment().setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(NUM_KERNELS))
    environment().setdefault("LRU_CACHE_CAPACITY", str(NUM_KERNELS))
    # Read by torch: large tensors in pages of 2 MB. A step passes over all weights, and then waits less for addresses.
    environment().setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, instead of giving them back and paying page faults for the next.

    A step makes and frees the same tensors again and again. Without effect where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
    mallopt(m_trim_threshold, 1 << 30)


def release_freed_memory() -> None:
    """Give back to the system what is free now: before serving, when what was needed to load has been released."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def can_compile(num_parameters: int) -> bool:
    """Whether compiling a model of this size is worth while here, and possible."""
    if num_parameters < MIN_COMPILED:
        return False
    compiler = environment().get("CXX", "g++")
    if shutil.which(compiler) is None:
        logger.warning(
            "there is no C++ compiler (%s): serving works, but would be up to three times as fast with one", compiler
        )
        return False
    return can_load_compiled()


def compiled_folder() -> Path:
    """Where what is compiled on this machine is kept for the next start."""
    root = Path(environment().get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "nanoserve" / "compiled"


def keep_compiled() -> None:
    """Have torch's compiler keep its libraries for the next start too.

    By default they are in a temporary folder, and torch has written its name into the environment when it was imported.
    """
    with suppress(OSError):  # the disk is full, or the folder not ours: compiling fails, and says so
        if environment().get("TORCHINDUCTOR_CACHE_DIR") in (None, default_compiler_cache()):
            folder = compiled_folder().with_name("torch")
            folder.mkdir(parents=True, exist_ok=True)
            environment()["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def prepare_to_load_compiled() -> None:
    """If there is anything."""
    if not compiled_folder().exists():
        return
    with suppress(Exception):  # it comes again, and is logged, when a part is loaded
        import_what_loads_compiled()
