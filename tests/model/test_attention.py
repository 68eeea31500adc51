"""The batched attention computes what the reference computes, for every shape of step and layer."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import KVSpec, PagedKVCache
from nanoserve.model import attend as attend_module
from nanoserve.model.attend import attend, attend_singles
from nanoserve.model.attention import Attention, AttentionCall, AttentionLayer, StepFacts, attend_reference

BLOCK_SIZE = 4
NUM_HEADS = 4
CPU = torch.device("cpu")
# (start, count): single tokens at short, long and equal lengths, chunks from the beginning and from the middle.
STEPS = {
    "single": [(5, 1), (3, 1), (70, 1), (60, 1), (71, 1), (40, 1)],
    "chunks": [(5, 2), (0, 9), (30, 17)],
    "mixed": [(12, 1), (63, 1), (21, 5), (0, 33)],
    "few": [(9, 1), (70, 1), (69, 2), (0, 3), (40, 5), (33, 8), (11, 9)],
}
LAYERS = {
    "full": AttentionLayer(),
    "window": AttentionLayer(window=6),
    "wide window": AttentionLayer(window=40),
    "chunk": AttentionLayer(chunk=8),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "one KV head": {"num_kv_heads": 1},
    "narrow values": {"value_width": 6},
}


def make_call(
    step: list[tuple[int, int]],
    layer: AttentionLayer,
    *,
    num_kv_heads: int = 2,
    value_width: int = 8,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    prefixes: Sequence[tuple[int, int]] = (),
) -> AttentionCall:
    """A step over a cache full of random numbers, the step's own keys and values among them.

    prefixes: (sequence, blocks): it has so many blocks of the first sequence's in place of its own first ones.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks = [-(-(start + count) // BLOCK_SIZE) for start, count in step]
    order = torch.randperm(sum(num_blocks), generator=generator)
    # What a row does not use names a block of the first sequence: reading it would show.
    tables = torch.full((len(step), max(num_blocks)), int(order[num_blocks[0] - 1]))
    for row, (end, num) in enumerate(zip(itertools.accumulate(num_blocks), num_blocks, strict=True)):
        tables[row, :num] = order[end - num : end]
    for row, num in prefixes:
        tables[row, :num] = tables[0, :num]
    cache = PagedKVCache([KVSpec(num_kv_heads, 8, value_width, dtype)], sum(num_blocks), BLOCK_SIZE, CPU)
    for pool in (cache.layers[0].keys, cache.layers[0].values):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    facts = StepFacts(tables, BLOCK_SIZE, 99)
    facts.set(list(range(len(step))), [start for start, _ in step], [count for _, count in step])
    attention = Attention(cache, [layer], attend)
    attention.prepare(facts)
    q, k, v = (
        torch.randn(heads, len(facts.positions), width, generator=generator).to(dtype)
        for heads, width in ((NUM_HEADS, 8), (num_kv_heads, 8), (num_kv_heads, value_width))
    )
    cache.write(0, cache.lines(facts.slots, num_kv_heads), k, v)
    return AttentionCall(attention, facts, layer, cache.layers[0], q, k, v, 0.4, softcap, sinks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_both_implementations_agree(step: str, layer: str, form: str) -> None:
    call = make_call(STEPS[step], LAYERS[layer], **FORMS[form])
    torch.testing.assert_close(attend(call), attend_reference(call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_the_fused_attention_of_accelerators_agrees(step: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionCall, "is_fused", property(lambda _: True))
    call = make_call(STEPS[step], LAYERS[layer], **FORMS["plain"])
    torch.testing.assert_close(attend(call), attend_reference(call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_the_formula_for_few_tokens_agrees(step: str, layer: str, form: str) -> None:
    call = make_call(STEPS[step], LAYERS[layer], **FORMS[form])
    call.attention.compiled[call.form] = lambda *tensors: attend_singles(*tensors, call.scaling, call.softcap)
    torch.testing.assert_close(attend(call), attend_reference(call), rtol=1e-5, atol=1e-5)


def test_up_to_eight_tokens_of_a_sequence_are_no_chunk_once_the_formula_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = []
    attend_chunk = attend_module._attend_chunk
    monkeypatch.setattr(attend_module, "_attend_chunk", lambda *call: (chunks.append(call[1]), attend_chunk(*call)))
    call = make_call(STEPS["few"], LAYERS["full"])
    attend(call)
    assert chunks == [2, 3, 4, 5, 6]
    chunks.clear()
    call.attention.compiled[call.form] = lambda *tensors: attend_singles(*tensors, call.scaling, call.softcap)
    attend(call)
    assert [call.facts.counts[sequence] for sequence in chunks] == [9]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_that_sequences_share_are_read_once(layer: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_module, "MIN_SAVED_BYTES", 1)
    steps = {
        # All share 5 blocks, some more; lengths so that each has a block of its own, if of one token only.
        "all": ([(20, 1), (23, 1), (70, 1), (41, 1)], [(1, 5), (2, 9), (3, 9)], {5: 4}),
        # The second shares nothing, and the last two are a chunk.
        "some": ([(30, 1), (70, 1), (33, 1), (28, 17)], [(2, 6), (3, 6)], {6: 2, 0: 1}),
        # The second has all blocks of the first, whose last one is still its own.
        "a whole sequence": ([(23, 1), (30, 1)], [(1, 6)], {5: 2}),
        "none": (STEPS["single"], [], {0: len(STEPS["single"])}),
    }
    for step, prefixes, families in steps.values():
        call = make_call(step, LAYERS[layer], prefixes=prefixes, **FORMS[form])
        call.attention.compiled[call.form] = lambda *tensors, call=call: attend_singles(  # type: ignore[misc]
            *tensors, call.scaling, call.softcap
        )
        torch.testing.assert_close(attend(call), attend_reference(call), rtol=1e-5, atol=1e-5)
        if layer == "full":
            found: dict[int, int] = {}
            for group in attend_module._groups(call, bisect_right(call.facts.counts, 8), must_copy=False):
                found[len(group.shared)] = found.get(len(group.shared), 0) + len(group.tokens)
            assert found == families


@pytest.mark.parametrize("form", ["plain", "softcap"])
def test_they_agree_however_the_work_is_cut(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_module, "CPU_GROUP_BYTES", 20 * BLOCK_SIZE * 2 * 8 * 4)
    monkeypatch.setattr(attend_module, "MAX_MASK", 64)
    monkeypatch.setattr(attend_module, "MAX_SCORES", 64 * NUM_HEADS)
    for step, layer in itertools.product(STEPS.values(), LAYERS.values()):
        call = make_call(step, layer, **FORMS[form])
        torch.testing.assert_close(attend(call), attend_reference(call), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_as_its_precision_allows() -> None:
    call = make_call(STEPS["mixed"], LAYERS["full"], dtype=torch.bfloat16)
    torch.testing.assert_close(attend(call), attend_reference(call), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("implementation", [attend, attend_reference])
@pytest.mark.parametrize("layer", LAYERS)
def test_nan_of_one_sequence_stays_in_it(implementation: Any, layer: str) -> None:
    """In one step, before anything is cleared: sequences share groups and copies, but no block."""
    step = STEPS["single"] + STEPS["chunks"]
    clean = make_call(step, LAYERS[layer])
    for victim, (start, count) in enumerate(step):
        call = make_call(step, LAYERS[layer])
        first = sum(call.facts.counts[:victim])
        tokens = slice(first, first + count)
        keys, values = call.keys.clone(), call.values.clone()
        keys[:, tokens], values[:, tokens] = torch.nan, torch.nan
        cache = call.attention.cache
        cache.write(0, cache.lines(call.facts.slots, len(keys)), keys, values)
        out = implementation(replace(call, keys=keys, values=values))
        others = torch.ones(len(out), dtype=torch.bool)
        others[tokens] = False
        assert out[tokens].isnan().all(), f"sequence at {start}"
        assert torch.equal(out[others], implementation(clean)[others])


def test_single_tokens_of_very_different_length_are_not_padded_to_the_longest() -> None:
    call = make_call([(400, 1), *[(5, 1)] * 20], LAYERS["full"])
    groups = attend_module._groups(call, len(call.facts.counts), must_copy=True)
    assert sorted(len(group.tokens) for group in groups) == [1, 20]


def test_a_window_reads_only_the_blocks_it_sees() -> None:
    call = make_call([(400, 1), (200, 1)], LAYERS["window"])
    (group,) = attend_module._groups(call, len(call.facts.counts), must_copy=True)
    assert len(group.runs) <= 2 * 2 * (6 // BLOCK_SIZE + 2)


def test_llama4_queries_grow_with_their_position() -> None:
    """1 + strength x ln(1 + floor((p + 1) / floor)), from the position and not from the place in the step."""
    call = make_call([(15, 1), (100, 1)], AttentionLayer(temperature=(8.0, 0.5)))
    out = call.attention.run(0, call.queries, call.keys, call.values, call.scaling, None, None)
    scale = 1 + 0.5 * torch.tensor([16 // 8, 101 // 8]).log1p()
    want = attend_reference(replace(call, queries=call.queries * scale[:, None]))
    torch.testing.assert_close(out, want)
