"""Times nanoserve and every installed peer on the same checkpoint and prompts, in turn; a table, a plot, and JSON.

    python benchmarks/offline.py FOLDER [--engines ENGINE ...] [--workloads WORKLOAD ...] [--rounds N] [--results DIR]

ENGINE is nanoserve, nanoserve-plain (with nothing compiled, as where there is no C++ compiler), vllm, llama.cpp,
hf-generate (transformers' generate) or hf-cb (its continuous batching), and may name a type: hf-generate:bfloat16.
Without one nanoserve chooses, and the others compute in bfloat16 if the machine has arithmetic for it, else in float32:
without it most are many times slower in bfloat16. `make bench-peers` installs vllm and llama.cpp into environments of
their own; by default all run that are there. A CUDA device is used by nanoserve and hf-generate. WORKLOAD is
N:IN:OUT[:SHARED], as in `nanoserve bench offline --help`.

Machines are noisy. Each engine therefore runs in a fresh process, all in turn, several rounds; only the ratio of
medians from one sitting says anything. Results go to DIR/MACHINE-COMMIT.json, .md and .svg.
"""

import argparse
import ctypes.util
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoserve.bench.workload import FixedWorkload

HERE = Path(__file__).parent
WORKLOADS = ("1:32:64", "8:128:64", "32:128:64", "64:128:64", "1:1024:2", "16:1024:64", "32:576:32:512")
# Our own, and what each is called with.
OURS = {"nanoserve": (), "nanoserve-plain": ("--no-compile",)}
# Where `make bench-peers` puts them; transformers is a part of us.
PYTHONS = {
    "vllm": HERE / "venvs/vllm/bin/python",
    "llama.cpp": HERE / "venvs/llama.cpp/bin/python",
    "hf-generate": Path(sys.executable),
    "hf-cb": Path(sys.executable),
}
# Those that run unless others are asked for.
DEFAULT_ENGINES = ("nanoserve", "vllm", "llama.cpp", "hf-generate")


@dataclass(frozen=True, slots=True)
class Engine:
    """NAME or NAME:DTYPE"""

    text: str
    name: str
    # None = the engine's own choice.
    dtype: str | None

    @classmethod
    def parse(cls, text: str) -> "Engine":
        name, _, dtype = text.partition(":")
        if name not in (*OURS, *PYTHONS):
            raise argparse.ArgumentTypeError(f"{name!r} is no engine; there are {', '.join((*OURS, *PYTHONS))}")
        return cls(text, name, dtype or None)

    @property
    def is_installed(self) -> bool:
        return self.name in OURS or PYTHONS[self.name].exists()

    def command(self, folder: str, workloads: Sequence[str]) -> list[str]:
        if self.name in OURS:
            # Random weights repeat themselves: guesses of such text would be right more often than those of any other.
            own = ("--speculate", "off", *OURS[self.name])
            options = ["--dtype", self.dtype or "auto", "--kv-memory", "4GiB", *own, "--json"]
            return [sys.executable, "-m", "nanoserve", "bench", "offline", folder, *options, "--workload", *workloads]
        dtype = self.dtype or machine_dtype()
        return [str(PYTHONS[self.name]), str(HERE / "peers.py"), self.name, dtype, folder, *workloads]

    def environment(self) -> dict[str, str]:
        variables = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        if self.name == "vllm":
            # What its documentation asks for, where it is there.
            tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
            openmp = PYTHONS["vllm"].parent.parent / "lib/libiomp5.so"
            preload = [*([tcmalloc] if tcmalloc else []), *([str(openmp)] if openmp.exists() else [])]
            variables["LD_PRELOAD"] = ":".join(preload)
        return variables


@dataclass(slots=True)
class Results:
    """Of one sitting. Lists have a number a round."""

    commit: str
    machine: dict[str, Any]
    # Engine -> workload -> output tokens/s.
    speeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # Engine -> seconds from the start of its process until a first tiny batch had run.
    ready_s: dict[str, list[float]] = field(default_factory=dict)
    # Engine -> the most that the process and its children had in main memory at once.
    peak_bytes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, engine: str, lines: Iterable[dict[str, Any]], peak_bytes: int, workloads: Sequence[str]) -> None:
        """A run's JSON lines, one for each workload."""
        speeds = self.speeds.setdefault(engine, {w: [] for w in workloads})
        for workload, line in zip(workloads, lines, strict=True):
            speeds[workload].append(line["n"] * line["out"] / line["seconds"])
        self.ready_s.setdefault(engine, []).append(line["ready_s"])
        self.peak_bytes.setdefault(engine, []).append(peak_bytes)

    def table(self) -> str:
        """In Markdown: medians, with the slowest and the fastest round, and our ratio to the fastest peer."""
        engines, workloads = list(self.speeds), list(next(iter(self.speeds.values())))
        peers = [e for e in engines if not e.startswith("nanoserve")]
        with_ratio = bool(peers) and "nanoserve" in engines
        head = ["output tokens/s", *engines, *(["nanoserve / best peer"] if with_ratio else [])]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        for workload in workloads:
            row = [workload, *(_spread(self.speeds[e][workload]) for e in engines)]
            if with_ratio:
                best = max(statistics.median(self.speeds[e][workload]) for e in peers)
                row.append(f"{statistics.median(self.speeds['nanoserve'][workload]) / best:.2f}")
            rows.append(row)
        last = [""] if with_ratio else []
        rows.append(["ready after, s", *(_spread(self.ready_s[e]) for e in engines), *last])
        rows.append(["peak memory, GB", *(f"{max(self.peak_bytes[e]) / 1e9:.1f}" for e in engines), *last])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def save_plot(self, path: Path) -> None:
        """Bars are medians, whiskers the slowest and the fastest round; each workload has its own scale."""
        from matplotlib.figure import Figure

        engines, workloads = list(self.speeds), list(next(iter(self.speeds.values())))
        figure = Figure(figsize=(2.1 * len(workloads), 3.2), layout="constrained")
        for axes, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
            runs = [self.speeds[e][workload] for e in engines]
            medians = [statistics.median(r) for r in runs]
            whiskers = [
                [m - min(r) for m, r in zip(medians, runs, strict=True)],
                [max(r) - m for m, r in zip(medians, runs, strict=True)],
            ]
            colours = [f"C{i}" for i in range(len(engines))]
            axes.bar(range(len(engines)), medians, yerr=whiskers, color=colours, capsize=3, label=engines)
            axes.set(title=workload, xticks=[])
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("output tokens/s")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(engines), frameon=False)
        processor = self.machine["gpu"] or f"{self.machine['cpu']}, {self.machine['cores']} cores"
        figure.suptitle(f"{processor}; {self.machine['checkpoint']}")
        figure.savefig(path)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def compare(folder: str, engines: Sequence[Engine], workloads: Sequence[str], num_rounds: int) -> Results:
    results = Results(commit(), machine(folder))
    for number in range(num_rounds):
        for engine in engines:
            print(f"round {number + 1} of {num_rounds}: {engine.text}", file=sys.stderr, flush=True)
            lines, peak_bytes = measured(engine, folder, workloads)
            print(*map(json.dumps, lines), sep="\n", flush=True)
            results.add(engine.text, lines, peak_bytes, workloads)
    return results


def measured(engine: Engine, folder: str, workloads: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """A run's JSON lines, and its peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        command = engine.command(folder, workloads)
        process = subprocess.Popen(command, stdout=output, env=engine.environment(), start_new_session=True)
        peak_bytes = 0
        try:
            while process.poll() is None:
                peak_bytes = max(peak_bytes, session_bytes(process.pid))
                time.sleep(0.2)
        finally:  # of an interrupted run nothing goes on
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0:
            sys.exit(f"{engine.text} failed: exit code {process.returncode}")
        output.seek(0)
        return [json.loads(line) for line in output if line.startswith("{")], peak_bytes


def session_bytes(session: int) -> int:
    """Main memory that the processes of a session have between them; shared pages count in each."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def machine_dtype() -> str:
    """What the machine computes fast."""
    import torch

    has_bfloat16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def machine(folder: str) -> dict[str, Any]:
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", cpuinfo)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": found[1] if found else "unknown CPU",
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": machine_dtype() == "bfloat16",
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checkpoint": Path(folder).resolve().name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--engines", nargs="+", type=Engine.parse, metavar="ENGINE")
    parser.add_argument("--workloads", nargs="+", type=FixedWorkload.parse, metavar="N:IN:OUT[:SHARED]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    workloads = [w.text for w in arguments.workloads or []] or list(WORKLOADS)
    engines = arguments.engines or [e for e in map(Engine.parse, DEFAULT_ENGINES) if e.is_installed]
    for engine in engines:
        if not engine.is_installed:
            sys.exit(f"{engine.name} is not installed; run make bench-peers")
    results = compare(arguments.folder, engines, workloads, arguments.rounds)
    arguments.results.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{results.machine['gpu'] or results.machine['cpu']}-{results.commit}".lower())
    stem = arguments.results / name
    stem.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    stem.with_suffix(".md").write_text(results.table())
    results.save_plot(stem.with_suffix(".svg"))
    print(results.table(), f"\n{stem}.json, .md and .svg", sep="")


if __name__ == "__main__":
    main()
