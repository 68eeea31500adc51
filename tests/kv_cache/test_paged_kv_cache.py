"""How large the cache is made, and what is written and cleared."""

import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanoserve.config import ConfigError
from nanoserve.kv_cache import paged_kv_cache
from nanoserve.kv_cache.paged_kv_cache import (
    GIB,
    KVPlan,
    KVSpec,
    PagedKVCache,
    available_memory,
    plan_kv,
)

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU = torch.device("cpu")
# Qwen3-0.6B: 8 x (128 + 128) x 2 = 4096 bytes a token and layer.
QWEN = [KVSpec(8, 128, 128, torch.bfloat16)] * 28
BYTES_PER_BLOCK = 28 * 4096 * 16


def plan(memory: int | None = None, context: int | None = None, model_max: int = 32768, seqs: int = 64) -> KVPlan:
    return plan_kv(QWEN, 16, memory, context, model_max, seqs, CPU)


def test_a_block_holds_keys_and_values_of_every_layer() -> None:
    assert plan(GIB).bytes_per_block == BYTES_PER_BLOCK
    mla = KVSpec(4, 192, 128, torch.float32)
    assert plan_kv([mla], 8, GIB, None, 100, 1, CPU).bytes_per_block == 8 * 4 * (192 + 128) * 4


def test_asked_memory_is_used_in_full() -> None:
    made = plan(10 * BYTES_PER_BLOCK + 5)
    assert (made.num_blocks, made.num_tokens, made.num_bytes) == (10, 160, 10 * BYTES_PER_BLOCK)


def test_the_context_is_cut_to_what_the_memory_holds() -> None:
    assert plan(10 * BYTES_PER_BLOCK).max_context_tokens == 160
    assert plan(10 * BYTES_PER_BLOCK, model_max=100).max_context_tokens == 100


def test_an_asked_context_that_does_not_fit_is_refused_with_both_numbers() -> None:
    assert plan(2 * BYTES_PER_BLOCK, context=32).max_context_tokens == 32
    with pytest.raises(ConfigError, match=rf"{2 * BYTES_PER_BLOCK} bytes .* needs {3 * BYTES_PER_BLOCK} bytes"):
        plan(2 * BYTES_PER_BLOCK, context=33)


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise --kv-memory"):
        plan(BYTES_PER_BLOCK - 1)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"40000.* 32768"):
        plan(GIB, context=40000)


@pytest.mark.parametrize(
    ("free", "context", "budget"),
    [
        (5 * GIB, None, 2 * GIB),  # a share
        (100 * GIB, None, 4 * GIB),  # the limit
        (100 * GIB, 65536, 65536 * 28 * 4096),  # one asked context may go beyond it
    ],
)
def test_unasked_memory_is_a_share_of_what_is_free(
    free: int, context: int | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_kv_cache, "available_memory", lambda: free)
    made = plan(None, context, model_max=65536)
    assert made.budget_bytes == budget
    assert made.num_blocks == budget // BYTES_PER_BLOCK


def test_unasked_memory_is_no_more_than_all_sequences_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kv_cache, "available_memory", lambda: 100 * GIB)
    assert plan(None, context=100, seqs=3).num_blocks == 3 * 7


def test_the_description_can_be_checked_by_hand() -> None:
    text = plan(10 * BYTES_PER_BLOCK, context=80).describe()
    assert "28 layers x 8 KV heads x (128 + 128) x 2 bytes x 16 tokens = 28 x 65536 bytes" in text
    assert f"a block of 16 tokens: {BYTES_PER_BLOCK} bytes" in text
    assert "10 blocks = 160 tokens" in text
    assert "2.0 sequences of 80 tokens" in text


def test_available_memory_is_a_sensible_number() -> None:
    assert 64 << 20 < available_memory() < 1 << 46


def test_what_is_written_lies_in_its_slot_until_it_is_cleared() -> None:
    cache = PagedKVCache([KVSpec(2, 3, 5, torch.float32)] * 2, num_blocks=4, block_size=8, device=CPU)
    slots = torch.tensor([3 * 8 + 7, 1 * 8 + 0])
    keys, values = torch.randn(2, 2, 3), torch.randn(2, 2, 5)
    cache.write(1, cache.lines(slots, 2), keys, values)
    assert torch.equal(cache.layers[1].keys[3, :, 7], keys[:, 0])
    assert torch.equal(cache.layers[1].values[1, :, 0], values[:, 1])
    assert not cache.layers[0].keys.any()
    cache.clear(slots[:1])
    assert not cache.layers[1].keys[3].any()
    assert torch.equal(cache.layers[1].keys[1, :, 0], keys[:, 1])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given when it is used")
def test_memory_is_promised_at_first_and_claimed_beside_the_engine() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 128 << 20
    before = resident()
    cache = PagedKVCache([KVSpec(8, 64, 64, torch.float32)], size // (16 * 8 * 128 * 4), 16, CPU)
    assert resident() - before < size / 2
    keys = torch.randn(8, 1, 64)
    lines = cache.lines(torch.tensor([100 * 16 + 3]), 8)
    claiming = threading.Thread(target=cache.claim_memory)
    claiming.start()
    cache.write(0, lines, keys, keys)
    claiming.join()
    assert resident() - before > size * 0.9
    assert torch.equal(cache.layers[0].keys[100, :, 3], keys[:, 0])
    assert cache.layers[0].values.count_nonzero() == keys.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given when it is used")
def test_a_cache_that_is_closed_claims_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 128 << 20
    before = resident()
    cache = PagedKVCache([KVSpec(8, 64, 64, torch.float32)], size // (16 * 8 * 128 * 4), 16, CPU)
    cache.close()
    claiming = threading.Thread(target=cache.claim_memory)
    claiming.start()
    claiming.join()
    assert resident() - before < size / 2


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system gives no large pages"
)
def test_claimed_memory_lies_in_large_pages() -> None:
    def in_large_pages() -> int:
        """Bytes, of the mapping that has the cache in it."""
        address, is_in = cache.layers[0].keys.data_ptr(), False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                is_in = int(found[1], 16) <= address < int(found[2], 16)
            elif is_in and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
        raise AssertionError("there is no such mapping")

    size = 128 << 20
    cache = PagedKVCache([KVSpec(8, 64, 64, torch.float32)], size // (16 * 8 * 128 * 4), 16, CPU)
    cache.layers[0].keys[:100] = 1
    assert in_large_pages() == 0, "the first step would wait for a large page in every layer"
    cache.claim_memory()
    assert in_large_pages() > size / 2
    assert cache.layers[0].keys.sum() == cache.layers[0].keys[:100].numel()
