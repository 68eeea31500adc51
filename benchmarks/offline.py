"""Times the engine without a network, against transformers' own generate, on the same checkpoint and prompts.

    python benchmarks/offline.py make qwen3-0.6b DIR            a checkpoint of this shape with random weights
    python benchmarks/offline.py run ENGINE DIR WORKLOAD ...    ENGINE: nanoserve or hf-generate; a JSON line a workload
    python benchmarks/offline.py compare DIR WORKLOAD ...       both in turn, three times each; medians and their ratio

WORKLOAD is N:IN:OUT[:SHARED]: N requests at once, of IN random tokens, the first SHARED the same in all (the prefix
cache is on only then), and OUT greedy tokens each, EOS ignored. A first tiny batch (2:16:4) is outside all figures.
Speed does not depend on the values of the weights, so a random checkpoint of a public model's exact shape is fair.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

SHAPES = {
    "qwen3-0.6b": dict(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
}  # fmt: skip
NUM_ROUNDS = 3

# Runs a batch of prompts to the given number of new tokens each; returns the tokens made.
Run = Callable[[list[list[int]], int], int]


@dataclass(frozen=True)
class Workload:
    """N:IN:OUT[:SHARED]"""

    text: str
    num_requests: int
    num_in: int
    num_out: int
    num_shared: int = 0

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Raises ValueError or TypeError for another form."""
        return cls(text, *map(int, text.split(":")))

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.num_requests * 1000 + self.num_in)
        shared = [rng.randrange(10, 8000) for _ in range(self.num_shared)]
        own = self.num_in - self.num_shared
        return [shared + [rng.randrange(10, 8000) for _ in range(own)] for _ in range(self.num_requests)]


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


def nanoserve(folder: str, workloads: list[Workload]) -> Run:
    from nanoserve.build import build_engine
    from nanoserve.config import CacheOptions, ModelOptions, Options, SchedulerConfig
    from nanoserve.engine.engine import Engine
    from nanoserve.engine.stream import Finished
    from nanoserve.request import SamplingParams

    most = max(w.num_requests for w in workloads)
    options = Options(
        model=ModelOptions(path=folder, dtype="bfloat16"),
        cache=CacheOptions(kv_memory_bytes=4 * 2**30, enable_prefix_cache=any(w.num_shared for w in workloads)),
        scheduler=SchedulerConfig(max_num_seqs=max(most, 2)),
    )
    loop = asyncio.new_event_loop()
    engine = build_engine(options)

    async def start() -> None:
        engine.start()

    async def one(engine: Engine, prompt: list[int], num_out: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False)
        async for event in engine.generate(prompt, params):
            if isinstance(event, Finished):
                return event.completion_tokens
        raise AssertionError("the stream has no end")

    async def all_of(prompts: list[list[int]], num_out: int) -> int:
        return sum(await asyncio.gather(*(one(engine, prompt, num_out) for prompt in prompts)))

    loop.run_until_complete(start())
    return lambda prompts, num_out: loop.run_until_complete(all_of(prompts, num_out))


def hf_generate(folder: str, _workloads: list[Workload]) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompts: list[list[int]], num_out: int) -> int:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_out,
            max_new_tokens=num_out,
        )
        return int(out.numel() - ids.numel())

    return run


ENGINES = {"nanoserve": nanoserve, "hf-generate": hf_generate}


def run(engine: str, folder: str, workloads: list[Workload]) -> None:
    """One JSON line a workload."""
    start = time.perf_counter()
    execute = ENGINES[engine](folder, workloads)
    execute(Workload.parse("2:16:4").prompts(), 4)
    ready_s = time.perf_counter() - start
    for w in workloads:
        prompts = w.prompts()
        start = time.perf_counter()
        produced = execute(prompts, w.num_out)
        seconds = time.perf_counter() - start
        assert produced == w.num_requests * w.num_out, produced
        print(
            json.dumps(
                {
                    "engine": engine,
                    "n": w.num_requests,
                    "in": w.num_in,
                    "out": w.num_out,
                    "shared": w.num_shared,
                    "seconds": round(seconds, 2),
                    "out_tok_s": round(produced / seconds, 1),
                    "ready_s": round(ready_s, 1),
                }
            ),
            flush=True,
        )


def compare(folder: str, workloads: list[Workload]) -> None:
    """Each engine in a fresh process, in turn, so that both meet the same moods of the machine."""
    speeds: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    for _ in range(NUM_ROUNDS):
        for engine in ENGINES:
            command = [sys.executable, __file__, "run", engine, folder, *(w.text for w in workloads)]
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            speeds[engine].append([json.loads(line)["out_tok_s"] for line in lines if line.startswith("{")])
    print(
        f"{'workload':16} {'nanoserve':>12} {'hf-generate':>12} {'ratio':>7}   output tokens/s, medians of {NUM_ROUNDS}"
    )
    for i, w in enumerate(workloads):
        ours, theirs = (statistics.median(r[i] for r in speeds[engine]) for engine in ENGINES)
        print(f"{w.text:16} {ours:12.1f} {theirs:12.1f} {ours / theirs:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make_parser = commands.add_parser("make")
    make_parser.add_argument("shape", choices=SHAPES)
    make_parser.add_argument("folder")
    run_parser = commands.add_parser("run")
    run_parser.add_argument("engine", choices=ENGINES)
    for each in (run_parser, commands.add_parser("compare")):
        each.add_argument("folder")
        each.add_argument("workloads", nargs="+", type=Workload.parse, metavar="N:IN:OUT[:SHARED]")
    arguments = vars(parser.parse_args())
    {"make": make, "run": run, "compare": compare}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
