"""Attention over the paged KV cache, as one function that transformers calls in place of its own.

A step packs the new tokens of all sequences into one row, without padding: first the sequences with one token, then
the chunks of prompts.

    tokens      [ a | b | c | d d d d | e e e ]        counts 1 1 1 4 3
    queries      every token of the step
    keys         of each sequence: all tokens so far, found through its block table

For every layer the function stores the step's keys and values in the cache, then lets each query see the tokens of
its own sequence up to itself, or the last `window` of them, or those of its own `chunk`. What differs from step to
step arrives as one keyword argument, `paged`, that transformers hands through; what differs from layer to layer was
attached to the module at load (`AttentionLayer`). No mask is built by transformers.

Read `attend_reference` first. `attend` computes the same, batched; a test compares them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from nanoserve.kv_cache.paged_kv_cache import LayerKV, PagedKVCache

NAME = "nanoserve"
REFERENCE_NAME = "nanoserve-reference"

# Single-token sequences are computed in groups whose keys take at most this much: on a CPU what stays in its caches
# between copying and multiplying.
CPU_GROUP_BYTES = 4 << 20
DEVICE_GROUP_BYTES = 256 << 20
# A group is padded to its longest sequence, which may be this much longer than its shortest.
MAX_PADDING = 1.25
# Queries of a chunk are computed in slices, so that masks and scores stay below so many numbers.
MAX_MASK = 1 << 22
MAX_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What is particular to one layer. Attached to its attention module as `paged_layer`."""

    # Its place in the cache.
    index: int
    # A query sees so many tokens, itself included. None = all.
    window: int | None = None
    # A query sees its own chunk of so many tokens, up to itself. None = no chunks.
    chunk: int | None = None
    # (floor, strength): a query at position p is scaled by 1 + strength x ln(1 + floor((p + 1) / floor)) (Llama 4).
    temperature: tuple[float, float] | None = None

    def first_key(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position - position % self.chunk)

    def hides(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Which keys a query must not see, by broadcasting: bool."""
        hidden = key_positions > query_positions
        if self.window is not None:
            hidden = hidden | (key_positions <= query_positions - self.window)
        if self.chunk is not None:
            hidden = hidden | (key_positions < query_positions - query_positions % self.chunk)
        return hidden


class Buffers:
    """Memory that layers and steps use again and again, because fresh large tensors cost page faults."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, num_rows: int, like: Tensor) -> Tensor:
        """[num_rows, like.shape[1]], with anything in it; valid until `name` is taken again."""
        size = num_rows * like.shape[1]
        tensor = self._tensors.get(name)
        if tensor is None or tensor.numel() < size or tensor.dtype != like.dtype:
            tensor = self._tensors[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return tensor[:size].view(num_rows, like.shape[1])


@dataclass(frozen=True, slots=True)
class _Group:
    """Single-token sequences of similar length, computed together."""

    # [n]: their tokens in the step.
    tokens: Tensor
    # [num_kv_heads * n * num_blocks]: which runs of the cache to copy; a run is a block's keys of one head.
    runs: Tensor
    # [num_kv_heads * n, 1, 1, num_blocks * block_size]: 0 or -inf.
    bias: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What attention must know of a step. Positions and lengths count tokens of a sequence from its beginning."""

    cache: PagedKVCache
    buffers: Buffers
    # Of each sequence: tokens computed before this step, and tokens in it.
    starts: list[int]
    counts: list[int]
    # [num_tokens]: where the new keys and values go.
    slots: Tensor
    # [num_tokens]
    positions: Tensor
    # [num_sequences, max_num_blocks]: only what covers start + count is valid.
    block_tables: Tensor
    # What layers of one kind share in this step: groups and masks, made by the first of them.
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_single(self) -> int:
        """Sequences with one token, which come first."""
        return next((i for i, count in enumerate(self.counts) if count > 1), len(self.counts))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(sequence, its first token in the step) of those with more than one token."""
        token = first = self.num_single
        for sequence in range(first, len(self.counts)):
            yield sequence, token
            token += self.counts[sequence]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asks in a step."""

    batch: AttentionBatch
    layer: AttentionLayer
    # [num_heads, num_tokens, key_width]
    queries: Tensor
    # [num_kv_heads, num_tokens, key_width], of the step's tokens; already in the cache too.
    keys: Tensor
    # [num_kv_heads, num_tokens, value_width]
    values: Tensor
    # Scores are scaling x query x key.
    scaling: float
    # Scores s become softcap x tanh(s / softcap). None = they stay.
    softcap: float | None
    # [num_heads]: a score that takes its share of the softmax and gives nothing. None = no such score.
    sinks: Tensor | None

    @property
    def kv(self) -> LayerKV:
        return self.batch.cache.layers[self.layer.index]

    @property
    def is_plain(self) -> bool:
        """torch's fused attention can compute it."""
        return self.softcap is None and self.sinks is None


def _as_interface(attend: Callable[[AttentionCall], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Give `attend` the signature that transformers calls."""

    def paged_attention(
        module: nn.Module,
        query: Tensor,  # [1, num_heads, num_tokens, key_width]
        key: Tensor,  # [1, num_kv_heads, num_tokens, key_width]
        value: Tensor,  # [1, num_kv_heads, num_tokens, value_width]
        attention_mask: None = None,  # noqa: ARG001 (never made)
        *,
        paged: AttentionBatch,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        layer: AttentionLayer = module.paged_layer  # type: ignore[assignment]
        q, k, v = query[0], key[0], value[0]
        if layer.temperature is not None:
            floor, strength = layer.temperature
            scale = 1 + strength * torch.log1p(((paged.positions + 1) / floor).floor())  # [num_tokens]
            q = (q * scale[:, None]).to(q.dtype)
        paged.cache.write(layer.index, paged.slots, k, v)
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(AttentionCall(paged, layer, q, k, v, scaling, softcap, s_aux))
        return out.unsqueeze(0), None  # [1, num_tokens, num_heads, value_width]

    return paged_attention


# ------------------------------------------------------------------------------------------- to be read first


def attend_reference(call: AttentionCall) -> Tensor:
    """One sequence after the other, in float32:  softmax(scaling x q k^T, hidden keys left out) v

    Returns [num_tokens, num_heads, value_width].
    """
    batch, kv, queries = call.batch, call.kv, call.queries
    outputs = []
    token = 0
    for start, count, block_table in zip(batch.starts, batch.counts, batch.block_tables, strict=True):
        length = start + count
        blocks = block_table[: -(-length // batch.cache.block_size)]
        k = kv.keys[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()  # [num_kv_heads, length, key_width]
        v = kv.values[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()
        group = queries.shape[0] // k.shape[0]  # query heads that share a KV head
        q = queries[:, token : token + count].float()  # [num_heads, count, key_width]

        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * call.scaling  # [num_heads, count, length]
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        positions = torch.arange(length, device=q.device)
        scores = scores.masked_fill(call.layer.hides(positions[start:, None], positions), -torch.inf)
        if call.sinks is not None:
            scores = torch.cat([scores, call.sinks.float()[:, None, None].expand(-1, count, 1)], dim=-1)
        weights = scores.softmax(-1)[:, :, :length]
        outputs.append(weights @ v.repeat_interleave(group, 0))  # [num_heads, count, value_width]
        token += count
    return torch.cat(outputs, dim=1).transpose(0, 1).to(queries.dtype)


# --------------------------------------------------------------------------------------- what serves requests


def attend(call: AttentionCall) -> Tensor:
    """The same as attend_reference: single-token sequences in groups, chunks one by one."""
    batch, queries = call.batch, call.queries
    out = queries.new_empty(queries.shape[1], queries.shape[0], call.values.shape[2])
    if batch.num_single:
        for group in _groups(call):
            out[group.tokens] = _attend_group(call, group)
    for sequence, token in batch.chunks():
        end = token + batch.counts[sequence]
        _attend_chunk(call, sequence, token, out[token:end])
    return out  # [num_tokens, num_heads, value_width]


def _groups(call: AttentionCall) -> list[_Group]:
    """The single-token sequences, cut into groups; the same for all layers that see the same and have as many heads."""
    batch, layer, kv = call.batch, call.layer, call.kv
    num_kv_heads, dtype = len(call.keys), call.queries.dtype
    key = ("groups", layer.window, layer.chunk, num_kv_heads, dtype)
    if key not in batch.shared:
        block_size = batch.cache.block_size
        spans = [  # of each sequence: the first block that is seen, and how many
            (first := layer.first_key(start) // block_size, start // block_size - first + 1)
            for start in batch.starts[: batch.num_single]
        ]
        limit = CPU_GROUP_BYTES if batch.cache.device.type == "cpu" else DEVICE_GROUP_BYTES
        max_blocks = limit // (kv.keys[0].numel() * kv.keys.itemsize)
        batch.shared[key] = [
            _make_group(batch, layer, members, spans, num_kv_heads, dtype)
            for members in _similar([num for _, num in spans], max_blocks)
        ]
    groups: list[_Group] = batch.shared[key]
    return groups


def _similar(num_blocks: list[int], max_blocks: int) -> Iterator[list[int]]:
    """Indices in groups of similar value, a group padded to its largest below max_blocks in sum."""
    members: list[int] = []
    for i in sorted(range(len(num_blocks)), key=lambda i: num_blocks[i]):
        fits = (len(members) + 1) * num_blocks[i] <= max_blocks
        if members and not (fits and num_blocks[i] <= num_blocks[members[0]] * MAX_PADDING + 1):
            yield sorted(members)
            members = []
        members.append(i)
    yield sorted(members)


def _make_group(
    batch: AttentionBatch,
    layer: AttentionLayer,
    members: list[int],
    spans: list[tuple[int, int]],
    num_kv_heads: int,
    dtype: torch.dtype,
) -> _Group:
    device, block_size = batch.cache.device, batch.cache.block_size
    sequences = torch.tensor(members, device=device)  # [n]
    first = torch.tensor([[spans[i][0]] for i in members], device=device)  # [n, 1]
    num = torch.tensor([[spans[i][1]] for i in members], device=device)  # [n, 1]
    step = torch.arange(max(spans[i][1] for i in members), device=device)  # [num_blocks]
    # Padding repeats a sequence's own last block: another's may hold NaN within this step.
    columns = first + torch.minimum(step, num - 1)  # [n, num_blocks]
    blocks = batch.block_tables[sequences].gather(1, columns)  # [n, num_blocks]
    heads = torch.arange(num_kv_heads, device=device)[:, None, None]  # [num_kv_heads, 1, 1]
    runs = blocks * num_kv_heads + heads  # [num_kv_heads, n, num_blocks]
    keys = first * block_size + torch.arange(len(step) * block_size, device=device)  # [n, num_keys]
    hidden = layer.hides(batch.positions[sequences, None], keys)  # [n, num_keys]
    return _Group(sequences, runs.flatten(), _bias(hidden, dtype).repeat(num_kv_heads, 1)[:, None, None])


def _attend_group(call: AttentionCall, group: _Group) -> Tensor:
    """[n, num_heads, value_width]"""
    num_kv_heads, n = len(call.keys), len(group.tokens)
    k, v = _copy_runs(call, group.runs, num_kv_heads * n)
    q = call.queries[:, group.tokens].view(num_kv_heads, -1, n, k.shape[2])  # [num_kv_heads, heads a KV head, n, width]
    q = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [num_kv_heads * n, heads a KV head, 1, key_width]
    sinks = call.sinks
    if sinks is not None:
        sinks = sinks.view(num_kv_heads, -1, 1, 1).repeat_interleave(n, 0)
    out = _attend(call, q, k, v, group.bias, sinks)
    return out.view(num_kv_heads, n, -1, v.shape[2]).transpose(0, 1).flatten(1, 2)


def _attend_chunk(call: AttentionCall, sequence: int, token: int, out: Tensor) -> None:
    """One sequence with several tokens. out: [count, num_heads, value_width], its part of the result."""
    batch, layer, num_kv_heads = call.batch, call.layer, len(call.keys)
    start, count, block_size = batch.starts[sequence], batch.counts[sequence], batch.cache.block_size
    end = start + count
    queries, keys, values = (t[:, token : token + count] for t in (call.queries, call.keys, call.values))
    is_fused = call.is_plain and keys.shape[2] == values.shape[2]
    if is_fused and start == 0 and layer.first_key(end - 1) == 0:
        result = functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=call.scaling, enable_gqa=True
        )
        out.copy_(result[0].transpose(0, 1))
        return

    base = 0  # position of the first of `keys`
    if start > 0:
        first_block = layer.first_key(start) // block_size
        base = first_block * block_size
        blocks = batch.block_tables[sequence, first_block : -(-end // block_size)]
        runs = blocks * num_kv_heads + torch.arange(num_kv_heads, device=blocks.device)[:, None]
        keys, values = _copy_runs(call, runs.flatten(), num_kv_heads)
    sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, -1, 1, 1)
    q = queries.view(num_kv_heads, -1, count, queries.shape[2])  # [num_kv_heads, heads a KV head, count, key_width]
    size = max(1, (MAX_MASK if is_fused else MAX_SCORES // len(queries)) // (end - layer.first_key(start)))
    for a in range(0, count, size):
        b = min(a + size, count)
        first = layer.first_key(start + a)
        seen = slice(first - base, start + b - base)
        bias = _chunk_bias(call, first, start + a, start + b)  # [b - a, num_seen]
        part = _attend(call, q[:, :, a:b], keys[:, seen], values[:, seen], bias, sinks)
        out[a:b] = part.flatten(0, 1).transpose(0, 1)


def _chunk_bias(call: AttentionCall, first: int, start: int, end: int) -> Tensor:
    """For queries at start to end - 1 and keys at first to end - 1: [end - start, end - first]"""
    layer, shared = call.layer, call.batch.shared
    key = ("bias", layer.window, layer.chunk, first, start, end, call.queries.dtype)
    if key not in shared:
        keys = torch.arange(first, end, device=call.queries.device)
        shared[key] = _bias(layer.hides(keys[start - first :, None], keys), call.queries.dtype)
    bias: Tensor = shared[key]
    return bias


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _copy_runs(call: AttentionCall, runs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Copy runs of the cache next to each other: keys and values, [num_rows, num_keys, width]."""
    copies = []
    for name, pool in (("keys", call.kv.keys), ("values", call.kv.values)):
        lines = pool.view(pool.shape[0] * pool.shape[1], -1)  # [num_blocks * num_kv_heads, block_size * width]
        copy = call.batch.buffers.take(name, len(runs), lines)
        torch.index_select(lines, 0, runs, out=copy)
        copies.append(copy.view(num_rows, -1, pool.shape[3]))
    return copies[0], copies[1]


def _attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor | None) -> Tensor:
    """q: [n, group, count, key_width]; k, v: [n, num_keys, width]; bias and sinks broadcast to the scores
    [n, group, count, num_keys or 1]. Returns [n, group, count, value_width].

    Few queries are computed by the formula, which for them is faster than torch's fused attention. The products sum
    in float32 and round to the model's type, as in transformers' eager attention; all else is float32.
    """
    n, group, count, _ = q.shape
    if call.is_plain and count > 1:
        out = functional.scaled_dot_product_attention(
            q.flatten(0, 1)[None], k[None], v[None], attn_mask=bias, scale=call.scaling, enable_gqa=True
        )
        return out.view(n, group, count, -1)
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).float().mul_(call.scaling)
    scores = scores.view(n, group, count, -1)  # [n, group, count, num_keys]
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
    scores += bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(n, group, count, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype)
    return torch.bmm(weights.flatten(1, 2), v).view(n, group, count, -1)


AttentionInterface.register(NAME, _as_interface(attend))
AttentionInterface.register(REFERENCE_NAME, _as_interface(attend_reference))
