"""Times another engine on the workloads of `nanoserve bench offline`: the same prompts, warm-up, figures and JSON.

    PYTHONPATH=src PYTHON benchmarks/peers.py ENGINE DTYPE FOLDER WORKLOAD ...

PYTHON is that of the engine's own virtual environment, which `make bench-peers` sets up; it needs nothing of ours but
the rule that draws the prompts. Several engines want the one thing that suits them: vllm all the cores bound, an own
allocator and Intel's OpenMP (offline.py sets both), llama.cpp its weights in a GGUF file (made here, once).
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoserve.bench.offline import Run, time_workloads
from nanoserve.bench.workload import BenchRequest, FixedWorkload

# Tokens that llama.cpp takes in one call; it cuts them into steps of LLAMA_STEP.
LLAMA_CALL, LLAMA_STEP = 2048, 512


def vllm(folder: str, dtype: str, workloads: Sequence[FixedWorkload]) -> Run:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=max(w.num_in + w.num_out for w in workloads) + 16,
        max_num_seqs=max(w.num_requests for w in workloads),
        enable_prefix_caching=any(w.num_shared for w in workloads),
    )

    def execute(requests: Sequence[BenchRequest]) -> int:
        sampling = [SamplingParams(temperature=0, max_tokens=r.num_out, ignore_eos=True) for r in requests]
        outs = llm.generate([{"prompt_token_ids": r.prompt} for r in requests], sampling, use_tqdm=False)
        return sum(len(out.outputs[0].token_ids) for out in outs)

    return execute


def hf_generate(folder: str, dtype: str, _: Sequence[FixedWorkload]) -> Run:
    """transformers' generate on one batch; the prompts of a workload are of equal length, so there is no padding."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def execute(requests: Sequence[BenchRequest]) -> int:
        ids = torch.tensor([r.prompt for r in requests], device=device)
        num_out = requests[0].num_out  # the same in all
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=num_out, max_new_tokens=num_out)
        return int(out.numel() - ids.numel())

    return execute


def hf_cb(folder: str, dtype: str, _: Sequence[FixedWorkload]) -> Run:
    """transformers' own continuous batching."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()

    def execute(requests: Sequence[BenchRequest]) -> int:
        num_out = requests[0].num_out  # the same in all
        config = GenerationConfig(max_new_tokens=num_out, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [r.prompt for r in requests]
        outs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(out.generated_tokens) for out in outs.values())

    return execute


def llama_cpp(folder: str, dtype: str, workloads: Sequence[FixedWorkload]) -> Run:
    """Through llama.cpp's C interface, all sequences of a step in one batch."""
    import llama_cpp as llama
    import numpy as np

    path = write_gguf(Path(folder), dtype)
    llama.llama_backend_init()
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    most = max(w.num_requests for w in workloads)
    longest = -(-max(w.num_in + w.num_out for w in workloads) // 256) * 256
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max = most * longest, most
    params.n_batch, params.n_ubatch = LLAMA_CALL, LLAMA_STEP
    params.n_threads = params.n_threads_batch = os.cpu_count()
    context = llama.llama_init_from_model(model, params)

    def decode(rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """rows: token, position, sequence, and whether the next token is wanted. Returns those that are."""
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_wanted
        assert llama.llama_decode(context, batch) == 0
        logits = (llama.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3])
        picked = [int(np.ctypeslib.as_array(each, (vocab_size,)).argmax()) for each in logits]
        llama.llama_batch_free(batch)
        return picked

    def execute(requests: Sequence[BenchRequest]) -> int:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        last: list[int] = []
        pending: list[tuple[int, int, int, bool]] = []
        for sequence, request in enumerate(requests):
            end = len(request.prompt) - 1
            rows = [(token, i, sequence, i == end) for i, token in enumerate(request.prompt)]
            if len(pending) + len(rows) > LLAMA_CALL:
                last += decode(pending)
                pending = []
            pending += rows
        last += decode(pending)
        for step in range(1, requests[0].num_out):
            at = [len(r.prompt) + step - 1 for r in requests]
            last = decode([(token, at[sequence], sequence, True) for sequence, token in enumerate(last)])
        return sum(r.num_out for r in requests)

    return execute


def write_gguf(folder: Path, dtype: str) -> Path:
    """The checkpoint's weights in a GGUF file of this type, if there is none yet; norms in float32, as llama.cpp wants
    them. Returns its path.
    """
    import gguf
    import torch
    from safetensors import safe_open

    path = folder / f"{dtype}.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    types = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(unfinished), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            tensor: Any = tensors.get_tensor(name)
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if tensor.ndim == 1:
                writer.add_tensor(gguf_name, tensor.float().numpy())
            else:
                raw = tensor.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()
                writer.add_tensor(gguf_name, raw, raw_shape=raw.shape, raw_dtype=types[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(path)


ENGINES: dict[str, Callable[[str, str, Sequence[FixedWorkload]], Run]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "hf-generate": hf_generate,
    "hf-cb": hf_cb,
}


def main() -> None:
    started_s = time.perf_counter()
    if len(sys.argv) < 5 or sys.argv[1] not in ENGINES:
        sys.exit(__doc__)
    engine, dtype, folder, *texts = sys.argv[1:]
    workloads = [FixedWorkload.parse(text) for text in texts]
    config = json.loads((Path(folder) / "config.json").read_text())
    execute = ENGINES[engine](folder, dtype, workloads)
    for timing in time_workloads(
        engine, execute, workloads, started_s, config["vocab_size"], config["max_position_embeddings"]
    ):
        print(json.dumps(timing.as_json()), flush=True)


if __name__ == "__main__":
    main()
