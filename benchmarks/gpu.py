"""What a CUDA device makes of nanoserve, in one command of five minutes: facts, tests, speed, one step's profile.

    python benchmarks/gpu.py [--seconds S] [--wheels FOLDER] [--results FILE] [--stages STAGE ...]
    python benchmarks/gpu.py --device cpu --tiny           the same without a GPU, on a tiny model: to try it out
    python benchmarks/gpu.py --collect-wheels FOLDER [--python 3.12]

The machine needs torch, numpy and pip, and no network: where packages are missing, the last form collects them on
another machine. It is run from a checkout, of which nothing must be installed. Each stage has its share of the time
that is left, and a process of its own; one that fails or is ended keeps its rows, and the next one goes on. FILE is
written after each.

    facts        the machine; how fast it copies and multiplies
    packages     what --wheels holds is installed, for this run alone; what is lacking, by name
    checkpoint   random weights of Qwen3-0.6B's shape
    equivalence  the CUDA cases of tests/test_equivalence.py, as many as there is time for
    offline      the engine, in bfloat16: one caller, 64, nano-vllm's benchmark, 16 with long contexts
                   done             share of the tokens that came in time       prompts, s  until all have a first token
                   decode tokens/s, ms a step, of memory  from there on; of memory: what a step must read, at the speed
                                    of copying, in proportion to the time it took
                   peak GB          of the device's memory, the KV cache included
    peer         transformers' generate on the same requests
    step         one decode step with 1 row and with nano-vllm's 256
                   ms between steps outside of the model side                   ms of kernels  of the device's time
                   launches, syncs  by the host                                 and the largest kernels, one a line
    8b           Qwen3-8B's shape, one caller
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_packages

HERE = Path(__file__).parent
# Stage -> its share of the time. What one leaves goes to those behind it.
SHARES = {
    "facts": 30, "packages": 30, "checkpoint": 30, "equivalence": 45, "offline": 90, "peer": 30, "step": 40, "8b": 100,
}  # fmt: skip
NUM_LAST_LINES = 25
# A file system in memory takes weights faster than a disk; but often nothing in it may be executed.
FAST_FOLDER, FAST_BYTES = Path("/dev/shm"), 24e9


def run_stage(name: str, seconds: float, given: dict[str, Any]) -> dict[str, Any]:
    """How it ended, its rows, and its last lines if that was not well."""
    begin_s = time.monotonic()
    path = ":".join([given["packages"], *gpu_packages.SOURCES, os.environ.get("PYTHONPATH", "")]).rstrip(":")
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given["device"] == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if name == "equivalence":
        # Tiny models compute fastest on one thread, and other tests' plugins are not wanted.
        variables |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows", Path(folder) / "output"
        rows.touch()
        end_s = time.time() + seconds
        command = [sys.executable, str(HERE / "gpu_stages.py"), name, str(rows), json.dumps({**given, "end_s": end_s})]
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=HERE.parent,
                env={**os.environ, **variables},
                start_new_session=True,
            )
            how = _wait(process, seconds)
        # A line that was not written to its end is of a stage that was killed.
        lines = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
        result = {"ended": how, "seconds": round(time.monotonic() - begin_s, 1), "rows": [json.loads(x) for x in lines]}
        if how != "well":
            result["last_lines"] = output.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:]
    return result


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"out of time after {seconds:.0f} s"
    finally:  # of an interrupted run nothing goes on
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "well" if code == 0 else f"with exit code {code}"


def table(name: str, result: dict[str, Any]) -> str:
    """In Markdown. Rows with the same first column lie in one table."""
    lines = [f"\n## {name}: ended {result['ended']}, {result['seconds']} s\n"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(next(iter(row)), []).append(row)
    for rows in groups.values():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
        lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
    return "\n".join([*lines, *(f"    {line}" for line in result.get("last_lines", ()))])


def bandwidth(facts: dict[str, Any]) -> float | None:
    """Bytes/s."""
    found = (row["value"] * 1e9 for row in facts.get("rows", ()) if row["fact"].startswith("copy"))
    return next(found, None)


def commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip() or None


def run(arguments: argparse.Namespace, folders: dict[str, str]) -> bool:
    """All stages; whether each ended well. folders: fields of a stage's Given."""
    end_s = time.monotonic() + arguments.seconds
    stages: dict[str, Any] = {}
    report = {"commit": commit(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "stages": stages}
    names: Sequence[str] = arguments.stages
    for index, name in enumerate(names):
        seconds = (end_s - time.monotonic()) * SHARES[name] / sum(SHARES[each] for each in names[index:])
        wheels = None if arguments.wheels is None else str(arguments.wheels.resolve())
        given = {"device": arguments.device, "is_tiny": arguments.tiny, "wheels": wheels, **folders}
        given["bandwidth"] = bandwidth(stages.get("facts", {}))
        stages[name] = run_stage(name, seconds, given)
        arguments.results.write_text(json.dumps(report, indent=1) + "\n")
        print(table(name, stages[name]), flush=True)
    return all(stage["ended"] == "well" for stage in stages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--stages", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="STAGE")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=HERE / "results/gpu.json", metavar="FILE")
    parser.add_argument("--collect-wheels", metavar="FOLDER")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="VERSION")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    if arguments.collect_wheels is not None:
        print(gpu_packages.collect(arguments.collect_wheels, arguments.python))
        return
    is_fast = FAST_FOLDER.is_dir() and shutil.disk_usage(FAST_FOLDER).free > FAST_BYTES
    fast = tempfile.TemporaryDirectory(dir=FAST_FOLDER if is_fast else None)
    with fast as folder, tempfile.TemporaryDirectory() as packages:
        is_well = run(arguments, {"folder": folder, "packages": packages})
    print(f"\n{arguments.results}")
    if not is_well:
        sys.exit(1)


if __name__ == "__main__":
    main()
