"""`nanoserve bench serve`: what a server's callers get under load, over gRPC or OpenAI's API.

The client is part of what is measured: on the same machine it takes its share of the processor.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from nanoserve_client import AsyncClient
from tqdm import tqdm

from nanoserve.bench.load import Measurement, measure, over_grpc
from nanoserve.bench.plot import check_plot, save_plot
from nanoserve.bench.report import Limits, Report
from nanoserve.bench.workload import WARM_UP, parse_workload
from nanoserve.cli.connection import needed_server, remote_client, telling_of
from nanoserve.cli.flags import Parser, add_options, number
from nanoserve.cli.terminal import write
from nanoserve.config import ClientOptions, ConfigError

# Where `nanoserve serve` opens it.
OPENAI_URL = "http://127.0.0.1:8000/v1"
POSITIVE = number(sys.float_info.min, sys.float_info.max, "a number above 0")
DESCRIPTION = """
    Send requests to a running server, and report how long callers wait.

    TTFT is from the moment a request is due to its first token, E2E to its end. ITL is the time between tokens; tokens
    that come together share it. Requests are greedy and ignore EOS. Prefixes are shared within a run alone, and a tiny
    batch warms the server up before the first. Ctrl-C ends the run and reports what there is.
"""
EXAMPLES = """
    nanoserve bench serve --target 127.0.0.1:50051 --workload 32:128:64
    nanoserve bench serve --target 127.0.0.1:50051 --workload 64:512:64:384 --json -
    nanoserve bench serve --target 127.0.0.1:50051 --api openai --workload 32:128:64
    nanoserve bench serve --target 127.0.0.1:50051 --workload sharegpt:200 --rate 4 --max-ttft-ms 500 --plot run.png
"""


def add_arguments(parser: Parser) -> None:
    parser.describe("--target ADDRESS --workload WORKLOAD... [OPTIONS]", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("What is sent")
    group.add_argument(
        "--workload",
        nargs="+",
        required=True,
        type=parse_workload,
        metavar="WORKLOAD",
        help="N:IN:OUT[:SHARED] = N requests of IN random prompt tokens, the first SHARED the same in all, and OUT new "
        "ones; or sharegpt:N = N requests of lengths like those of people's chats. Several run one after the other.",
    )
    group.add_argument(
        "--rate",
        type=POSITIVE,
        metavar="R",
        help="Requests that arrive a second, at random times (a Poisson process). Default: all at once.",
    )
    group.add_argument(
        "--api",
        choices=("grpc", "openai"),
        metavar="grpc|openai",
        default="grpc",
        help="Over which the requests go. openai = completions at --openai-url; which tokens the model has, and how "
        "many it takes, --target says. Default: grpc.",
    )
    group.add_argument(
        "--openai-url", metavar="URL", help=f"Where OpenAI's API is served, for --api openai. Default: {OPENAI_URL}."
    )
    group = parser.add_argument_group("What a good request is, for goodput: it completes within every limit given")
    group.add_argument("--max-ttft-ms", type=POSITIVE, metavar="MS", help="Time to first token.")
    group.add_argument("--max-itl-ms", type=POSITIVE, metavar="MS", help="Mean inter-token latency.")
    group.add_argument("--max-e2e-ms", type=POSITIVE, metavar="MS", help="Time to its end.")
    group = parser.add_argument_group("Where the figures go")
    group.add_argument(
        "--json",
        metavar="FILE",
        help="A line of JSON a workload, besides the table; - = on standard output instead of it.",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="A picture, .png or .svg. Needs nanoserve[bench].")
    add_options(parser, ("client",))


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if a request failed. Raises ConfigError or CommandError if nothing could be measured."""
    _, client = needed_server(arguments)
    if arguments.openai_url is not None and arguments.api != "openai":
        raise ConfigError(f"--openai-url is {arguments.openai_url!r}; it is for --api openai")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    limits = Limits(arguments.max_ttft_ms, arguments.max_itl_ms, arguments.max_e2e_ms)
    with _open_json(arguments.json) as json_file:

        def tell(text: str, measurement: Measurement) -> None:
            report = Report.of(text, arguments.rate, measurement, limits)
            line = json.dumps(dataclasses.asdict(report)) + "\n"
            write(line if json_file is sys.stdout else report.as_text())
            if json_file is not None and json_file is not sys.stdout:
                json_file.write(line)
                json_file.flush()

        measured = asyncio.run(_measure_all(client, arguments, tell))
    if arguments.plot is not None and measured:
        save_plot(arguments.plot, measured)
    if len(measured) < len(arguments.workload) or measured[-1][1].is_interrupted:
        return 128 + signal.SIGINT
    return int(any(record.failure for _, measurement in measured for record in measurement.records))


@contextlib.contextmanager
def _open_json(name: str | None) -> Iterator[TextIO | None]:
    """Opened before the run, which may be long. Raises ConfigError if it cannot be, or is not written to its end."""
    if name is None or name == "-":
        yield None if name is None else sys.stdout
        return
    try:
        with Path(name).open("w") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--json is {name!r}; it cannot be written: {error.strerror}") from None


async def _measure_all(
    options: ClientOptions, arguments: argparse.Namespace, tell: Callable[[str, Measurement], None]
) -> list[tuple[str, Measurement]]:
    """Run one workload after the other, each with a bar, and tell of each as it ends; Ctrl-C makes it the last.

    Raises ConfigError or CommandError if nothing can be measured.
    """
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(remote_client(options, AsyncClient))
        with telling_of(options.target):
            model = (await client.list_models())[0]
        send = over_grpc(client)
        if arguments.api == "openai":
            # Imported here, because openai's types take a moment.
            from nanoserve.bench.openai_api import over_openai

            opened = over_openai(arguments.openai_url or OPENAI_URL, options.api_key or "none", model.name)
            send = await stack.enter_async_context(opened)
        # All before any is run, so that one which cannot run is told of at once.
        prepared = [(w.text, w.requests(model.vocab_size, model.max_context_tokens)) for w in arguments.workload]
        measured: list[tuple[str, Measurement]] = []
        warm_up = await measure(send, WARM_UP.requests(model.vocab_size, model.max_context_tokens), rate=None)
        if warm_up.is_interrupted:
            return measured
        for text, requests in prepared:
            # None = a bar on a terminal only.
            with tqdm(total=len(requests), desc=text, unit="request", leave=False, disable=None) as bar:
                measurement = await measure(send, requests, arguments.rate, bar.update)
            measured.append((text, measurement))
            tell(text, measurement)
            if measurement.is_interrupted:
                break
        return measured
