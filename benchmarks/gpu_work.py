"""What the stages of benchmarks/gpu.py run: workloads, the engine in this process, and figures from its tokens."""

import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Given:
    """What gpu.py says."""

    device: str
    is_tiny: bool
    # Checkpoints go there.
    folder: str
    # Packages are installed there, from the wheels here.
    packages: str
    wheels: str | None
    # time.time() at which the stage is ended.
    end_s: float
    # Bytes/s, where it has been measured.
    bandwidth: float | None

    @property
    def left_s(self) -> float:
        """Seconds to plan with: some remain for the end of a stage."""
        return self.end_s - time.time() - 4

    @property
    def dtype(self) -> str:
        return "float32" if self.is_tiny else "bfloat16"

    @property
    def checkpoint(self) -> str:
        return str(Path(self.folder) / "checkpoint")

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    # nanoserve.bench.workload.BenchRequest each
    requests: list[Any]
    temperature: float
    # Of the time, beside the others.
    share: int = 1


def fixed(text: str, vocab_size: int) -> Work:
    from nanoserve.bench.workload import FixedWorkload

    return Work(text, FixedWorkload.parse(text).requests(vocab_size, 1 << 20), 0.0)


def nano(given: Given, vocab_size: int) -> Work:
    """nano-vllm's bench.py, drawn as it draws: 142,827 prompt tokens and 133,966 new ones."""
    from nanoserve.bench.workload import BenchRequest

    count, low, high = (6, 4, 16) if given.is_tiny else (256, 100, 1024)
    chance = random.Random(0)
    prompts = [[chance.randint(0, 10000) % vocab_size for _ in range(chance.randint(low, high))] for _ in range(count)]
    outs = [chance.randint(low, high) for _ in range(count)]
    return Work("nano-vllm's", [BenchRequest(*pair) for pair in zip(prompts, outs, strict=True)], 0.6, 4)


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that a decode step reads from memory, at the least."""

    weights: int
    # For each token of context.
    kv: int
    vocab_size: int

    @classmethod
    def of(cls, folder: str, itemsize: int) -> "Reads":
        from nanoserve.checkpoint import stored_tensors

        path = Path(folder) / "config.json"
        if not path.exists():
            sys.exit("there is no checkpoint: its stage did not end well")
        config = json.loads(path.read_text())
        numbers = sum(shape[0] * (shape[1] if shape[1:] else 1) for _, shape in stored_tensors(Path(folder)))
        if not config["tie_word_embeddings"]:  # of the embedding only some rows are read
            numbers -= config["vocab_size"] * config["hidden_size"]
        kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        return cls(numbers * itemsize, kv * itemsize, config["vocab_size"])


def options(given: Given, folder: str, works: Iterable[Work], reads: Reads, max_num_seqs: int) -> Any:
    from nanoserve.config import CacheOptions, ModelOptions, Options, SchedulerConfig

    num_tokens = max(sum(len(r.prompt) + r.num_out + 16 for r in work.requests) for work in works)
    kv_bytes = int(1.05 * num_tokens * reads.kv) + (1 << 20)
    if given.device == "cuda":  # what does not fit waits
        import torch

        kv_bytes = min(kv_bytes, int(0.8 * torch.cuda.mem_get_info()[0]) - reads.weights)
    return Options(
        model=ModelOptions(path=folder, device=given.device, dtype=given.dtype),
        cache=CacheOptions(kv_memory_bytes=kv_bytes, enable_prefix_cache=False),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=16384),
    )


async def run_works(given: Given, emit: Emit, folder: str, works: Sequence[Work], reads: Reads) -> None:
    from nanoserve.build import build_engine

    most = max(len(work.requests) for work in works)
    engine = build_engine(options(given, folder, works, reads, most))
    engine.start()
    try:
        await run_work(engine, fixed("2:16:4", reads.vocab_size), 30)
        for index, work in enumerate(works):
            forget_peak(given)
            limit_s = given.left_s * work.share / sum(each.share for each in works[index:])
            begin_s = time.perf_counter()
            stamps = await run_work(engine, work, limit_s)
            emit({**figures(work, stamps, begin_s, reads, given.bandwidth), "peak GB": peak_gb(given)})
    finally:
        await engine.close()


async def run_work(engine: Any, work: Work, limit_s: float) -> list[list[float]]:
    """Request -> when each of its tokens came. What is not done in time is given up."""
    from nanoserve.engine.stream import Delta
    from nanoserve.request import SamplingParams

    stamps: list[list[float]] = [[] for _ in work.requests]

    async def one(request: Any, mine: list[float]) -> None:
        params = SamplingParams(
            temperature=work.temperature, max_tokens=request.num_out, ignore_eos=True, detokenize=False
        )
        async with aclosing(engine.generate(request.prompt, params)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    mine += [time.perf_counter()] * len(event.token_ids)

    tasks = [asyncio.create_task(one(*pair)) for pair in zip(work.requests, stamps, strict=True)]
    done, unfinished = await asyncio.wait(tasks, timeout=max(1.0, limit_s))
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    for task in done:
        task.result()
    return stamps


def figures(
    work: Work, stamps: list[list[float]], begin_s: float, reads: Reads, bandwidth: float | None
) -> dict[str, Any]:
    """Decoding is what follows the last first token; it is compared with what its steps must read."""
    num_tokens, wanted = sum(map(len, stamps)), sum(r.num_out for r in work.requests)
    row: dict[str, Any] = {"workload": work.name, "done": round(num_tokens / wanted, 3)}
    if num_tokens == 0:
        return row
    end_s = max(mine[-1] for mine in stamps if mine)
    row |= {"seconds": round(end_s - begin_s, 2), "tokens/s": round(num_tokens / (end_s - begin_s), 1)}
    if all(stamps) and end_s > (first_s := max(mine[0] for mine in stamps)):
        later = [sum(at > first_s for at in mine) for mine in stamps]
        contexts = (
            len(request.prompt) * count + sum(range(len(mine) - count, len(mine)))
            for request, mine, count in zip(work.requests, stamps, later, strict=True)
        )
        num_bytes = max(later) * reads.weights + sum(contexts) * reads.kv
        row["prompts, s"] = round(first_s - begin_s, 2)
        row["decode tokens/s"] = round(sum(later) / (end_s - first_s), 1)
        row["ms a step"] = round(1e3 * (end_s - first_s) / max(later), 2)
        row["of memory"] = round(num_bytes / bandwidth / (end_s - first_s), 3) if bandwidth else None
    return row


def forget_peak(given: Given) -> None:
    if given.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_gb(given: Given) -> float:
    """On a CPU since the process began."""
    if given.device != "cuda":
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def texts(given: Given) -> tuple[str, str, str, str]:
    """One caller, many, and many with long contexts, twice."""
    return ("1:8:6", "4:8:4", "2:48:4", "2:96:4") if given.is_tiny else (
        "1:128:256", "64:128:128", "16:8000:64", "16:32000:64"
    )  # fmt: skip
