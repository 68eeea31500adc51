"""Attention over the paged KV cache, as one operator that transformers calls in place of its own.

A step packs the new tokens of all sequences into one row, without padding: first the sequences with one token, then
those with more, up to chunks of prompts.

    tokens      [ a | b | c | d d d d | e e e ]        counts 1 1 1 4 3
    queries      every token of the step
    keys         of each sequence: all tokens so far, found through its block table

For every layer the operator stores the step's keys and values in the cache, then lets each query see the tokens of
its own sequence up to itself, or the last `window` of them, or those of its own `chunk`. No mask is built by
transformers. The operator takes tensors and numbers only, so that a compiled layer can call it; it finds the model's
`Attention`, and in it the step's facts, through `attending`, which the runner opens around the model.

Here are the vocabulary, the operator and `attend_reference`, to be read first; attend.py computes the same, batched,
and is what serves requests. A test compares them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nanoserve.kv_cache.paged_kv_cache import LayerKV, PagedKVCache

NAME = "nanoserve"


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What is particular to one layer, besides its place in the cache."""

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


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What one compilation of `attend_singles` is made for."""

    num_heads: int
    num_kv_heads: int
    key_width: int
    value_width: int
    scaling: float
    softcap: float | None
    has_sinks: bool


# attend_singles of attend.py, compiled, by what it is compiled for.
CompiledAttention = dict[AttentionForm, Callable[..., tuple[Tensor, Tensor]]]


class StepFacts:
    """The sequences of a step, packed one behind the other, those with fewer tokens first: set once a step.

    Positions count tokens of a sequence from its beginning. What there is of each token, and of each row, lies where it
    always lies, so that what was recorded for its address finds the next step there; lists say the same to whoever
    computes on the host.
    """

    def __init__(self, block_tables: Tensor, block_size: int, max_num_tokens: int) -> None:
        """block_tables: [max_num_seqs, max_num_blocks], of all rows; whoever owns them changes them in place."""
        device = block_tables.device
        self.block_size = block_size
        self._all_tables = block_tables
        self._rows = torch.zeros(len(block_tables), dtype=torch.long, device=device)
        self._of_tokens = torch.zeros(3, max_num_tokens, dtype=torch.long, device=device)
        self.set([0], [0], [1])

    def set(self, rows: list[int], starts: list[int], counts: list[int]) -> None:
        """Of each sequence: its row, tokens computed before this step, and tokens in it."""
        self.starts, self.counts = starts, counts
        device = self._all_tables.device
        num_sequences, num_tokens = len(rows), sum(counts)
        given = torch.tensor([rows, starts, counts], device=device)  # [3, num_sequences]
        first = given[2].cumsum(0) - given[2]  # [num_sequences]: each one's first token
        sequences = torch.arange(num_sequences, device=device)
        # [num_sequences]: where each one's blocks stand in the tables.
        self.rows = self._rows[:num_sequences]
        # [num_tokens]: its index in the step, its place in its sequence, and where its key and value go.
        self.sequence_of, self.positions, self.slots = self._of_tokens[:, :num_tokens]
        self.rows.copy_(given[0])
        self.sequence_of.copy_(sequences.repeat_interleave(given[2], output_size=num_tokens))
        place = torch.arange(num_tokens, device=device)
        self.positions.copy_(place + (given[1] - first)[self.sequence_of])
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        # [num_sequences, max_num_blocks]: only what covers its tokens is valid.
        self.block_tables = self._all_tables[self.rows, : -(-longest // self.block_size)]
        blocks = self.block_tables[self.sequence_of, self.positions // self.block_size]  # [num_tokens]
        self.slots.copy_(blocks * self.block_size + self.positions % self.block_size)


class Attention:
    """Attention of one model over its paged cache: where every layer's call comes to. Engine thread only."""

    def __init__(
        self, cache: PagedKVCache, layers: Sequence[AttentionLayer], attend: "Callable[[AttentionCall], Tensor]"
    ) -> None:
        """layers: by their index. attend: computes a layer; returns [num_tokens, num_heads, value_width]."""
        self.cache = cache
        self.layers = layers
        self._buffers: dict[str, Tensor] = {}
        # Filled while the server runs, by compiled.py.
        self.compiled: CompiledAttention = {}
        self._attend = attend

    def prepare(self, facts: StepFacts) -> None:
        """The next calls are of this step."""
        self.facts = facts
        # What layers of one kind share in it: lines, groups and masks, made by the first of them.
        self.shared: dict[Any, Any] = {}

    def run(
        self,
        index: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store keys and values, and attend. Shapes are those of AttentionCall and `attend`."""
        layer = self.layers[index]
        if layer.temperature is not None:
            floor, strength = layer.temperature
            scale = 1 + strength * torch.log1p(((self.facts.positions + 1) / floor).floor())  # [num_tokens]
            queries = (queries * scale[:, None]).to(queries.dtype)
        key = ("lines", len(keys))
        if key not in self.shared:
            self.shared[key] = self.cache.lines(self.facts.slots, len(keys))
        self.cache.write(index, self.shared[key], keys, values)
        kv = self.cache.layers[index]
        return self._attend(AttentionCall(self, self.facts, layer, kv, queries, keys, values, scaling, softcap, sinks))

    def buffer(self, name: str, num_rows: int, like: Tensor) -> Tensor:
        """[num_rows, like.shape[1]], with anything in it; valid until `name` is asked for again.

        Layers and steps use the same memory again and again, because fresh large tensors cost page faults.
        """
        size = num_rows * like.shape[1]
        tensor = self._buffers.get(name)
        if tensor is None or tensor.numel() < size or tensor.dtype != like.dtype:
            tensor = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return tensor[:size].view(num_rows, like.shape[1])


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asks in a step."""

    attention: Attention
    facts: StepFacts
    layer: AttentionLayer
    kv: LayerKV
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
    def form(self) -> AttentionForm:
        return AttentionForm(
            self.queries.shape[0],
            self.keys.shape[0],
            self.keys.shape[2],
            self.values.shape[2],
            self.scaling,
            self.softcap,
            self.sinks is not None,
        )

    @property
    def is_fused(self) -> bool:
        """Chunks are left to torch's fused attention: where it can compute them, and is faster than the formula.

        On a CPU it is not: in bfloat16 with AVX-512, 16 heads of 128 took 14 ms instead of 7 for 512 tokens, 37 instead
        of 23 for 1024; in float32 16 instead of 11, and equal for 1024.
        """
        can_fuse = self.softcap is None and self.sinks is None and self.keys.shape[2] == self.values.shape[2]
        return can_fuse and self.queries.device.type != "cpu"


# ------------------------------------------------------------------------------------------------ the operator


# Computes one layer of the step that runs in this thread. Arguments and result as of Attention.run.
RunLayer = Callable[[int, Tensor, Tensor, Tensor, float, float | None, Tensor | None], Tensor]
_run_layer: ContextVar[RunLayer] = ContextVar("run_layer")


@contextmanager
def attending(run_layer: RunLayer) -> Iterator[None]:
    """While it lasts, the attention of any model that runs in this thread is `run_layer`."""
    token = _run_layer.set(run_layer)
    try:
        yield
    finally:
        _run_layer.reset(token)


_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "paged_attention(Tensor layer, Tensor query, Tensor key, Tensor value, float scaling, float? softcap,"
    " Tensor? sinks) -> Tensor"
)


@torch.library.impl(_library, "paged_attention", "CompositeExplicitAutograd")
def _operator(
    layer: Tensor,  # []: index, on the CPU
    query: Tensor,  # [1, num_heads, num_tokens, key_width]
    key: Tensor,  # [1, num_kv_heads, num_tokens, key_width]
    value: Tensor,  # [1, num_kv_heads, num_tokens, value_width]
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # [1, num_tokens, num_heads, value_width]
    return _run_layer.get()(int(layer), query[0], key[0], value[0], scaling, softcap, sinks).unsqueeze(0)


@torch.library.impl(_library, "paged_attention", "Meta")
def _shape_of_operator(
    _layer: Tensor, query: Tensor, _key: Tensor, value: Tensor, _scaling: float, _softcap: float | None, _sinks: object
) -> Tensor:
    return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,  # noqa: ARG001 (never made)
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The operator in the form that transformers calls. `module.paged_index`, a tensor, says which layer it is."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    index: Tensor = module.paged_index  # type: ignore[assignment]
    return torch.ops.nanoserve.paged_attention(index, query, key, value, scaling, softcap, s_aux), None


AttentionInterface.register(NAME, paged_attention)


# ------------------------------------------------------------------------------------------ to be read first


def attend_reference(call: AttentionCall) -> Tensor:
    """One sequence after the other, in float32:  softmax(scaling x q k^T, hidden keys left out) v

    Returns [num_tokens, num_heads, value_width].
    """
    facts, kv, queries = call.facts, call.kv, call.queries
    outputs = []
    token = 0
    for start, count, block_table in zip(facts.starts, facts.counts, facts.block_tables, strict=True):
        length = start + count
        blocks = block_table[: -(-length // facts.block_size)]
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
