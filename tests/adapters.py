"""LoRA adapters for small models, made and computed by PEFT itself: what the server's own are compared with."""

import gc
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

# In these PEFT takes the projections of every MLP for those of experts, which are no linear layers.
FUSED_EXPERTS = {"deepseek_v3", "glm4_moe"}


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path of each linear layer of the text model -> its in_features and out_features."""
    found = {}
    for path, module in model.named_modules():
        if "vision" in path or "multi_modal_projector" in path:
            continue
        if type(module) is nn.Linear:
            found[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[path] = (module.weight.shape[0], module.weight.shape[1])
    return found


def make_adapter(
    folder: Path,
    model: PreTrainedModel | Path,
    rank: int = 4,
    target_modules: Iterable[str] | str | None = None,
    seed: int = 0,
    **settings: object,
) -> Path:
    """Write a PEFT folder of random pairs that change the logits about as much as they are large.

    model: transformers' own, which is left as it was, or its folder.
    target_modules: of PEFT; None = all linear layers, the head too.
    settings: others of PEFT's LoraConfig.
    """
    with _calm():
        if isinstance(model, Path):
            model = _load(model)
        if target_modules is None:
            # Whole paths, so that PEFT does not look for them in other parts of the model.
            target_modules = [
                path
                for path in linear_layers(model)
                if model.config.model_type not in FUSED_EXPERTS
                or not path.endswith(("gate_proj", "up_proj", "down_proj"))
            ]
        elif not isinstance(target_modules, str):
            target_modules = list(target_modules)
        config = LoraConfig(
            r=rank,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
            **{"lora_alpha": 2 * rank, **settings},  # type: ignore[arg-type]
        )
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name and parameter.ndim == 2:
                    # The product has about a third of the size of a usual weight.
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * 0.4 / parameter.shape[1 if "lora_A" in name else 0] ** 0.25)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        adapted.unload()
        gc.collect()
    return folder


def peft_logits(model: PreTrainedModel | Path, adapter: Path | None, token_ids: list[int]) -> Tensor:
    """What transformers and PEFT compute in float32: [len(token_ids), vocab_size]. None = the model alone."""
    with _calm(), torch.inference_mode():
        base = _load(model) if isinstance(model, Path) else model
        adapted = base if adapter is None else PeftModel.from_pretrained(base, str(adapter))
        logits: Tensor = adapted(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
        if adapter is not None:
            adapted.unload()
    return logits


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@contextmanager
def _calm() -> Iterator[None]:
    """Without PEFT's advice on training, and without progress bars."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
