"""Times a workload through gRPC against the same workload in the engine's own process, in turn.

    python benchmarks/serving.py MODEL WORKLOAD [OPTIONS]

MODEL: a folder, a Hub id, or - for the built-in model. WORKLOAD is N:IN:OUT, as in `nanoserve bench offline --help`.
OPTIONS go to `nanoserve serve` and `nanoserve bench offline` alike, such as --kv-memory 4GiB. The difference is what
gRPC, the event loop and a client on the same machine cost together. Each server is fresh, and runs the workload once
outside the figures, during which compiled parts come into use.
"""

import json
import statistics
import subprocess
import sys

from served import serving

NANOSERVE = (sys.executable, "-m", "nanoserve")
NUM_ROUNDS = 3


def offline(model: list[str], workload: str, options: list[str]) -> float:
    """Output tokens/s in the engine's own process."""
    command = [*NANOSERVE, "bench", "offline", *model, "--workload", workload, "--json", *options]
    return float(json.loads(run(command))["out_tok_s"])


def through_grpc(model: list[str], workload: str, options: list[str]) -> float:
    """Output tokens/s that a client of a server sees."""
    with serving([*model, "--http-port", "0", "--no-prefix-cache", *options]) as (_, address):
        bench = [*NANOSERVE, "bench", "serve", "--target", address, "--workload", workload, workload]
        _, measured = run([*bench, "--json", "-"]).splitlines()
        return float(json.loads(measured)["out_tok_s"])


def run(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model, workload, options = sys.argv[1], sys.argv[2], sys.argv[3:]
    at = [] if model == "-" else [model]
    speeds: dict[str, list[float]] = {"offline": [], "through gRPC": []}
    options = ["--max-num-seqs", workload.partition(":")[0], *options]
    for _ in range(NUM_ROUNDS):
        speeds["offline"].append(offline(at, workload, options))
        speeds["through gRPC"].append(through_grpc(at, workload, options))
    medians = {way: statistics.median(each) for way, each in speeds.items()}
    for way, each in speeds.items():
        print(f"{way:13} {medians[way]:8.1f} output tokens/s, median of {each}")
    print(f"ratio         {medians['through gRPC'] / medians['offline']:8.3f}")


if __name__ == "__main__":
    main()
