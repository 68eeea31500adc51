"""Times a workload through OpenAI's API against the same workload through gRPC, in turn, on one server.

    python benchmarks/rest.py MODEL WORKLOAD [--rate R] [OPTIONS]

MODEL: a folder, a Hub id, or - for the built-in model. WORKLOAD is as in `nanoserve bench serve --help`, and so is the
rate: without one all requests come at once. OPTIONS go to `nanoserve serve`. The gateway runs alone, so that what it
takes of the processor can be told from what the server takes; the client takes its share too, and OpenAI's takes more
than gRPC's. Each way runs the workload once outside the figures.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from served import serving

FOLDER = Path(sys.executable).parent
NUM_ROUNDS = 5


@dataclass
class Figures:
    """Of one way: a value of each round."""

    out_tok_s: list[float]
    # Median time to first token of a round.
    ttft_ms: list[float]
    # Processor time of the gateway for each chunk that it sent; what a request costs is in it.
    cpu_us: list[float]


def measure(way: str, target: str, url: str, gateway: int, arguments: list[str], figures: Figures) -> None:
    """One round: the workload twice, of which the second counts."""
    command = [FOLDER / "nanoserve", "bench", "serve", "--target", target, "--json", "-", *arguments]
    before_s = cpu_s(gateway)
    done = subprocess.run(
        [*command, "--api", way, *(["--openai-url", url] if way == "openai" else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    used_s = cpu_s(gateway) - before_s
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    chunks = sum(report["output_tokens"] / (report["tokens_per_delta"] or 1) for report in reports)
    figures.out_tok_s.append(reports[-1]["out_tok_s"])
    figures.ttft_ms.append(reports[-1]["ttft_ms"]["p50"])
    figures.cpu_us.append(used_s / chunks * 1e6)


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model, workload, *options = sys.argv[1:]
    rate: list[str] = []
    if options[:1] == ["--rate"]:
        rate, options = options[:2], options[2:]
    at = [] if model == "-" else [model]
    port = free_port()
    figures = {way: Figures([], [], []) for way in ("grpc", "openai")}
    with serving([*at, "--http-port", "0", "--no-prefix-cache", *options]) as (_, target):
        alone = [FOLDER / "nanoserve-gateway", "--target", target, "--port", port]
        with subprocess.Popen(alone, stderr=subprocess.PIPE, text=True) as gateway:
            try:
                assert gateway.stderr is not None
                gateway.stderr.readline()  # it listens
                for _ in range(NUM_ROUNDS):
                    for way, each in figures.items():
                        arguments = ["--workload", workload, workload, *rate]
                        measure(way, target, f"http://127.0.0.1:{port}/v1", gateway.pid, arguments, each)
            finally:
                gateway.terminate()
                gateway.communicate()
    for way, each in figures.items():
        speed, ttft_ms = statistics.median(each.out_tok_s), statistics.median(each.ttft_ms)
        print(f"{way:6} {speed:8.1f} output tokens/s, median of {[round(v, 1) for v in each.out_tok_s]}")
        print(f"       {ttft_ms:8.1f} ms median time to first token, median of {[round(v, 1) for v in each.ttft_ms]}")
    ratios = [o / g for o, g in zip(figures["openai"].out_tok_s, figures["grpc"].out_tok_s, strict=True)]
    later_ms = [o - g for o, g in zip(figures["openai"].ttft_ms, figures["grpc"].ttft_ms, strict=True)]
    print(f"throughput of REST / gRPC, median of pairs    {statistics.median(ratios):8.3f}")
    print(f"ms later to the first token, median of pairs  {statistics.median(later_ms):8.1f}")
    print(f"us of the gateway's processor time a chunk    {statistics.median(figures['openai'].cpu_us):8.1f}")


if __name__ == "__main__":
    main()
