"""Times vLLM with LoRA adapters, and without: 1, 8 and 32 sequences at once. adapters.py runs it.

    PYTHON benchmarks/adapter_peers.py MODEL ADAPTERS RANK ROUNDS

PYTHON is that of vLLM's own virtual environment, which `make bench-peers` sets up. ADAPTERS: the folder of a0, a1, ...
Prints a JSON list: the number of sequences, and the tokens/s of each round without adapters and with them, in turn.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CALLERS = (1, 8, 32)
NUM_TOKENS = 64
MAX_CONTEXT = 512
PROMPT = "Write down what you know of the lighthouses of the northern coast, one after the other."


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    model, root, rank, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=MAX_CONTEXT,
        max_num_seqs=32,
        enable_lora=True,
        max_loras=32,
        max_cpu_loras=64,
        max_lora_rank=rank,
    )
    params = SamplingParams(temperature=0.8, max_tokens=NUM_TOKENS, ignore_eos=True)

    def speed(count: int, *, with_adapters: bool) -> float:
        lora: Any = None
        if with_adapters:
            lora = [LoRARequest(f"a{i}", i + 1, str(root / f"a{i}")) for i in range(count)]
        start_s = time.perf_counter()
        llm.generate([f"{PROMPT} {i}" for i in range(count)], params, lora_request=lora, use_tqdm=False)
        return count * NUM_TOKENS / (time.perf_counter() - start_s)

    figures = []
    for count in CALLERS:
        pairs = [[speed(count, with_adapters=has) for has in (False, True)] for _ in range(rounds + 1)][1:]
        figures.append([count, *zip(*pairs, strict=True)])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
