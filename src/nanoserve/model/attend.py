"""What attention computes for requests: the same as attend_reference, batched.

Tokens of sequences with few of them (those that generate) are computed in groups of similar length, each token as if
it were a sequence of its own; chunks of prompts one by one. For groups there are two ways: by the plain formula over
the blocks where they lie, which is fast only once it is compiled (formulas.py), and by copying the blocks next to each
other for torch's batched products. In the first, blocks at the beginning that tokens share, such as a system prompt's,
are read once for all of them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.model.attention import AttentionCall

# A sequence with more tokens in a step is a chunk, whose context is copied once for all of them. Where contexts are
# copied for groups too, only single tokens are grouped.
FEW_TOKENS = 8
# Tokens are computed in groups whose keys take at most this much. On a CPU that copies them first: what stays in its
# caches between copying and multiplying.
CPU_GROUP_BYTES = 4 << 20
GROUP_BYTES = 256 << 20
# A group is padded to its longest context, which may be this much longer than its shortest.
MAX_PADDING = 1.25
# Tokens that share blocks at their beginning are a group if to read them once saves at least so much.
MIN_SAVED_BYTES = 8 << 20
# What attend_singles computes side by side, as far as a CPU has registers: heads, and parts of a value, of at least so
# many numbers.
HEADS_TOGETHER = 4
PARTS_OF_VALUE = 4
MIN_PART = 32
# Queries of a chunk are computed in slices, so that masks and scores stay below so many numbers, and, by the formula,
# of so many queries, which leaves out most of what they must not see, and stays in a CPU's caches.
MAX_MASK = 1 << 22
MAX_SCORES = 1 << 24
MAX_QUERIES = 128


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that is computed in a group."""

    # Index in the step.
    sequence: int
    # The first position in its sequence that it sees, the block of that, and how many blocks from there.
    first_key: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class _Group:
    """Tokens with contexts of similar length, computed together."""

    # [n]: their places in the step.
    tokens: Tensor
    # [num_shared]: blocks that all of them see first, and as a whole.
    shared: Tensor
    # [n, num_blocks]: the other blocks that they see.
    blocks: Tensor
    # [n, num_blocks * block_size]: 0 or -inf.
    bias: Tensor
    num_kv_heads: int
    # These are all tokens of the step.
    is_step: bool

    @cached_property
    def runs(self) -> Tensor:
        """[num_kv_heads * n * num_blocks]"""
        return _runs(self.blocks, self.num_kv_heads)

    @cached_property
    def shared_runs(self) -> Tensor:
        """[num_kv_heads * num_shared]"""
        return _runs(self.shared, self.num_kv_heads)

    @cached_property
    def head_bias(self) -> Tensor:
        """[num_kv_heads * n, 1, 1, num_blocks * block_size]"""
        return self.bias.repeat(self.num_kv_heads, 1)[:, None, None]


def attend(call: AttentionCall) -> Tensor:
    """The same as attend_reference: few tokens in groups, chunks one by one."""
    facts = call.facts
    out = call.queries.new_empty(call.queries.shape[1], call.queries.shape[0], call.values.shape[2])
    compiled = call.attention.compiled.get(call.form)
    num_grouped = bisect_right(facts.counts, 1 if compiled is None else FEW_TOKENS)  # sequences, which come first
    for group in _groups(call, num_grouped, must_copy=compiled is None) if num_grouped else ():
        part = _attend_copies(call, group) if compiled is None else _attend_in_place(call, group, compiled)
        if group.is_step:
            return part
        out[group.tokens] = part
    token = sum(facts.counts[:num_grouped])
    for sequence in range(num_grouped, len(facts.counts)):
        end = token + facts.counts[sequence]
        _attend_chunk(call, sequence, token, out[token:end])
        token = end
    return out  # [num_tokens, num_heads, value_width]


def attend_singles(
    queries: Tensor,  # [n, num_heads, key_width]
    keys: Tensor,  # [num_blocks_of_cache, num_kv_heads, block_size, key_width]
    values: Tensor,  # [num_blocks_of_cache, num_kv_heads, block_size, value_width]
    blocks: Tensor,  # [n, num_blocks]
    bias: Tensor,  # [n, num_blocks * block_size]
    sinks: Tensor | None,  # [num_heads]
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One query a sequence, by the formula, in float32.

    Returns the result, [n, num_heads, value_width], and the logarithm of the sum of exp(score), [n, num_heads].

    Compiled, it is one pass over the keys and one over the values; as it stands, it makes large tensors. Query heads of
    one KV head, and parts of a value, have sums of their own, which the compiler makes side by side: so a key is read
    for several heads at once, and a value as a whole. Without that it takes 1.3 times as long from memory, and 1.5
    times from a cache. Values are summed within a block first, for all heads, so that a block is read from end to end:
    one head's part alone is a page of memory, and its beginning comes late; that took up to 1.5 times as long.
    """
    n, num_blocks = blocks.shape
    _, num_kv_heads, block_size, key_width = keys.shape
    group, value_width = queries.shape[1] // num_kv_heads, values.shape[3]
    num_together = next(num for num in range(HEADS_TOGETHER, 0, -1) if group % num == 0)
    queries = queries.float()
    k = keys[blocks].float().unsqueeze(3)  # [n, num_blocks, num_kv_heads, 1, block_size, key_width]
    v = values[blocks].float().unsqueeze(3)
    v_parts = torch.split(v, max(MIN_PART, value_width // PARTS_OF_VALUE), dim=-1)
    bias = bias.view(n, num_blocks, 1, 1, block_size)
    outs, log_totals = [], []
    for i in range(num_together):
        q = queries.view(n, 1, num_kv_heads, -1, num_together, 1, key_width)[:, :, :, :, i]
        scores = (q * k).sum(-1) * scaling  # [n, num_blocks, num_kv_heads, group // num_together, block_size]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + bias
        largest = scores.amax((1, 4), keepdim=True)
        if sinks is not None:
            sink = sinks.float().view(1, 1, num_kv_heads, -1, num_together, 1)[:, :, :, :, i]
            largest = torch.maximum(largest, sink)
        weights = (scores - largest).exp()
        total = weights.sum((1, 4), keepdim=True)
        if sinks is not None:
            total = total + (sink - largest).exp()
        # [n, num_blocks, num_kv_heads, group // num_together, value_width]
        weighted = torch.cat([(weights.unsqueeze(-1) * part).sum(4) for part in v_parts], -1)
        outs.append(weighted.sum(1) / total[:, 0])  # [n, num_kv_heads, group // num_together, value_width]
        log_totals.append((largest + total.log())[:, 0, :, :, 0])  # [n, num_kv_heads, group // num_together]
    return torch.stack(outs, 3).flatten(1, 3).to(values.dtype), torch.stack(log_totals, 3).flatten(1)


def _attend_in_place(call: AttentionCall, group: _Group, compiled: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """By attend_singles, compiled: [n, num_heads, value_width]"""
    queries = call.queries.transpose(0, 1)
    if not group.is_step:
        queries = queries[group.tokens]
    queries = queries.contiguous()  # [n, num_heads, key_width]
    own, log_total = compiled(queries, call.kv.keys, call.kv.values, group.blocks, group.bias, call.sinks)
    return _with_shared(call, group, queries, own, log_total) if len(group.shared) else own


def _with_shared(call: AttentionCall, group: _Group, queries: Tensor, own: Tensor, own_log_total: Tensor) -> Tensor:
    """From the attention over a group's own blocks, as of attend_singles, that over its shared blocks too.

    Both are means of values, weighted by exp(score). So is their mean, if each counts by the sum of its weights; as in
    cascade inference: https://flashinfer.ai/2024/02/02/cascade-inference.html
    """
    num_kv_heads, n = len(call.keys), len(queries)
    k, v = _copy_runs(call, group.shared_runs, num_kv_heads)  # [num_kv_heads, num_keys, width]
    q = queries.view(n, num_kv_heads, -1, k.shape[2]).transpose(0, 1)
    q = q.flatten(1, 2)  # [num_kv_heads, n * heads a KV head, key_width]
    scores = _scores(call, q, k)
    weights = scores.softmax(-1)  # exp(scores - log_total)
    log_total = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    shared = torch.bmm(weights.to(v.dtype), v)
    shared, log_total = (  # [n, num_heads, value_width], [n, num_heads, 1]
        t.view(num_kv_heads, n, -1, t.shape[-1]).transpose(0, 1).flatten(1, 2) for t in (shared, log_total)
    )
    weight = torch.sigmoid(log_total - own_log_total.unsqueeze(-1))
    return torch.lerp(own.float(), shared.float(), weight).to(own.dtype)


def _groups(call: AttentionCall, num_sequences: int, *, must_copy: bool) -> list[_Group]:
    """The tokens of the first so many sequences, cut into groups; the same for all layers that see the same and have as
    many heads.
    """
    facts, layer, kv, shared = call.facts, call.layer, call.kv, call.attention.shared
    block_size = facts.block_size
    num_kv_heads, dtype = len(call.keys), call.queries.dtype
    key = ("groups", layer.window, layer.chunk, num_kv_heads, dtype, must_copy)
    if key not in shared:
        tokens = [
            _Token(sequence, first, first // block_size, position // block_size - first // block_size + 1)
            for sequence, (start, count) in enumerate(zip(facts.starts[:num_sequences], facts.counts, strict=False))
            for position in range(start, start + count)
            for first in [layer.first_key(position)]
        ]
        limit = CPU_GROUP_BYTES if must_copy and kv.keys.device.type == "cpu" else GROUP_BYTES
        max_blocks = limit // (kv.keys[0].numel() * kv.keys.itemsize)
        families = [(list(range(len(tokens))), 0)] if must_copy else _families(call, tokens)
        shared[key] = [
            _make_group(call, tokens, [members[i] for i in part], num_shared)
            for members, num_shared in families
            for part in _similar([tokens[i].num_blocks - num_shared for i in members], max_blocks)
        ]
    groups: list[_Group] = shared[key]
    return groups


def _families(call: AttentionCall, tokens: list[_Token]) -> list[tuple[list[int], int]]:
    """Indices of tokens, and how many blocks at their beginning they share: 0 = too few to save much.

    The last block that a token sees is never shared.
    """
    facts, kv = call.facts, call.kv
    block_bytes = kv.keys[0].nbytes + kv.values[0].nbytes
    first_blocks = facts.block_tables[:, 0].tolist()
    alike: dict[int, list[int]] = {}  # first block -> those that see all from there
    for i, token in enumerate(tokens):
        if token.first_key == 0:
            alike.setdefault(first_blocks[token.sequence], []).append(i)
    families = []
    for members in alike.values():
        num_blocks = [tokens[i].num_blocks for i in members]
        if (len(members) - 1) * max(num_blocks) * block_bytes < MIN_SAVED_BYTES:
            continue
        tables = facts.block_tables[[tokens[i].sequence for i in members], : min(num_blocks) - 1]
        num_shared = int((tables == tables[0]).all(0).cumprod(0).sum())
        if (len(members) - 1) * num_shared * block_bytes >= MIN_SAVED_BYTES:
            families.append((members, num_shared))
    others = set(range(len(tokens))).difference(*(members for members, _ in families))
    return [*families, (sorted(others), 0)] if others else families


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


def _make_group(call: AttentionCall, tokens: list[_Token], members: list[int], num_shared: int) -> _Group:
    facts, block_size = call.facts, call.facts.block_size
    device, chosen = facts.positions.device, [tokens[i] for i in members]
    # Each [n] or [n, 1].
    index, sequences = torch.tensor([members, [token.sequence for token in chosen]], device=device)
    first = torch.tensor([[token.first_block + num_shared] for token in chosen], device=device)
    num = torch.tensor([[token.num_blocks - num_shared] for token in chosen], device=device)
    step = torch.arange(max(token.num_blocks for token in chosen) - num_shared, device=device)  # [num_blocks]
    # Padding repeats a token's own last block: another sequence's may hold NaN within this step.
    columns = first + torch.minimum(step, num - 1)  # [n, num_blocks]
    blocks = facts.block_tables[sequences].gather(1, columns)  # [n, num_blocks]
    keys = first * block_size + torch.arange(len(step) * block_size, device=device)  # [n, num_keys]
    hidden = call.layer.hides(facts.positions[index, None], keys)  # [n, num_keys]
    shared = facts.block_tables[chosen[0].sequence, :num_shared]
    bias = _bias(hidden, call.queries.dtype)
    return _Group(index, shared, blocks, bias, len(call.keys), len(members) == len(facts.positions))


def _attend_copies(call: AttentionCall, group: _Group) -> Tensor:
    """[n, num_heads, value_width]"""
    num_kv_heads, n = len(call.keys), len(group.tokens)
    k, v = _copy_runs(call, group.runs, num_kv_heads * n)
    q = call.queries[:, group.tokens].view(num_kv_heads, -1, n, k.shape[2])  # [num_kv_heads, heads a KV head, n, width]
    q = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [num_kv_heads * n, heads a KV head, 1, key_width]
    sinks = call.sinks
    if sinks is not None:
        sinks = sinks.view(num_kv_heads, -1, 1, 1).repeat_interleave(n, 0)
    out = _attend(call, q, k, v, group.head_bias, sinks)
    return out.view(num_kv_heads, n, -1, v.shape[2]).transpose(0, 1).flatten(1, 2)


def _attend_chunk(call: AttentionCall, sequence: int, token: int, out: Tensor) -> None:
    """One sequence with many tokens. out: [count, num_heads, value_width], its part of the result."""
    facts, layer, num_kv_heads = call.facts, call.layer, len(call.keys)
    start, count, block_size = facts.starts[sequence], facts.counts[sequence], facts.block_size
    end = start + count
    queries, keys, values = (t[:, token : token + count] for t in (call.queries, call.keys, call.values))
    if call.is_fused and start == 0 and layer.first_key(end - 1) == 0:
        result = functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=call.scaling, enable_gqa=True
        )
        out.copy_(result[0].transpose(0, 1))
        return

    base = 0  # position of the first of `keys`
    if start > 0:
        first_block = layer.first_key(start) // block_size
        base = first_block * block_size
        blocks = facts.block_tables[sequence, first_block : -(-end // block_size)]
        keys, values = _copy_runs(call, _runs(blocks, num_kv_heads), num_kv_heads)
    else:
        keys, values = keys.contiguous(), values.contiguous()
    sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, -1, 1, 1)
    q = queries.view(num_kv_heads, -1, count, queries.shape[2])  # [num_kv_heads, heads a KV head, count, key_width]
    num_keys = end - layer.first_key(start)
    size = max(1, MAX_MASK // num_keys if call.is_fused else min(MAX_QUERIES, MAX_SCORES // len(queries) // num_keys))
    for a in range(0, count, size):
        b = min(a + size, count)
        first = layer.first_key(start + a)
        seen = slice(first - base, start + b - base)
        bias = _chunk_bias(call, first, start + a, start + b)  # [b - a, num_seen]
        part = _attend(call, q[:, :, a:b], keys[:, seen], values[:, seen], bias, sinks)
        out[a:b] = part.flatten(0, 1).transpose(0, 1)


def _chunk_bias(call: AttentionCall, first: int, start: int, end: int) -> Tensor:
    """For queries at start to end - 1 and keys at first to end - 1: [end - start, end - first]"""
    layer, shared = call.layer, call.attention.shared
    key = ("bias", layer.window, layer.chunk, first, start, end, call.queries.dtype)
    if key not in shared:
        keys = torch.arange(first, end, device=call.queries.device)
        shared[key] = _bias(layer.hides(keys[start - first :, None], keys), call.queries.dtype)
    bias: Tensor = shared[key]
    return bias


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _runs(blocks: Tensor, num_kv_heads: int) -> Tensor:
    """Which runs of the cache hold these blocks, a run being a block's keys of one head: [num_kv_heads * num_blocks]"""
    heads = torch.arange(num_kv_heads, device=blocks.device)[:, None]
    return (blocks.flatten() * num_kv_heads + heads).flatten()


def _copy_runs(call: AttentionCall, runs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Copy runs of the cache next to each other: keys and values, [num_rows, num_keys, width]."""
    copies = []
    for name, pool in (("keys", call.kv.keys), ("values", call.kv.values)):
        lines = pool.view(pool.shape[0] * pool.shape[1], -1)  # [num_blocks * num_kv_heads, block_size * width]
        copy = call.attention.buffer(name, len(runs), lines)
        torch.index_select(lines, 0, runs, out=copy)
        copies.append(copy.view(num_rows, -1, pool.shape[3]))
    return copies[0], copies[1]


def _attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor | None) -> Tensor:
    """q: [n, group, count, key_width]; k, v: [n, num_keys, width]; bias and sinks broadcast to the scores
    [n, group, count, num_keys or 1]. Returns [n, group, count, value_width].

    In the formula, weights are rounded to the model's type, and scores too unless they are capped, as in transformers'
    eager attention; sums are float32.
    """
    n, group, count, _ = q.shape
    if call.is_fused and count > 1:
        out = functional.scaled_dot_product_attention(
            q.flatten(0, 1)[None], k[None], v[None], attn_mask=bias, scale=call.scaling, enable_gqa=True
        )
        return out.view(n, group, count, -1)
    q = q.flatten(1, 2)
    if call.softcap is None:
        bias = bias.expand(*bias.shape[:-3], group, count, -1).flatten(-3, -2)  # [n or none, group * count, num_keys]
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=call.scaling).view(n, group, count, -1)
    else:
        scores = _scores(call, q, k).view(n, group, count, -1) + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(n, group, count, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : v.shape[1]].to(v.dtype)
    return torch.bmm(weights.flatten(1, 2), v).view(n, group, count, -1)


def _scores(call: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
    """q: [n, num_queries, key_width]; k: [n, num_keys, key_width]. Returns [n, num_queries, num_keys]: float32"""
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(call.scaling)
    return scores if call.softcap is None else scores.div_(call.softcap).tanh_().mul_(call.softcap)
