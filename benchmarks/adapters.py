"""What LoRA adapters cost: callers who have one, callers who have none, and those who wait for theirs.

    python benchmarks/adapters.py FOLDER [--rank 16] [--targets all|attention] [--rounds N] [--workloads NAME ...]
                                         [--vllm PYTHON]

FOLDER: a checkpoint, such as those of `make benchmarks/checkpoints/qwen3-0.6b` and `.../smollm2-135m`. The adapters are
random, as PEFT writes them, in all linear layers of each block, or in q_proj and v_proj alone.

    rows     1, 8 and 32 callers at once, without adapters and then each with another one, in turn: tokens/s of all
    unused   the same callers without adapters, on a server with 32 in its slots, and on one that knows none, in turn
    load     LoadAdapter of one that was never read, and its unload: seconds
    zipf     8 and 16 callers who ask for one of 64 adapters, few of them often, with 8 slots and with 64: the time to
             the first token

--vllm: `rows` on vLLM too, by its Python in benchmarks/venvs, of `make bench-peers`. Measured with nothing beside.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nanoserve_client import AsyncClient, Client
from safetensors.torch import save_file
from served import serving
from structured_output import in_turn, show

TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "v_proj"),
}
CALLERS = (1, 8, 32)
NUM_TOKENS = 64
MAX_CONTEXT = 512
PROMPT = "Write down what you know of the lighthouses of the northern coast, one after the other."
ZIPF_ADAPTERS = 64
ZIPF_CALLERS = (8, 16)
numbers = itertools.count()


def write_adapters(checkpoint: Path, root: Path, count: int, rank: int, targets: Sequence[str]) -> None:
    """PEFT folders a0, a1, ... under root, of numbers that are there and change little."""
    shapes: dict[str, list[int]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        shapes |= {name: entry["shape"] for name, entry in header.items()}
    for i in range(count):
        tensors = {}
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            if layer.endswith(tuple(targets)):
                for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                    noise = torch.randn(size, generator=torch.Generator().manual_seed(i)) * 0.01
                    tensors[f"base_model.model.{layer}.lora_{part}.weight"] = noise.bfloat16()
        folder = root / f"a{i}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
        (folder / "adapter_config.json").write_text(json.dumps(config))


async def answer(client: AsyncClient, adapter: str | None, tokens: int = NUM_TOKENS) -> float:
    """Seconds to the first token."""
    start_s, first_s = time.perf_counter(), 0.0
    options: dict[str, Any] = {"ignore_eos": True, "temperature": 0.8, "seed": next(numbers)}
    async for delta in client.generate(f"{PROMPT} {next(numbers)}", adapter=adapter, max_tokens=tokens, **options):
        if delta.token_ids and not first_s:
            first_s = time.perf_counter() - start_s
    return first_s


async def together(client: AsyncClient, adapters: Sequence[str | None]) -> float:
    """Tokens/s of all, one caller for each."""
    start_s = time.perf_counter()
    await asyncio.gather(*(answer(client, adapter) for adapter in adapters))
    return len(adapters) * NUM_TOKENS / (time.perf_counter() - start_s)


@contextlib.contextmanager
def server(arguments: argparse.Namespace, root: Path | None, slots: int = 32) -> Iterator[str]:
    options = ["--speculate", "off", "--max-num-seqs", "32", "--max-context-tokens", str(MAX_CONTEXT)]
    options += ["--kv-memory", "2GiB", "--http-port", "0"]
    if root is not None:
        options += ["--adapters", str(root), "--adapter-slots", str(slots), "--adapter-memory", "8GiB"]
    with serving([str(arguments.folder), *options], wait_until_fast=True) as (_, target):
        yield target


async def rows(target: str, rounds: int) -> None:
    async with AsyncClient(target) as client:
        for count in CALLERS:
            names = [f"a{i}" for i in range(count)]
            await together(client, names)  # which puts them into slots
            without, with_them = await in_turn(
                rounds, lambda n=count: together(client, [None] * n), lambda names=names: together(client, names)
            )
            show(f"rows {count}", "tokens/s", without, with_them)


async def unused(target: str, plain_target: str, rounds: int) -> None:
    async with AsyncClient(target) as client, AsyncClient(plain_target) as plain:
        await together(client, [f"a{i}" for i in range(32)])
        for count in CALLERS:
            nobody = [None] * count
            without, with_them = await in_turn(
                rounds, lambda n=nobody: together(plain, n), lambda n=nobody: together(client, n)
            )
            show(f"unused {count}", "tokens/s", without, with_them)


def load(target: str, rounds: int) -> None:
    with Client(target) as client:
        loads, unloads = [], []
        for i in range(rounds):
            start_s = time.perf_counter()
            client.load_adapter(f"new{i}", f"a{i}")
            loads.append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            client.unload_adapter(f"new{i}")
            unloads.append(time.perf_counter() - start_s)
    print(f"load      median {statistics.median(loads):.3f} s, worst {max(loads):.3f} s", flush=True)
    print(f"unload    median {statistics.median(unloads):.3f} s, worst {max(unloads):.3f} s", flush=True)


async def zipf(target: str, slots: int, rounds: int) -> None:
    chance = random.Random(0)
    shares = [1 / (i + 1) for i in range(ZIPF_ADAPTERS)]
    firsts: list[float] = []

    async def caller(client: AsyncClient, count: int) -> None:
        for _ in range(count):
            (number,) = chance.choices(range(ZIPF_ADAPTERS), shares)
            firsts.append(await answer(client, f"a{number}", tokens=chance.randint(8, NUM_TOKENS)))

    async with AsyncClient(target) as client:
        for i in range(ZIPF_ADAPTERS):  # each is read once before
            await answer(client, f"a{i}", tokens=1)
        for count in ZIPF_CALLERS:
            firsts.clear()
            await asyncio.gather(*(caller(client, 4 * rounds) for _ in range(count)))
            at = sorted(firsts)
            p50, p99 = at[len(at) // 2], at[int(0.99 * len(at))]
            what = f"zipf      {slots:3} slots, {count:2} callers"
            print(f"{what}: first token p50 {p50:.3f}, p99 {p99:.3f}, worst {at[-1]:.3f} s", flush=True)


def vllm(python: str, arguments: argparse.Namespace, root: Path) -> None:
    script = Path(__file__).with_name("adapter_peers.py")
    command = [python, str(script), str(arguments.folder), str(root), str(arguments.rank), str(arguments.rounds)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for count, without, with_them in json.loads(told.splitlines()[-1]):
        show(f"vllm {count}", "tokens/s", without, with_them)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", default=["rows", "unused", "load", "zipf"])
    parser.add_argument("--vllm", metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = ZIPF_ADAPTERS if "zipf" in arguments.workloads else max(CALLERS)
        write_adapters(arguments.folder, root, count, arguments.rank, TARGETS[arguments.targets])
        if {"rows", "unused", "load"} & {*arguments.workloads}:
            with server(arguments, root) as target:
                if "rows" in arguments.workloads:
                    asyncio.run(rows(target, arguments.rounds))
                if "unused" in arguments.workloads:
                    with server(arguments, None) as plain_target:
                        asyncio.run(unused(target, plain_target, arguments.rounds))
                if "load" in arguments.workloads:
                    load(target, arguments.rounds)
        for slots in (8, ZIPF_ADAPTERS) if "zipf" in arguments.workloads else ():
            with server(arguments, root, slots) as target:
                asyncio.run(zipf(target, slots, arguments.rounds))
        if arguments.vllm:
            vllm(arguments.vllm, arguments, root)


if __name__ == "__main__":
    main()
