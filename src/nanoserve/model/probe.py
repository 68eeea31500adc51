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
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Watch:
    """What reached attention in one run."""

    modules: list[nn.Module] = field(default_factory=list)
    specs: list[KVSpec] = field(default_factory=list)
    masks: list[object] = field(default_factory=list)


_watch: ContextVar[_Watch] = ContextVar("watch")


@dataclass(frozen=True, slots=True)
class _MaskRecipe:
    """Handed to the layers in place of a mask: the rule it would have been made by."""

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def learn_layers(
    model: PreTrainedModel, trunk: nn.Module, max_position: int
) -> tuple[list[AttentionLayer], list[KVSpec]]:
    """Number the attention modules, and return what is particular to each and what it keeps in the cache.

    max_position: the longest context that can be asked for. Raises NotServable.
    """
    model.set_attn_implementation(NAME)
    try:
        watch = _check_independence(model, trunk, max_position)
    finally:
        model.set_attn_implementation(attention.NAME)
    if not watch.modules:
        raise NotServable("it has no attention that can be replaced")
    if len(set(map(id, watch.modules))) != len(watch.modules):
        raise NotServable("an attention layer is used more than once for a token")
    layers, specs = [], []
    for index, (module, spec, mask) in enumerate(zip(watch.modules, watch.specs, watch.masks, strict=True)):
        window, chunk = _read_mask(mask, max_position, model.device)
        temperature = getattr(module, "query_temperature", None)
        module.paged_index = torch.tensor(index)  # a tensor: a compiled layer takes no other number
        layers.append(AttentionLayer(window, chunk, temperature))
        specs.append(KVSpec(spec.num_kv_heads, spec.key_width, spec.value_width, spec.dtype, window or chunk))
    return layers, specs


def _mask_stand_in(*_: object, mask_function: Callable[..., Tensor], **__: object) -> _MaskRecipe:
    return _MaskRecipe(mask_function)


def _watched_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, key_width]
    key: Tensor,  # [1, num_kv_heads, num_tokens, key_width]
    value: Tensor,  # [1, num_kv_heads, num_tokens, value_width]
    attention_mask: object,
    **arguments: object,
) -> tuple[Tensor, None]:
    watch = _watch.get()
    is_causal = arguments.pop("is_causal", None)
    unknown = sorted(k for k, v in arguments.items() if k not in KNOWN_ARGUMENTS and v is not None and v is not False)
    if unknown:
        raise NotServable(f"its attention takes {', '.join(unknown)}, which the paged attention does not know")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotServable("its attention is not causal")
    watch.modules.append(module)
    watch.masks.append(attention_mask)
    watch.specs.append(KVSpec(key.shape[1], key.shape[3], value.shape[3], key.dtype))
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


def _check_independence(model: PreTrainedModel, trunk: nn.Module, max_position: int) -> _Watch:
    """Run the same tokens as they are, in another order, and with one of them far away."""
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (NUM_TOKENS,), generator=generator).to(device)
    positions = torch.arange(NUM_TOKENS, device=device).clamp(max=max_position - 1)
    order = torch.randperm(NUM_TOKENS, generator=generator).to(device)
    far = positions.clone()
    far[-1] = max_position - 1

    def run(tokens: Tensor, positions: Tensor) -> tuple[Tensor, _Watch]:
        watch = _Watch()
        _watch.set(watch)
        with torch.inference_mode():
            out = trunk(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return out[0][0], watch  # [num_tokens, hidden]

    plain, watch = run(tokens, positions)
    shuffled, _ = run(tokens[order], positions[order])
    distant, _ = run(tokens, far)
    tolerance = max(TOLERANCE, TOLERATED_STEPS * torch.finfo(plain.dtype).eps)
    if _differs(plain[order], shuffled, tolerance):
        raise NotServable("a token depends on others outside attention (a convolution, a recurrent or other state)")
    if _differs(plain[:-1], distant[:-1], tolerance):
        raise NotServable("a token depends on the positions of others outside attention")
    return watch


def _differs(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """A checkpoint with NaN in it is not judged here."""
    return bool((a.float() - b.float()).norm() > tolerance * a.float().norm())


def _read_mask(mask: object, max_position: int, device: torch.device) -> tuple[int | None, int | None]:
    """(window, chunk) of the rule that a layer's mask is made by, which may have tensors of its own on the device."""
    if not isinstance(mask, _MaskRecipe):
        raise NotServable("a layer makes its own attention mask, or has none")

    def first_seen(query: int) -> int:
        keys = torch.arange(query + 2, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        allowed = mask.rule(zero, zero, zero + query, keys).expand(query + 2)  # [query + 2]: bool
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
    return layer.window, layer.chunk
