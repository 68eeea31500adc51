"""The K/V tensors of the paged cache, and how large they are made.

A block is an id that the scheduler hands out; here it is `block_size` token slots in every layer:

    layer 0   keys    [num_blocks, num_kv_heads, block_size, key_width]
              values  [num_blocks, num_kv_heads, block_size, value_width]
    layer 1   ...

Heads stand before slots, so that a block's keys of one head lie together: attention copies such runs of a sequence
next to each other and has, for each head, one matrix to multiply with.

Owned by the ModelRunner; attention reads and writes it. `block_pool.py` counts blocks and knows no tensor.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanoserve.config import ConfigError, format_size

GIB = 1 << 30
# Without a size from the operator: this share of the free memory of a machine without an accelerator, but no more
# than the limit, because that memory is not ours alone.
CPU_SHARE = 0.4
CPU_LIMIT_BYTES = 4 * GIB
# Without a size from the operator: this share of the accelerator's free memory, after room for a step's activations.
DEVICE_SHARE = 0.9
DEVICE_ACTIVATION_BYTES = 1 * GIB
# Main memory that `claim_memory` asks for at a time: one large page. Meanwhile no thread can map memory, as the first
# products do dozens of times for their kernels. With 16 MiB at a time, a first request waited for up to five seconds.
CLAIMED_AT_ONCE = 2 << 20


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of a token."""

    num_kv_heads: int
    # Numbers of a key and of a value, for each head; they differ in multi-head latent attention.
    key_width: int
    value_width: int
    dtype: torch.dtype
    # Tokens that a query sees at most, itself included. None = all before it.
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The size of a cache, decided before it is made."""

    specs: tuple[KVSpec, ...]
    block_size: int
    num_blocks: int
    # What it was cut from.
    budget_bytes: int
    # Where the budget comes from, for the log.
    budget_source: str
    # Tokens that one sequence may have.
    max_context_tokens: int

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * sum(spec.bytes_per_token for spec in self.specs)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def describe(self) -> str:
        """The arithmetic, line by line, so that a person can check it."""
        lines = []
        for spec in dict.fromkeys(self.specs):
            layer_bytes = self.block_size * spec.bytes_per_token
            lines.append(
                f"{self.specs.count(spec)} layers x {spec.num_kv_heads} KV heads"
                f" x ({spec.key_width} + {spec.value_width}) x {spec.dtype.itemsize} bytes"
                f" x {self.block_size} tokens = {self.specs.count(spec)} x {layer_bytes} bytes"
            )
        lines.append(f"a block of {self.block_size} tokens: {self.bytes_per_block} bytes")
        lines.append(f"memory: {format_size(self.budget_bytes)} ({self.budget_source})")
        lines.append(
            f"{self.num_blocks} blocks = {self.num_tokens} tokens = {format_size(self.num_bytes)}:"
            f" {self.num_tokens / self.max_context_tokens:.1f} sequences of {self.max_context_tokens} tokens"
        )
        return "\n".join(lines)


def plan_kv(
    specs: Sequence[KVSpec],
    block_size: int,
    memory_bytes: int | None,
    max_context: int | None,
    model_max: int,
    max_num_seqs: int,
    device: torch.device,
) -> KVPlan:
    """Decide how many blocks there are, and how long a sequence may be.

    memory_bytes: the operator's choice, used in full; None = a share of what is free, and no more than
    `max_num_seqs` sequences of the whole context can use.
    max_context: the operator's choice, refused if one such sequence does not fit; None = the model's own limit, or
    less if the memory is. Raises ConfigError.
    """
    if max_context is not None and max_context > model_max:
        raise ConfigError(f"--max-context-tokens is {max_context}; the model's limit is {model_max}")
    blocks_of_context = -(-(max_context or model_max) // block_size)
    plan = KVPlan(tuple(specs), block_size, 0, 0, "as asked", max_context or model_max)
    if memory_bytes is None:
        must_hold = 0 if max_context is None else blocks_of_context * plan.bytes_per_block
        budget, source = _free_share(device, must_hold)
        num_blocks = min(budget // plan.bytes_per_block, blocks_of_context * max_num_seqs)
        plan = replace(plan, num_blocks=num_blocks, budget_bytes=budget, budget_source=source)
    else:
        plan = replace(plan, num_blocks=memory_bytes // plan.bytes_per_block, budget_bytes=memory_bytes)
    if plan.num_blocks == 0 or (max_context is not None and plan.num_blocks < blocks_of_context):
        raise ConfigError(
            f"the KV cache of {plan.budget_bytes} bytes ({plan.budget_source}) holds {plan.num_tokens} tokens;"
            f" a context of {plan.max_context_tokens} tokens needs {blocks_of_context * plan.bytes_per_block} bytes;"
            " raise --kv-memory or lower --max-context-tokens"
        )
    return replace(plan, max_context_tokens=min(plan.max_context_tokens, plan.num_tokens))


def _free_share(device: torch.device, must_hold: int) -> tuple[int, str]:
    """Bytes to use of what is free on the device, and how that was reckoned.

    must_hold: one sequence of a context that was asked for may go beyond CPU_LIMIT_BYTES.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget = max(0, int((free - DEVICE_ACTIVATION_BYTES) * DEVICE_SHARE))
        return budget, f"{DEVICE_SHARE:.0%} of {format_size(free)} free, less room for activations"
    free = available_memory()
    budget = min(int(free * CPU_SHARE), max(CPU_LIMIT_BYTES, must_hold))
    return budget, f"{CPU_SHARE:.0%} of {format_size(free)} free, usually at most {format_size(CPU_LIMIT_BYTES)}"


def available_memory() -> int:
    """Bytes of main memory that can be used without swapping: of the machine, or of the container if that is less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's tensors."""

    # [num_blocks, num_kv_heads, block_size, key_width]
    keys: Tensor
    # [num_blocks, num_kv_heads, block_size, value_width]
    values: Tensor


class PagedKVCache:
    """The tensors of every layer. Engine thread only.

    Every number in them is finite, always: memory starts as zeros, and what a corrupt sequence wrote is zeroed before
    its blocks can have another owner. Attention relies on it, because slots that it must not see are multiplied by a
    weight of 0, and 0 x NaN is NaN.
    """

    def __init__(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        num_bytes = num_blocks * block_size * sum(spec.bytes_per_token for spec in specs)
        self._memory = memory = _zeros(num_bytes, device)
        self._is_closed = False
        self.layers = []
        for spec in specs:
            pools = []
            for width in (spec.key_width, spec.value_width):
                shape = num_blocks, spec.num_kv_heads, block_size, width
                size = math.prod(shape) * spec.dtype.itemsize
                pools.append(memory[:size].view(spec.dtype).view(shape))
                memory = memory[size:]
            self.layers.append(LayerKV(*pools))

    def claim_memory(self) -> None:
        """Of a cache in main memory: have the system give all of it. In a thread of its own: it changes no number.

        It has been promised only, so that a server starts at once. To give 4 GiB takes seconds; requests go first. What
        was written before came in small pages, because a large one for every layer would take a tenth of a second and
        more; at last, Linux makes large ones of them.
        """
        if sys.platform != "linux":
            return
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        # mman.h; the second since Linux 5.14: before, memory comes when it is used; the third since 6.1.
        madv_hugepage, madv_populate_write, madv_collapse = 14, 23, 25
        size = self._memory.numel()

        def advise(start: int, length: int, advice: int) -> None:
            address = ctypes.c_void_p(self._memory.data_ptr() + start)
            ctypes.CDLL(None).madvise(address, ctypes.c_size_t(length), advice)

        advise(0, size, madv_hugepage)
        for start in range(0, size, CLAIMED_AT_ONCE):
            if self._is_closed:
                return
            advise(start, min(CLAIMED_AT_ONCE, size - start), madv_populate_write)
        advise(0, size, madv_collapse)

    def close(self) -> None:
        """Claim no more memory. Any thread."""
        self._is_closed = True

    def lines(self, slots: Tensor, num_kv_heads: int) -> Tensor:
        """Where the keys of tokens lie in a layer of so many heads: the same for all such layers, and for values.

        slots: [num_tokens], block id x block_size + offset. Returns [num_tokens * num_kv_heads], of the layer's
        tensor seen as lines of one head's key.
        """
        blocks, offsets = slots[:, None] // self.block_size, slots[:, None] % self.block_size
        heads = torch.arange(num_kv_heads, device=slots.device)
        return ((blocks * num_kv_heads + heads) * self.block_size + offsets).flatten()

    def write(self, layer: int, lines: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of tokens: [num_kv_heads, num_tokens, width]."""
        kv = self.layers[layer]
        for pool, new in ((kv.keys, keys), (kv.values, values)):
            pool.view(-1, pool.shape[3]).index_copy_(0, lines, new.transpose(0, 1).reshape(len(lines), -1))

    def clear(self, slots: Tensor) -> None:
        """Zero slots in every layer, as if they had never been written. slots: [num_tokens]"""
        blocks, offsets = slots // self.block_size, slots % self.block_size  # [num_tokens], [num_tokens]
        for kv in self.layers:
            kv.keys[blocks, :, offsets] = 0
            kv.values[blocks, :, offsets] = 0


def _zeros(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes]: uint8. Main memory in small pages, which the system gives when they are first used."""
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # Private: of memory that could be shared with other processes, Linux gives no large pages.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system that has no large ones
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
