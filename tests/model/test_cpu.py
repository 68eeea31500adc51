"""What is set once in a process that computes on a CPU: how many threads, and how much memory libraries keep."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoserve.model import cpu
from nanoserve.model.cpu import usable_cpus
from nanoserve.model.packing import can_pack

# Multiplies by a packed weight with 600 numbers of rows, and prints by how many bytes the process grew.
MANY_SHAPES = """
import re, sys, torch
from pathlib import Path
from torch import nn
from nanoserve.model.cpu import prepare_cpu
from nanoserve.model.packing import PackedLinear

def resident_bytes():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

prepare_cpu()
dtype = getattr(torch, sys.argv[1])
with torch.inference_mode():
    linear = PackedLinear(nn.Linear(256, 256, dtype=dtype))
    linear(torch.zeros(600, 256, dtype=dtype))
    before = resident_bytes()
    for num_rows in range(1, 600):
        linear(torch.zeros(num_rows, 256, dtype=dtype))
print(resident_bytes() - before)
"""


@pytest.mark.parametrize(("quota", "want"), [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1)])
def test_a_containers_quota_bounds_the_threads(
    quota: str, want: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "CPU_QUOTA", tmp_path / "cpu.max")
    assert usable_cpus(8) == want
    assert usable_cpus(1) == 1


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
