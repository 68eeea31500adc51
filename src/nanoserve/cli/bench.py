"""`nanoserve bench offline | serve`: the benchmarks of nanoserve.bench, which are imported when one is run."""

import argparse

from nanoserve.cli import run_command
from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import CommandError

KINDS = {
    "offline": "throughput of the engine in this process",
    "serve": "latency and throughput of a running server, under load",
}


def add_arguments(parser: Parser) -> None:
    parser.describe(
        "KIND [OPTIONS]",
        "Measure how fast it is.\n\nKinds:\n" + "\n".join(f"  {kind:8}  {what}" for kind, what in KINDS.items()),
        "nanoserve bench offline --help\nnanoserve bench serve --target 127.0.0.1:50051",
    )
    parser.add_argument("kind", metavar="KIND", nargs="?", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if arguments.kind is None:
        raise CommandError(f"which benchmark? {' or '.join(KINDS)}; nanoserve bench --help says what they are")
    return run_command(f"bench {arguments.kind}", f"nanoserve.bench.{arguments.kind}", arguments.rest)
