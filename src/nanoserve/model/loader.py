"""From a folder or a Hub id to a model that is ready to serve, or to an error that names the cause.

    path ─▶ folder ─▶ config ─▶ class ─▶ weights ─▶ probe ─▶ LoadedModel
     (checkpoint.py)                                (probe.py)

transformers owns architectures and the conversion of checkpoints; this module decides what is loaded, refuses what
cannot be served right, and collects what the rest of the server must know of the model. Nothing is random: a weight
that the checkpoint lacks is an error.
"""

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from nanoserve import checkpoint
from nanoserve.checkpoint import ModelLoadError
from nanoserve.config import ModelOptions, format_size
from nanoserve.kv_cache.paged_kv_cache import KVSpec, available_memory
from nanoserve.model import attention, facts
from nanoserve.model.attention import AttentionLayer
from nanoserve.model.cpu import (
    can_compile,
    keep_compiled,
    prepare_cpu,
    prepare_to_load_compiled,
    release_freed_memory,
)
from nanoserve.model.facts import ModelFacts
from nanoserve.model.layout import decide_layout, has_plain, kept_dtype, left_out
from nanoserve.model.probe import NotServable, learn_layers
from nanoserve.model.weights import Layout, apply_layout

# Layers of other types keep a state that is no KV cache, or choose the tokens that a query sees by their content.
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
SELECTING_MODULES = ("Indexer", "Compressor")
# For a trial run of a model whose context is unknown, before it is refused.
SOME_CONTEXT = 2048
# What a safetensors file calls the types that a model can be computed in.
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode whose attention is paged."""

    # The whole model: token ids to logits.
    model: PreTrainedModel
    # Token ids to the hidden states behind the last norm.
    trunk: nn.Module
    # Hidden states, as inputs_embeds, to logits: the whole model with its trunk left out.
    head: nn.Module
    dtype: torch.dtype
    device: torch.device
    # The form of its weights.
    layout: Layout
    # What is particular to each attention layer, and what it keeps in the KV cache.
    attention_layers: tuple[AttentionLayer, ...]
    kv_specs: tuple[KVSpec, ...]
    # Parts of it are to be compiled while it is served.
    is_compiled: bool
    facts: ModelFacts


def load_model(options: ModelOptions) -> LoadedModel:
    """Load and check a model. Raises ModelLoadError."""
    folder, config, generation = _find(options)
    device = torch.device(_device_name(options.device))
    if device.type == "cpu":
        prepare_cpu()
    dtype = _resolve_dtype(options, config, folder, device)
    is_compiled = options.compile and device.type == "cpu" and can_compile(_num_stored(folder))
    if is_compiled:
        keep_compiled()
    kept = kept_dtype(device, dtype, _stored_dtype(folder), is_compiled=is_compiled)
    model = _load_weights(folder, config, dtype, kept, device, options).to(device).eval()
    _refuse_damaged(model, folder)
    layout = decide_layout(model, device, dtype, kept)
    known = _facts(folder, config, generation, model, layout, dtype)  # while all weights are parameters
    with ThreadPoolExecutor(1) as other_thread:  # which leaves the interpreter to this one, for what serving will need
        applying = other_thread.submit(_apply, model, layout, dtype, kept)
        if is_compiled:
            prepare_to_load_compiled()
        applying.result()
    if kept != dtype:
        release_freed_memory()
    trunk, head, attention_layers, kv_specs = _fit(model, known.max_position)
    if facts.max_position(config) is None:
        raise ModelLoadError(
            f"the context of {known.architecture} is unknown: no max_position_embeddings in its config"
        )
    return LoadedModel(model, trunk, head, dtype, device, layout, attention_layers, kv_specs, is_compiled, known)


def load_skeleton(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights, on torch's meta device, which has no memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
        )
    _take_over_temperature(model)
    return model.eval()


# -------------------------------------------------------------------------------------------------- the config


def _find(options: ModelOptions) -> tuple[Path, PreTrainedConfig, dict[str, Any]]:
    """The folder with all files, its config, and its generation config."""
    checkpoint.check_path(options)
    folder = checkpoint.fetch(options, checkpoint.CONFIG_FILES)
    config = _read_config(folder, options)
    # Of the Hub, the rest once the model is known to be of a kind that can be served; of the same revision.
    folder = checkpoint.fetch(options, checkpoint.MODEL_FILES, revision=folder.name)
    checkpoint.check_weights(folder)
    return folder, config, checkpoint.read_json(folder / "generation_config.json")


def _read_config(folder: Path, options: ModelOptions) -> PreTrainedConfig:
    checkpoint.check_config(folder)
    kind = checkpoint.read_json(folder / "config.json").get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and not options.trust_remote_code:
        raise ModelLoadError(f"{kind} cannot be served: transformers {transformers.__version__} does not know it")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        raise ModelLoadError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{config.model_type} cannot be served: it is an encoder-decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not options.trust_remote_code:
        raise ModelLoadError(f"{config.model_type} cannot be served: it is no language model that writes text")
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if others:
        raise ModelLoadError(f"{config.model_type} cannot be served: it has layers of type {', '.join(sorted(others))}")
    return config


# --------------------------------------------------------------------------------------------------- the weights


def _device_name(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError("device cuda was asked for; this machine has no CUDA device that torch can use")
    if name.startswith("cuda:") and int(name.removeprefix("cuda:")) >= torch.cuda.device_count():
        raise ModelLoadError(f"there is no device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def _refuse_what_does_not_fit(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Main memory is given out before it is there; without this the system would end the process, later."""
    num_bytes = _num_stored(folder) * dtype.itemsize
    free = available_memory()
    if device.type == "cpu" and num_bytes > free:
        name = str(dtype).removeprefix("torch.")
        sizes = f"{format_size(num_bytes)} in {name}, and {format_size(free)} of memory are free"
        hint = "; --dtype bfloat16 takes half" if dtype == torch.float32 else ""
        raise ModelLoadError(f"the weights take {sizes}{hint}")


def _resolve_dtype(options: ModelOptions, config: PreTrainedConfig, folder: Path, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's; on a CPU bfloat16 for half precision if the CPU computes in it, else float32."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    dtype = config.get_text_config().dtype or _stored_dtype(folder)
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    return torch.bfloat16 if _has_fast_bfloat16() else torch.float32


def _has_fast_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the checkpoint's first floating-point tensor."""
    known = (STORED_DTYPES[name] for name, _ in checkpoint.stored_tensors(folder) if name in STORED_DTYPES)
    return next(known, torch.float32)


def _num_stored(folder: Path) -> int:
    """Numbers in the checkpoint."""
    return sum(math.prod(shape) for _, shape in checkpoint.stored_tensors(folder))


def _load_weights(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    options: ModelOptions,
) -> PreTrainedModel:
    """In the type that weights keep, if nothing is lost by it; else in `dtype`, which may take twice the memory."""
    if kept != dtype and len({name for name, _ in checkpoint.stored_tensors(folder)}) == 1:
        model = _load_as(kept, folder, config, device, options)
        # A buffer of that type was computed in it, such as Gemma 3's scale of embeddings.
        if not any(buffer.dtype == kept for buffer in model.buffers()):
            return model
    return _load_as(dtype, folder, config, device, options)


def _load_as(
    dtype: torch.dtype, folder: Path, config: PreTrainedConfig, device: torch.device, options: ModelOptions
) -> PreTrainedModel:
    _refuse_what_does_not_fit(folder, dtype, device)
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # transformers lets through whatever a broken file provokes
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise ModelLoadError(f"{config.model_type} cannot be served: its attention cannot be replaced") from error
        raise ModelLoadError(f"{config.model_type} in {folder} cannot be loaded: {error}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := sorted(map(str, report[what])):
            raise ModelLoadError(
                f"the checkpoint in {folder} does not fit {type(model).__name__}:"
                f" {len(wrong)} {what.replace('_', ' ')}, such as {', '.join(wrong[:4])}"
            )
    loaded: PreTrainedModel = model
    return loaded


def _refuse_damaged(model: PreTrainedModel, folder: Path) -> None:
    """A single NaN among the weights makes all that is computed NaN."""
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point():
            continue
        # A sum takes a few hundredths of a second for a gigabyte, and is NaN or infinite if one of its numbers is.
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise ModelLoadError(f"the checkpoint in {folder} is damaged: {name} has NaN or infinity")


def _apply(model: PreTrainedModel, layout: Layout, dtype: torch.dtype, kept: torch.dtype) -> None:
    apply_layout(model, layout)
    if kept != dtype:
        model.to(dtype)
    if not has_plain(layout):  # what is left is small, and a single view of the checkpoint's file keeps all of it
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no table of what did not fit: that becomes an error."""
    level, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _facts(
    folder: Path,
    config: PreTrainedConfig,
    generation: dict[str, Any],
    model: PreTrainedModel,
    layout: Layout,
    dtype: torch.dtype,
) -> ModelFacts:
    return ModelFacts(
        folder=folder,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        max_position=facts.max_position(config) or SOME_CONTEXT,
        eos_token_ids=facts.eos_token_ids(generation, config),
        default_params=facts.default_params(generation, folder),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        left_out=left_out(model, layout),
        fingerprint=checkpoint.fingerprint(folder),
    )


# --------------------------------------------------------------------------------------------- fitting the model


class _HiddenStates(nn.Module):
    """Stands where the trunk was: what it is given is taken for the trunk's result."""

    class Output(tuple[Tensor]):
        """As transformers' outputs: the first item, or any field by name, most of them None."""

        def __getattr__(self, name: str) -> Tensor | None:
            return self[0] if name == "last_hidden_state" else None

    @property
    def decoder(self) -> "_HiddenStates":
        """OPT's head calls the decoder in its trunk."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> tuple[Tensor]:
        return self.Output((inputs_embeds,))


def _fit(
    model: PreTrainedModel, max_position: int
) -> tuple[nn.Module, nn.Module, tuple[AttentionLayer, ...], tuple[KVSpec, ...]]:
    """Trunk, head, and what is particular to attention layers and kept in the cache. Refuses what cannot be served."""
    architecture = type(model).__name__
    try:
        trunk, head = _split(model)
        _take_over_temperature(model)
        fix_rope(model, max_position)
        _refuse_selection(model)
        attention_layers, kv_specs = learn_layers(model, trunk, max_position)
    except NotServable as error:
        raise ModelLoadError(f"{architecture} cannot be served: {error}") from error
    except Exception as error:
        raise ModelLoadError(f"{architecture} cannot be served: a trial run failed: {error!r}") from error
    return trunk, head, tuple(attention_layers), tuple(kv_specs)


def _split(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The trunk, and the model without it, which share all weights.

    Between hidden states and logits some models scale or cap; so the head is the model's own forward, with the trunk
    replaced by what hands it hidden states.
    """
    trunks = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(trunks) != 1:
        raise NotServable(f"it has {len(trunks)} inner models, not one")
    head = copy.copy(model)
    head._modules = {**model._modules, trunks[0]: _HiddenStates()}
    return model.get_submodule(trunks[0]), head


def _refuse_selection(model: nn.Module) -> None:
    """A trial run is too short to show an attention that leaves tokens out of long prompts."""
    for module in model.modules():
        name = type(module).__name__
        if any(part in name for part in SELECTING_MODULES):
            raise NotServable(f"its attention leaves tokens out by their content ({name})")


def _take_over_temperature(model: nn.Module) -> None:
    """Llama 4 scales queries by their place in the batch instead of their position: attention does it instead."""
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "use_rope") and not module.use_rope:
            module.attn_temperature_tuning = False  # type: ignore[assignment]
            floor, strength = getattr(module, "floor_scale"), getattr(module, "attn_scale")  # noqa: B009
            module.query_temperature = (float(floor), float(strength))  # type: ignore[assignment]


def fix_rope(model: nn.Module, max_context_tokens: int) -> None:
    """Choose the variant of a RoPE that depends on length ("dynamic", "longrope") once, for the longest context.

    transformers chooses anew in each forward by the longest position in the batch, so that a long request would change
    the others, and a sequence that grows would no longer fit its own keys. May be called again with another length.
    """
    for module in model.modules():
        kinds: Any = getattr(module, "variable_rope_type", None) or getattr(module, "rope_type", None)
        # Of each type of layer, where they differ.
        by_type = kinds if isinstance(kinds, dict) else {None: kinds}
        variable = {t: k for t, k in by_type.items() if isinstance(k, str) and ("dynamic" in k or k == "longrope")}
        for layer_type, kind in variable.items():
            _set_frequencies(module, kind, layer_type, max_context_tokens)
        if variable:
            fixed = dict.fromkeys(variable, "fixed")
            module.variable_rope_type = kinds
            module.rope_type = kinds | fixed if isinstance(kinds, dict) else "fixed"  # type: ignore[assignment]


def _set_frequencies(module: nn.Module, kind: str, layer_type: str | None, length: int) -> None:
    config: Any = module.config
    prefix = "" if layer_type is None else f"{layer_type}_"
    current: Tensor = getattr(module, f"{prefix}inv_freq")
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, current.device, seq_len=length, **arguments)
    current.copy_(frequencies)
    setattr(module, f"{prefix}attention_scaling", scaling)
