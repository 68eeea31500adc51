"""What traces and metrics cost: CPU seconds a token of two servers, one with both and one without.

    python benchmarks/observability.py [ROUNDS [TOKENS]]

Both serve the built-in model, each to 64 concurrent streams of TOKENS tokens (default 200), ROUNDS times (default 12),
side by side, so that whatever else the machine does falls on both. The traces go to a collector in this process, every
one of them, and the page of metrics is read every five seconds. Counted is the CPU time of the server's process and of
its engine's, not the caller's.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from nanoserve_client import AsyncClient
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from served import serving

NUM_STREAMS = 64
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
HTTP_PORT = 18999
# As in deploy/prometheus.yml.
SCRAPE_INTERVAL_S = 5


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts spans."""

    def __init__(self) -> None:
        self.num_spans = 0

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        self.num_spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass
class Server:
    """A running server."""

    process: "subprocess.Popen[str]"
    address: str
    # Of each round.
    cpu_ms_per_token: list[float] = field(default_factory=list)

    def cpu_s(self) -> float:
        """Used by it and its engine's process so far."""
        pids = [self.process.pid]
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
        # Fields 14 and 15; the second, a name in parentheses, may have spaces.
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS_PER_S

    async def run_round(self, num_tokens: int, *, is_counted: bool = True) -> None:
        before_s = self.cpu_s()
        count = await generate(self.address, num_tokens)
        if is_counted:
            self.cpu_ms_per_token.append((self.cpu_s() - before_s) * 1000 / count)


async def generate(address: str, num_tokens: int) -> int:
    """Tokens that came, of all streams."""
    async with AsyncClient(address) as client:
        streams = [
            client.chat(f"Tell me of {i}", max_tokens=num_tokens, ignore_eos=True, temperature=0)
            for i in range(NUM_STREAMS)
        ]
        results = await asyncio.gather(*(stream.result() for stream in streams))
    return sum(result.usage.completion_tokens for result in results)


async def run_rounds(servers: list[Server], num_rounds: int, num_tokens: int) -> None:
    for i in range(num_rounds + 1):
        # The first is outside the figures: compiled parts come into use.
        await asyncio.gather(*(server.run_round(num_tokens, is_counted=i > 0) for server in servers))


def scrape(is_over: list[bool]) -> None:
    while not is_over:
        with urllib.request.urlopen(f"http://127.0.0.1:{HTTP_PORT}/metrics") as response:
            response.read()
        time.sleep(SCRAPE_INTERVAL_S)


def main() -> None:
    num_rounds, num_tokens = [*map(int, sys.argv[1:]), *(12, 200)[len(sys.argv) - 1 :]]
    collector, sink = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, sink)
    port = sink.add_insecure_port("127.0.0.1:0")
    sink.start()
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_METRICS_EXPORTER": "none"}
    is_over: list[bool] = []
    with (
        serving(["--no-metrics", "--http-port", "0"]) as without,
        serving(["--http-port", str(HTTP_PORT)], traced) as with_both,
        ThreadPoolExecutor(1) as scraper,
    ):
        off, on = Server(*without), Server(*with_both)
        try:
            scraper.submit(scrape, is_over)
            asyncio.run(run_rounds([off, on], num_rounds, num_tokens))
        finally:
            is_over.append(True)
    sink.stop(None)
    ratios = [b / a for a, b in zip(off.cpu_ms_per_token, on.cpu_ms_per_token, strict=True)]
    for name, server in (("off", off), ("on", on)):
        median = statistics.median(server.cpu_ms_per_token)
        print(f"{name:4} {median:.4f} CPU ms a token, median of {num_rounds} rounds")
    print(f"ratio of pairs: median {statistics.median(ratios):.4f}, all {[round(each, 3) for each in sorted(ratios)]}")
    print(f"ratio of sums:  {sum(on.cpu_ms_per_token) / sum(off.cpu_ms_per_token):.4f}")
    print(f"{collector.num_spans} spans came to the collector")


if __name__ == "__main__":
    main()
