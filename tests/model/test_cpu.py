"""What is set once in a process that computes on a CPU: how much memory libraries keep, and what is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor import cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from nanoserve.model import cpu
from nanoserve.model.cpu import can_compile, compiled_folder, keep_compiled, prepare_to_load_compiled
from nanoserve.model.torch_internals import can_pack

# Multiplies by a packed weight with 600 numbers of rows, and prints by how many bytes the process grew.
MANY_SHAPES = """
import re, sys, torch
from pathlib import Path
from nanoserve.model.cpu import prepare_cpu
from nanoserve.model.packing import PackedWeight

def resident_bytes():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

prepare_cpu()
dtype = getattr(torch, sys.argv[1])
with torch.inference_mode():
    weight = PackedWeight(torch.zeros(256, 256, dtype=dtype))
    weight.multiply(torch.zeros(600, 256, dtype=dtype), None)
    before = resident_bytes()
    for num_rows in range(1, 600):
        weight.multiply(torch.zeros(num_rows, 256, dtype=dtype), None)
print(resident_bytes() - before)
"""

# Prints where torch keeps the libraries that it compiles.
COMPILER_CACHE = """
import transformers
from torch._inductor.runtime.cache_dir_utils import cache_dir
from nanoserve.model.cpu import keep_compiled

keep_compiled()
print(cache_dir())
"""


def compiler_cache(**variables: str) -> Path:
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | variables
    command = [sys.executable, "-c", COMPILER_CACHE]
    return Path(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip())


def test_what_torch_compiles_outlives_temporary_files(tmp_path: Path) -> None:
    assert compiler_cache(XDG_CACHE_HOME=str(tmp_path)).is_relative_to(tmp_path)


def test_where_torch_keeps_what_it_compiles_may_be_chosen(tmp_path: Path) -> None:
    assert (
        compiler_cache(XDG_CACHE_HOME=str(tmp_path / "a"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "b"))
        == tmp_path / "b"
    )


def test_a_cache_folder_that_cannot_be_made_is_left_to_torch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not compiler_cache(XDG_CACHE_HOME=str(tmp_path / "file")).is_relative_to(tmp_path)


def test_a_first_start_does_not_wait_for_what_a_later_one_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: tried.append("the vectors of the CPU"))
    monkeypatch.setattr(inductor_config.cpp, "vec_isa_ok", None)
    keep_compiled()
    prepare_to_load_compiled()
    assert not tried  # compiling its trial would take seconds
    compiled_folder().mkdir()
    prepare_to_load_compiled()
    assert tried


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_many_sizes_do_not_fill_memory_with_kernels(dtype: str) -> None:
    if not can_pack(torch.device("cpu"), getattr(torch, dtype)):
        pytest.skip(f"this CPU does not pack {dtype}")
    # Processes of their own: the limits are read once, and only before anything is computed.
    unlimited = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    limited, without = (
        subprocess.Popen(
            [sys.executable, "-c", MANY_SHAPES, dtype],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        for variables in ({}, unlimited)
    )
    growth, growth_without = (int(process.communicate()[0]) for process in (limited, without))
    # How large a kernel is depends on the CPU: 100 of 370 MiB on one.
    assert growth < 0.65 * growth_without


def test_small_models_and_machines_without_a_compiler_are_not_compiled_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not can_compile(cpu.MIN_COMPILED - 1)
    monkeypatch.setenv("CXX", sys.executable)
    assert can_compile(cpu.MIN_COMPILED)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not can_compile(cpu.MIN_COMPILED)
    assert "no-such-compiler" in caplog.text
