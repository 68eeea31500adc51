"""Times a workload through OpenAI's API against the same workload through gRPC, in turn, on one server.

    python benchmarks/rest.py MODEL WORKLOAD [--rate R] [OPTIONS]

MODEL: a folder, a Hub id, or - for the built-in model. WORKLOAD is as in `nanoserve bench serve --help`, and so is the
rate: without one all requests come at once. OPTIONS go to `nanoserve serve`. The gateway runs alone, so that what it
takes of the processor can be told from what the server takes; the client takes its share too, and OpenAI's takes more
than gRPC's. Each way runs the workload once outside the figures.

Then requests alone, and bursts of them, are timed to the first token with the plainest client that there is, so that
what OpenAI's client takes is not counted as the gateway's.
"""

import http.client
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanoserve_client import Client
from served import serving

FOLDER = Path(sys.executable).parent
NUM_ROUNDS = 5
# Requests at once -> rounds of so many.
BURSTS = {1: 100, 32: 10}
# Of each of these requests.
NUM_IN, NUM_OUT = 32, 16


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


def later_ms(target: str, port: str, burst: int, num_rounds: int) -> float:
    """How much later the first token comes through the gateway than over gRPC, as bursts in turn have it: the median of
    the differences of their medians."""
    with Client(target) as client, ThreadPoolExecutor(burst) as pool:
        model = client.list_models()[0].name
        connections = [http.client.HTTPConnection("127.0.0.1", int(port)) for _ in range(burst)]

        def over_grpc(_number: int) -> float:
            prompt, salt = prompt_and_salt()
            start_s = time.perf_counter()
            stream = client.generate(prompt, temperature=0, max_tokens=NUM_OUT, ignore_eos=True, cache_salt=salt)
            next(delta for delta in stream if delta.token_ids)
            ttft_s = time.perf_counter() - start_s
            stream.result()
            return ttft_s

        def over_http(number: int) -> float:
            prompt, salt = prompt_and_salt()
            start_s = time.perf_counter()
            fields = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": NUM_OUT, "stream": True}
            body = json.dumps({**fields, "ignore_eos": True, "cache_salt": salt, "return_token_ids": True})
            connections[number].request("POST", "/v1/completions", body)
            answer = connections[number].getresponse()
            next(line for line in answer if b"token_ids" in line)
            ttft_s = time.perf_counter() - start_s
            answer.read()
            return ttft_s

        def median_ms(way: Callable[[int], float]) -> float:
            return statistics.median(pool.map(way, range(burst))) * 1000

        differences = [median_ms(over_http) - median_ms(over_grpc) for _ in range(num_rounds + 1)]
        for connection in connections:
            connection.close()
    return statistics.median(differences[1:])


def prompt_and_salt() -> tuple[list[int], str]:
    return [random.randrange(10, 1000) for _ in range(NUM_IN)], secrets.token_hex(8)


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
                gateways_ms = {burst: later_ms(target, port, burst, rounds) for burst, rounds in BURSTS.items()}
            finally:
                gateway.terminate()
                gateway.communicate()
    for way, each in figures.items():
        speed, ttft_ms = statistics.median(each.out_tok_s), statistics.median(each.ttft_ms)
        print(f"{way:6} {speed:8.1f} output tokens/s, median of {[round(v, 1) for v in each.out_tok_s]}")
        print(f"       {ttft_ms:8.1f} ms median time to first token, median of {[round(v, 1) for v in each.ttft_ms]}")
    ratios = [o / g for o, g in zip(figures["openai"].out_tok_s, figures["grpc"].out_tok_s, strict=True)]
    ways_ms = [o - g for o, g in zip(figures["openai"].ttft_ms, figures["grpc"].ttft_ms, strict=True)]
    print(f"throughput of REST / gRPC, median of pairs    {statistics.median(ratios):8.3f}")
    print(f"ms later to the first token, median of pairs  {statistics.median(ways_ms):8.1f}")
    for burst, ms in gateways_ms.items():
        print(f"the same with the plainest client, {burst:2} at once {ms:8.1f}")
    print(f"us of the gateway's processor time a chunk    {statistics.median(figures['openai'].cpu_us):8.1f}")


if __name__ == "__main__":
    main()
