"""`nanoserve adapters list | load | unload`: the LoRA adapters of a running server."""

import argparse
from collections.abc import Callable, Sequence

from nanoserve_client import Adapter, Client, NanoserveError

from nanoserve.cli.connection import needed_server, remote_client, served_by
from nanoserve.cli.flags import Parser, add_options, number
from nanoserve.cli.terminal import CommandError, write
from nanoserve.config import format_size

DESCRIPTION = """
    Say which LoRA adapters a running server has, and change them while it serves. With API keys it takes an admin's.

    Actions:
      list                 all of them, where their weights are, and how many sequences use each
      load NAME [PATH]     read a PEFT folder of the server, under its --adapters folder, and serve it as NAME
      unload NAME          serve it no more, once the requests that run with it have ended
"""
EXAMPLES = """
    nanoserve adapters list --target 127.0.0.1:50051
    nanoserve adapters load pirate --target 127.0.0.1:50051
    nanoserve adapters load pirate pirate-v2 --replace --target 127.0.0.1:50051
    nanoserve adapters unload pirate --drain 5 --target 127.0.0.1:50051
"""
HEADING = ("NAME", "WHERE", "RANK", "MEMORY", "RUNNING", "WAITING", "REVISION")
# Columns of text; the others are numbers, which end at the same place.
LEFT = ("NAME", "WHERE", "REVISION")
REVISION_CHARS = 12


def add_arguments(parser: Parser) -> None:
    parser.describe("ACTION [NAME] [PATH] --target ADDRESS [OPTIONS]", DESCRIPTION, EXAMPLES)
    parser.add_argument("action", metavar="ACTION", nargs="?", choices=ACTIONS, help=argparse.SUPPRESS)
    parser.add_argument("name", metavar="NAME", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("path", metavar="PATH", nargs="?", help=argparse.SUPPRESS)
    group = parser.add_argument_group("How")
    group.add_argument("--pinned", action="store_true", help="load: it keeps its slot, also when nobody asks for it.")
    group.add_argument(
        "--replace",
        action="store_true",
        help="load: in place of other weights of this name. Running requests end with theirs.",
    )
    group.add_argument(
        "--drain",
        type=number(0, 3600, "0 to 3600"),
        metavar="SECONDS",
        help="unload: how long running requests may take to end, 0 to 3600. Default: 30.",
    )
    add_options(parser, ("client",))


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError or CommandError."""
    if arguments.action is None:
        raise CommandError(f"what is to be done? {', '.join(ACTIONS)}; nanoserve adapters --help says what they are")
    _check(arguments)
    target, options = needed_server(arguments)
    with remote_client(options, Client) as client:
        served_by(client, target)
        try:
            ACTIONS[arguments.action](client, arguments)
        except (NanoserveError, ValueError) as error:
            raise CommandError(f"the server at {target}: {error}") from None
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Nothing is ignored. Raises CommandError."""
    action = arguments.action
    if action != "list" and arguments.name is None:
        raise CommandError(f"{action} needs the NAME of an adapter")
    useless = {
        "NAME": arguments.name is not None and action == "list",
        "PATH": arguments.path is not None and action != "load",
        "--pinned": arguments.pinned and action != "load",
        "--replace": arguments.replace and action != "load",
        "--drain": arguments.drain is not None and action != "unload",
    }
    if given := [what for what, is_useless in useless.items() if is_useless]:
        raise CommandError(f"{', '.join(given)} would change nothing: {action} takes none")


def _list(client: Client, _arguments: argparse.Namespace) -> None:
    listed = client.list_adapters()
    loaded = {each.name for each in listed.adapters}
    unread = [each.name for each in client.list_models() if each.base_model and each.name not in loaded]
    rows = [*map(_row, listed.adapters), *((name, "never read", *"-----") for name in unread)]
    write(_table([HEADING, *sorted(rows)]))
    memory = f"{format_size(listed.memory_bytes)} of {format_size(listed.memory_limit_bytes)} of memory"
    write(f"{len(rows)} adapters, {memory}, {listed.slots} slots\n")


def _row(adapter: Adapter) -> tuple[str, ...]:
    where = adapter.residency.value + (", pinned" if adapter.pinned else "")
    counts = (str(adapter.rank), format_size(adapter.bytes), str(adapter.running), str(adapter.waiting))
    return adapter.name, where, *counts, adapter.revision[:REVISION_CHARS]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, HEADING, strict=True)
        padded = [cell.ljust(width) if name in LEFT else cell.rjust(width) for cell, width, name in cells]
        lines.append("  ".join(padded).rstrip())
    return "".join(f"{line}\n" for line in lines)


def _load(client: Client, arguments: argparse.Namespace) -> None:
    loaded = client.load_adapter(
        arguments.name, arguments.path or "", pinned=arguments.pinned, replace=arguments.replace
    )
    what = f"rank {loaded.rank}, {format_size(loaded.bytes)}, revision {loaded.revision[:REVISION_CHARS]}"
    write(f"{loaded.name} is served: {what}, from {loaded.path}\n")


def _unload(client: Client, arguments: argparse.Namespace) -> None:
    client.unload_adapter(arguments.name, drain_timeout=arguments.drain)
    write(f"{arguments.name} is served no more\n")


ACTIONS: dict[str, Callable[[Client, argparse.Namespace], None]] = {"list": _list, "load": _load, "unload": _unload}
