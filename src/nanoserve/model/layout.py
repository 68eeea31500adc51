"""Which form each weight of a model is served in: the one place that knows all kinds.

narrow   where the checkpoint's type is narrower than that of the arithmetic, and loses nothing   (narrow.py)
packed   else, where the CPU multiplies packed weights                                           (packing.py)
plain    else                                                                                    (weights.py)
"""

import torch
from torch import Tensor, nn

from nanoserve.model.narrow import NarrowWeight, can_narrow, is_exact
from nanoserve.model.packing import PackedWeight
from nanoserve.model.torch_internals import can_pack
from nanoserve.model.weights import LINEAR, Kind, Layout, PlainWeight, plain_weight


def kept_dtype(device: torch.device, dtype: torch.dtype, stored: torch.dtype, *, is_compiled: bool) -> torch.dtype:
    """The type in which a model that is computed in `dtype` may keep what the checkpoint has in `stored`."""
    return stored if is_compiled and can_narrow(device, dtype, stored) else dtype


def decide_layout(model: nn.Module, device: torch.device, dtype: torch.dtype, kept: torch.dtype) -> Layout:
    """Of plain linear layers, and of embeddings that can be narrow or share the weight of a layer."""
    rest = Kind(PackedWeight if can_pack(device, dtype) else PlainWeight, dtype)
    uses: dict[Tensor, dict[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) in (*LINEAR, nn.Embedding):
            uses.setdefault(module.weight, {})[path] = module
    layout: Layout = {}
    for weight, modules in uses.items():
        may_narrow = kept != dtype and is_exact(weight.detach(), kept)
        is_shared = any(isinstance(module, LINEAR) for module in modules.values())
        for path, module in modules.items():
            if may_narrow and (isinstance(module, nn.Embedding) or NarrowWeight.fits(plain_weight(module))):
                layout[path] = Kind(NarrowWeight, kept)
            elif is_shared:
                layout[path] = rest
    return layout


def has_plain(layout: Layout) -> bool:
    """Whether a weight stays in the model's parameters."""
    return any(kind.make is PlainWeight for kind in layout.values())


def left_out(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Classes of what has matrices of another form, such as experts in one tensor: nothing is done about these."""
    classes = {
        type(module).__name__
        for path, module in model.named_modules()
        if path not in layout and not isinstance(module, nn.Embedding)
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    return tuple(sorted(classes))
