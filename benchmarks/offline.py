"""Times `nanoserve bench offline` against transformers' own generate, on the same checkpoint and prompts.

    python benchmarks/offline.py make qwen3-0.6b DIR             a checkpoint of this shape with random weights
    python benchmarks/offline.py hf-generate DIR WORKLOAD ...    generate on one padded batch; a JSON line a workload
    python benchmarks/offline.py compare DIR WORKLOAD ...        both in turn, three times each; medians and their ratio

WORKLOAD is N:IN:OUT[:SHARED], as in `nanoserve bench offline --help`. generate runs in the checkpoint's bfloat16 unless
--peer-dtype says otherwise, nanoserve in what it chooses for the machine unless --dtype does: a CPU without arithmetic
for bfloat16 is many times slower in it than in float32. Speed does not depend on the values of the weights, so a random
checkpoint of a public model's exact shape is fair.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from nanoserve.bench.offline import Timing, time_workloads
from nanoserve.bench.workload import BenchRequest, FixedWorkload

SHAPES = {
    "qwen3-0.6b": dict(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
}  # fmt: skip
NUM_ROUNDS = 3


def make(shape: str, folder: str) -> None:
    """Write the checkpoint, with a tokenizer of single bytes: the prompts are token ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i + 3 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape], bos_token_id=0, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def hf_generate(folder: str, dtype: str, workloads: list[FixedWorkload]) -> Iterator[Timing]:
    started_s = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def execute(requests: Sequence[BenchRequest]) -> int:
        ids = torch.tensor([r.prompt for r in requests])
        num_out = requests[0].num_out  # the same in all
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=num_out, max_new_tokens=num_out)
        return int(out.numel() - ids.numel())

    context = model.config.max_position_embeddings
    return time_workloads("hf-generate", execute, workloads, started_s, model.config.vocab_size, context)


def compare(folder: str, dtype: str, peer_dtype: str, workloads: list[FixedWorkload]) -> None:
    """Each engine in a fresh process, in turn, so that both meet the same moods of the machine."""
    texts = [w.text for w in workloads]
    options = ["--dtype", dtype, "--kv-memory", "4GiB", "--json"]
    commands = {
        "nanoserve": [sys.executable, "-m", "nanoserve", "bench", "offline", folder, *options, "--workload", *texts],
        "hf-generate": [sys.executable, __file__, "hf-generate", folder, "--peer-dtype", peer_dtype, *texts],
    }
    speeds: dict[str, list[list[float]]] = {engine: [] for engine in commands}
    for _ in range(NUM_ROUNDS):
        for engine, command in commands.items():
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            runs = [line for line in lines if line.startswith("{")]
            print(*runs, sep="\n", flush=True)
            speeds[engine].append([json.loads(line)["out_tok_s"] for line in runs])
    print(
        f"{'workload':16} {'nanoserve':>12} {'hf-generate':>12} {'ratio':>7}   output tokens/s, medians of {NUM_ROUNDS}"
    )
    for i, text in enumerate(texts):
        ours, theirs = (statistics.median(speed[i] for speed in speeds[engine]) for engine in commands)
        print(f"{text:16} {ours:12.1f} {theirs:12.1f} {ours / theirs:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make_parser = commands.add_parser("make")
    make_parser.add_argument("shape", choices=SHAPES)
    make_parser.add_argument("folder")
    for name in ("hf-generate", "compare"):
        each = commands.add_parser(name)
        each.add_argument("folder")
        each.add_argument("workloads", nargs="+", type=FixedWorkload.parse, metavar="N:IN:OUT[:SHARED]")
        each.add_argument("--peer-dtype", default="bfloat16", metavar="DTYPE", help="Of generate.")
        if name == "compare":
            each.add_argument("--dtype", default="auto", help="Of nanoserve.")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.shape, arguments.folder)
    elif arguments.command == "compare":
        compare(arguments.folder, arguments.dtype, arguments.peer_dtype, arguments.workloads)
    else:
        for timing in hf_generate(arguments.folder, arguments.peer_dtype, arguments.workloads):
            print(json.dumps(timing.as_json()), flush=True)


if __name__ == "__main__":
    main()
