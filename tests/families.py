"""A small random model of every architecture that is promised to work, with windows, chunks and RoPE lengths so short
that a prompt of LONGEST tokens is longer than all of them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 96
MAX_POSITION = 128
# Tokens of the longest prompt in the tests.
LONGEST = 57
WINDOW = 11
CHUNK = 16

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITION,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# More than the default, so that attention is not almost uniform and logits differ.
INITIALIZER_RANGE = 0.3
SLIDING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}


def _make(config_class: type[PreTrainedConfig], **changes: object) -> Callable[[], PreTrainedConfig]:
    return lambda: config_class(**{**COMMON, "initializer_range": INITIALIZER_RANGE, **changes})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _make(hf.LlamaConfig),
    "llama-dynamic-rope": _make(
        hf.LlamaConfig,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
        max_position_embeddings=24,
    ),
    "llama-yarn": _make(
        hf.LlamaConfig,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        max_position_embeddings=96,
    ),
    "llama4": _make(
        hf.Llama4TextConfig,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=CHUNK,
        no_rope_layers=[1, 0, 1],
        num_hidden_layers=3,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.5,
        interleave_moe_layer_step=2,
    ),
    "mistral": _make(hf.MistralConfig, sliding_window=WINDOW),
    "mixtral": _make(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _make(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, layer_types=SLIDING
    ),
    "qwen2-moe": _make(
        hf.Qwen2MoeConfig,
        **EXPERTS,
        shared_expert_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        layer_types=SLIDING,
    ),
    "qwen3": _make(hf.Qwen3Config),
    "qwen3-moe": _make(hf.Qwen3MoeConfig, **EXPERTS),
    "gemma": _make(hf.GemmaConfig),
    "gemma2": _make(
        hf.Gemma2Config,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
        query_pre_attn_scalar=12,
    ),
    "gemma3": _make(hf.Gemma3TextConfig, sliding_window=WINDOW, layer_types=SLIDING, query_pre_attn_scalar=12),
    "gemma3-vision": lambda: hf.Gemma3Config(  # its text half is served
        text_config=FAMILIES["gemma3"]().to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 1,
        boi_token_index=VOCAB_SIZE - 2,
        eoi_token_index=VOCAB_SIZE - 3,
    ),
    "phi3": _make(hf.Phi3Config),
    "phi3-longrope": _make(hf.Phi3Config, rope_parameters=LONGROPE, original_max_position_embeddings=24),
    "olmo2": _make(hf.Olmo2Config),
    "olmo3": _make(hf.Olmo3Config, sliding_window=WINDOW, layer_types=SLIDING),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_POSITION,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=INITIALIZER_RANGE,
    ),
    "gpt-neox": _make(hf.GPTNeoXConfig, rotary_pct=0.5),
    "gpt-oss": _make(
        hf.GptOssConfig,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek-v3": _make(
        hf.DeepseekV3Config,
        num_key_value_heads=4,
        head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    ),
    "cohere": _make(hf.CohereConfig, logit_scale=0.3),
    "cohere2": _make(hf.Cohere2Config, sliding_window=WINDOW, layer_types=SLIDING, logit_scale=0.3),
    "granite": _make(
        hf.GraniteConfig,
        logits_scaling=3.0,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
    ),
    "smollm3": _make(hf.SmolLM3Config, no_rope_layers=[1, 0]),
    "glm4": _make(hf.Glm4Config),
    "glm4-moe": _make(
        hf.Glm4MoeConfig,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
    ),
    "starcoder2": _make(hf.Starcoder2Config, sliding_window=WINDOW),
    "ernie4.5": _make(hf.Ernie4_5Config),
    "opt": _make(hf.OPTConfig, ffn_dim=48, word_embed_proj_dim=32),
    "exaone4": _make(hf.Exaone4Config, sliding_window=WINDOW, sliding_window_pattern=2, layer_types=SLIDING),
    "stablelm": _make(hf.StableLmConfig),
    "seed-oss": _make(hf.SeedOssConfig),
    "lfm2": _make(hf.Lfm2Config, layer_types=["full_attention", "full_attention"]),
}


def tiny_config(family: str) -> PreTrainedConfig:
    return FAMILIES[family]()


def tiny_model(family: str, **config_changes: object) -> PreTrainedModel:
    """transformers' own model with its own eager attention, in float32; the same weights each time.

    Biases, norms and sinks, which transformers starts at 0 or 1, are random too: else they could be forgotten.
    """
    config = tiny_config(family)
    for name, value in config_changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def save_tiny_model(family: str, folder: Path, **config_changes: object) -> PreTrainedModel:
    """Write the model's folder in Hub format, and return the model."""
    model = tiny_model(family, **config_changes)
    bar = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bar:
        hf.utils.logging.enable_progress_bar()
    return model
