"""Times another engine with its lookup of guesses in the text, and without it: one caller, greedy.

    PYTHON benchmarks/speculation_peers.py ENGINE MODEL NUM_TOKENS off|on < PROMPTS

PYTHON is that of the engine's own virtual environment, which `make bench-peers` sets up. ENGINE: vllm, with MODEL the
folder of a checkpoint, or llama.cpp, with MODEL a GGUF file. PROMPTS: a JSON list of lists of token ids. Prints a JSON
list: for each prompt the output tokens/s from the first token on. speculation.py runs it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice

# Of a guess. vLLM's and llama-cpp-python's documentation show 5 and 10; more is no slower where guesses are right.
NUM_GUESSES = 10
MAX_CONTEXT = 2048

# A prompt, and how many tokens to generate.
Generate = Callable[[Sequence[int], int], None]


def vllm(model: str, *, guesses: bool) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    lookup = {"method": "ngram", "num_speculative_tokens": NUM_GUESSES, "prompt_lookup_max": 5, "prompt_lookup_min": 3}
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=MAX_CONTEXT,
        max_num_seqs=1,
        speculative_config=lookup if guesses else None,
    )

    def generate(prompt: Sequence[int], num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate({"prompt_token_ids": list(prompt)}, params, use_tqdm=False)

    return generate


def llama_cpp(model: str, *, guesses: bool) -> Generate:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=NUM_GUESSES) if guesses else None
    # Without logits_all it fails where a guess was wrong.
    options = {"draft_model": lookup, "logits_all": True} if guesses else {}
    llm = Llama(model, n_ctx=MAX_CONTEXT, n_threads=os.cpu_count(), verbose=False, **options)

    def generate(prompt: Sequence[int], num_tokens: int) -> None:
        for _ in islice(llm.generate(prompt, temp=0.0), num_tokens):
            pass

    return generate


def main() -> None:
    if len(sys.argv) != 5 or sys.argv[1] not in ("vllm", "llama.cpp"):
        sys.exit(__doc__)
    engine, model, num_tokens, guesses = sys.argv[1:]
    generate = (vllm if engine == "vllm" else llama_cpp)(model, guesses=guesses == "on")
    speeds = []
    for prompt in json.load(sys.stdin):
        took_s = []
        for count in (1, 1, int(num_tokens) + 1):  # from the second on the prompt is in the engine's cache
            start_s = time.perf_counter()
            generate(prompt, count)
            took_s.append(time.perf_counter() - start_s)
        speeds.append(int(num_tokens) / (took_s[2] - took_s[1]))
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
