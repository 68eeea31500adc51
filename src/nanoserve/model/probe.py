"""What a loaded model really does, found by running it on eight tokens instead of reading its config.

The server relies on two things that no config states for every architecture:

1. Outside attention each token is computed alone, from itself and its position. Then tokens of many sequences can be
   packed into one row, and all that one token knows of another is in the KV cache. A convolution, a recurrent state or
   a RoPE that looks at the longest position in the batch breaks this.
2. Attention is causal, perhaps with a window or in chunks, and says all that shapes it in arguments that are known
   here. A mask of another form or an unknown argument breaks this.

`learn_layers` tries both: it puts a stand-in for attention and for the making of masks into the model, watches what
reaches them, and gives every attention module its index. A model that does something else is refused.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nanoserve.kv_cache.paged_kv_cache import KVSpec
from nanoserve.model import attention
from nanoserve.model.attention import AttentionLayer

NAME = "nanoserve-probe"
NUM_TOKENS = 8
# Two runs of the same tokens may differ by rounding: so much of the size of the numbers, or so many times the
# precision of their type.
TOLERANCE = 1e-4
TOLERATED_STEPS = 4

# Arguments of the attention call that are understood, or say nothing that matters here.
KNOWN_ARGUMENTS = {"dropout", "scaling", "softcap", "s_aux", "sliding_window", "position_ids", "cache_position"}


class NotServable(Exception):
    """The model does something that packed tokens and a KV cache cannot reproduce."""


# A call of attention: its module, what it keeps of a token, and its mask.
_Call = tuple[nn.Module, KVSpec, object]
# Those of the run that goes on.
_calls: ContextVar[list[_Call]] = ContextVar("calls")


def learn_layers(
    model: PreTrainedModel, trunk: nn.Module, max_position: int
) -> tuple[list[AttentionLayer], list[KVSpec]]:
    """Number the attention modules, and return what is particular to each and what it keeps in the cache.

    max_position: the longest context that can be asked for. Raises NotServable.
    """
    model.set_attn_implementation(NAME)
    try:
        calls = _check_independence(model, trunk, max_position)
    finally:
        model.set_attn_implementation(attention.NAME)
    if not calls:
        raise NotServable("it has no attention that can be replaced")
    if len({module for module, _, _ in calls}) != len(calls):
        raise NotServable("an attention layer is used more than once for a token")
    layers, specs = [], []
    for index, (module, spec, mask) in enumerate(calls):
        layer = _read_mask(mask, max_position, model.device)
        module.paged_index = torch.tensor(index)  # a tensor: a compiled layer takes no other number
        layers.append(replace(layer, temperature=getattr(module, "query_temperature", None)))
        specs.append(replace(spec, window=layer.window or layer.chunk))
    return layers, specs


def _mask_stand_in(*_: object, mask_function: Callable[..., Tensor], **__: object) -> Callable[..., Tensor]:
    """Handed to the layers in place of a mask: the rule that it would have been made by."""
    return mask_function


def _watched_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, key_width]
    key: Tensor,  # [1, num_kv_heads, num_tokens, key_width]
    value: Tensor,  # [1, num_kv_heads, num_tokens, value_width]
    attention_mask: object,
    **arguments: object,
) -> tuple[Tensor, None]:
    is_causal = arguments.pop("is_causal", None)
    unknown = sorted(k for k, v in arguments.items() if k not in KNOWN_ARGUMENTS and v is not None and v is not False)
    if unknown:
        raise NotServable(f"its attention takes {', '.join(unknown)}, which the paged attention does not know")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotServable("its attention is not causal")
    spec = KVSpec(key.shape[1], key.shape[3], value.shape[3], key.dtype)
    _calls.get().append((module, spec, attention_mask))
    return stand_in(0, query[0], key[0], value[0], 1.0, None, None).unsqueeze(0), None


def stand_in(
    _: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention in which a token sees only itself, but which depends on all that it is given: for trial runs.

    Arguments and result are those of attention.py.
    """
    scores = (q * scaling).tanh().mean(-1, keepdim=True)  # [num_heads, num_tokens, 1]
    if softcap is not None:
        scores = scores / softcap
    if sinks is not None:
        scores = scores + sinks[:, None, None]
    out = (v + k.tanh().mean(-1, keepdim=True)).repeat_interleave(len(q) // len(k), 0) * (1 + scores)
    return out.transpose(0, 1).to(v.dtype).contiguous()  # [num_tokens, num_heads, value_width]


AttentionInterface.register(NAME, _watched_attention)
AttentionMaskInterface.register(NAME, _mask_stand_in)


def _check_independence(model: PreTrainedModel, trunk: nn.Module, max_position: int) -> list[_Call]:
    """Run the same tokens as they are, in another order, and with one far away. Returns the calls of the first run."""
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (NUM_TOKENS,), generator=generator).to(device)
    positions = torch.arange(NUM_TOKENS, device=device).clamp(max=max_position - 1)
    order = torch.randperm(NUM_TOKENS, generator=generator).to(device)
    far = positions.clone()
    far[-1] = max_position - 1

    def run(tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[_Call]]:
        calls: list[_Call] = []
        _calls.set(calls)
        with torch.inference_mode():
            out = trunk(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return out[0][0], calls  # [num_tokens, hidden]

    plain, calls = run(tokens, positions)
    shuffled, _ = run(tokens[order], positions[order])
    distant, _ = run(tokens, far)
    tolerance = max(TOLERANCE, TOLERATED_STEPS * torch.finfo(plain.dtype).eps)
    if _differs(plain[order], shuffled, tolerance):
        raise NotServable("a token depends on others outside attention (a convolution, a recurrent or other state)")
    if _differs(plain[:-1], distant[:-1], tolerance):
        raise NotServable("a token depends on the positions of others outside attention")
    return calls


def _differs(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """A checkpoint with NaN in it is not judged here."""
    return bool((a.float() - b.float()).norm() > tolerance * a.float().norm())


def _read_mask(mask: Any, max_position: int, device: torch.device) -> AttentionLayer:
    """Window or chunk of the rule that a layer's mask is made by, which may have tensors of its own on the device."""
    if not callable(mask):
        raise NotServable("a layer makes its own attention mask, or has none")

    def first_seen(query: int) -> int:
        keys = torch.arange(query + 2, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        allowed = mask(zero, zero, zero + query, keys).expand(query + 2)  # [query + 2]: bool
        first = int(allowed.int().argmax())
        expected = (keys >= first) & (keys <= query)
        if not torch.equal(allowed, expected):
            raise NotServable("its attention is not causal, or its mask has holes")
        return first

    last = max_position - 1
    first = first_seen(last)
    if first == 0:
        layer = AttentionLayer()
    elif first_seen(first) == first:  # the first of a chunk sees only itself
        layer = AttentionLayer(chunk=first - first_seen(first - 1))
    else:
        layer = AttentionLayer(window=last - first + 1)
    around = {0, 1, 2, first - 1, first, first + 1, last // 2, last // 3, last - 1, last}
    if any(first_seen(q) != layer.first_key(q) for q in around if 0 <= q <= last):
        raise NotServable("its attention mask is neither full nor a window nor chunks")
    return layer
