"""Weights in the layout that a CPU's matrix units want, made once at load.

A product works on tiles of the weight. Given a plain weight, the library rearranges it in every call, which for a few
rows costs as much as the product itself; given a packed one it does not. On AVX2 in float32, a 1024 x 3072 layer runs
3.4 times as fast at 4 rows, 2.7 times at 8, 1.4 times at 32, and 0.85 times at 2048; on AVX-512 in bfloat16 it is 1.6
times at 1 and at 8 rows, 1.3 times at 32, and equal at 1024. Packing changes no number and no result beyond rounding.
Only plain linear layers are packed; experts that are 3-D tensors, and GPT-2's transposed layers, stay as they are.

In bfloat16 one or two rows take oneDNN 1.5 times as long as the weight takes to come from memory. `multiply_pairs`
reads the same packed memory and, once compiled, takes no longer than that. It knows one layout, that of AVX-512:

    for 64 rows of the weight
      for two neighbours k, k + 1 in a row
        64 pairs (weight[0, k], weight[0, k + 1]), (weight[1, k], weight[1, k + 1]), ...    one 32-bit number each

Each layer is compared with it when it is packed. Where oneDNN has another layout, it multiplies alone.
"""

import ctypes
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoserve.model.threads import one_thread, usable_cpus

# Rows that the layout is chosen for. On AVX-512 this one is as good at 1 and 1024 rows as those made for them.
TYPICAL_ROWS = 32
# The weight's rows in a tile of the layout, and how many of them are summed side by side: a vector of AVX-512.
TILE = 64
LANES = 16
# Rows that are multiplied by multiply_pairs, one compilation for each.
FEW_ROWS = (1, 2)

# Number of rows -> multiply_pairs, compiled. Filled while the server runs, by compiled.py.
kernels: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}


class PackedLinear(nn.Module):
    """Stands for an nn.Linear whose weight is packed. Takes [..., in_features], gives [..., out_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        # For torch it has the shape of the weight, and no storage.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        # The same memory for multiply_pairs.
        self.pairs = _as_pairs(self._packed, weight)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return _multiply(x, self._packed, self.pairs, self.bias, self.out_features)
        out: Tensor
        if self.pairs is not None and x.shape[:-1].numel() == 1:  # a part of the compiled layer
            out = multiply_pairs(x.reshape(1, -1, 2), self.pairs).view(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias
        out = torch.ops.nanoserve.packed_linear(x, self._packed, self.pairs, self.bias, self.out_features)
        return out


class PackedEmbedding(nn.Module):
    """Stands for an nn.Embedding whose weight the head shares: reads the head's, so that there is no second one.

    Takes [...], gives [..., embedding_dim].
    """

    def __init__(self, head: PackedLinear) -> None:
        """head: one that has pairs."""
        super().__init__()
        assert head.pairs is not None
        self.num_embeddings = head.out_features
        self.embedding_dim = head.in_features
        # The second is a view of the first.
        self._packed, self._pairs = head._packed, head.pairs

    def forward(self, ids: Tensor) -> Tensor:
        pairs: Tensor = self._pairs[ids // TILE, :, ids % TILE]  # [..., embedding_dim / 2]
        return pairs.view(torch.bfloat16)

    @property
    def weight(self) -> Tensor:
        """Unpacked, for a model that looks at it."""
        return self.forward(torch.arange(self.num_embeddings))


# oneDNN's product as an operator of our own: torch.compile would put its own in place, which wants its weight as a
# constant.
_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "packed_linear(Tensor x, Tensor packed, Tensor? pairs, Tensor? bias, int out_features) -> Tensor"
)


@torch.library.impl(_library, "packed_linear", "CPU")
@torch.library.impl(_library, "packed_linear", "MkldnnCPU")
def _multiply(x: Tensor, packed: Tensor, pairs: Tensor | None, bias: Tensor | None, _out_features: int) -> Tensor:
    num_rows = x.shape[:-1].numel()
    kernel = kernels.get(num_rows)
    out: Tensor
    if pairs is None or kernel is None:
        out = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out
    out = kernel(x.reshape(num_rows, -1, 2), pairs).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


@torch.library.impl(_library, "packed_linear", "Meta")
def _shape_of_product(x: Tensor, _packed: Tensor, _pairs: object, _bias: object, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def multiply_pairs(x: Tensor, pairs: Tensor) -> Tensor:
    """x: [num_rows, width / 2, 2]; pairs: [num_tiles, width / 2, TILE], int32. Returns [num_rows, num_tiles * TILE].

    To be compiled for a fixed number of rows. As it stands, it makes large tensors.
    """
    # A number of bfloat16 is the upper half of one of float32.
    low = torch.split((pairs << 16).view(torch.float32), LANES, dim=2)
    high = torch.split((pairs & -0x10000).view(torch.float32), LANES, dim=2)
    outs = []
    for first, second in zip(*x.float().unbind(2), strict=True):  # of each row: [width / 2]
        sums = [(first[:, None] * a + second[:, None] * b).sum(1) for a, b in zip(low, high, strict=True)]
        outs.append(torch.cat(sums, dim=1).flatten())
    return torch.stack(outs).to(x.dtype)


def has_pairs(module: nn.Module) -> bool:
    """Whether multiply_pairs can be used for it."""
    return isinstance(module, PackedLinear) and module.pairs is not None


def _as_pairs(packed: Tensor, weight: Tensor) -> Tensor | None:
    """The packed memory as multiply_pairs takes it, if it has that layout: [num_tiles, width / 2, TILE]."""
    num_rows, width = weight.shape
    if weight.dtype != torch.bfloat16 or num_rows % TILE or width % 2:
        return None
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return None
    address = torch.ops.mkldnn.data_ptr(packed)
    memory = (ctypes.c_int32 * (weight.numel() // 2)).from_address(address)
    pairs = torch.frombuffer(memory, dtype=torch.int32).view(-1, width // 2, TILE)
    tiles = weight.contiguous().view(torch.int32).view(-1, TILE, width // 2)
    is_as_expected = all(torch.equal(pairs[i], tiles[i].t()) for i in (0, len(tiles) // 2, -1))
    return pairs if is_as_expected else None


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing helps: float32 on x86, and bfloat16 on a CPU whose oneDNN computes in it."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and platform.machine() in ("x86_64", "AMD64")


def pack_linears(model: nn.Module) -> None:
    """Replace every plain linear layer; originals are released one by one, so that memory stays flat.

    Each is packed by one thread, several at a time: beside a thread that does something else, as when a server starts,
    threads that share one layer would wait for each other.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    num_threads, _ = usable_cpus()
    with one_thread(), ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for _ in threads.map(_pack, places):
            pass


def _pack(place: tuple[nn.Module, str]) -> None:
    parent, name = place
    setattr(parent, name, PackedLinear(getattr(parent, name)))


def pack_model(model: PreTrainedModel) -> None:
    """Its linear layers, and with the head the embedding, if they share a weight and the layout is known."""
    embedding = model.get_input_embeddings()
    is_tied = type(embedding) is nn.Embedding and embedding.weight is model.get_output_embeddings().weight
    pack_linears(model)
    head = model.get_output_embeddings()
    if is_tied and has_pairs(head):
        for parent in model.modules():
            for name, child in parent.named_children():
                if child is embedding:
                    setattr(parent, name, PackedEmbedding(head))
