"""The command line: `nanoserve serve`. Its flags are the fields of config.py."""

import argparse
import asyncio
import dataclasses
import logging
import os
import re
import sys
import time
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoserve.config import ConfigError, Options, flag_of

if TYPE_CHECKING:
    from nanoserve.engine.engine import Engine

SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nanoserve", description="An LLM serving engine that people can read.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="serve a model over gRPC",
        description="Serve a model over gRPC. Without MODEL, the small one that is built in.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(serve_parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(serve(read_options(arguments)))
    except ConfigError as error:
        print(f"nanoserve: {error}", file=sys.stderr)
        return 2


# -------------------------------------------------------------------------------------------------- flags


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of each section of Options."""
    for section in dataclasses.fields(Options):
        section_type = typing.get_type_hints(Options)[section.name]
        group = parser.add_argument_group(section.name, section_type.__doc__)
        hints = typing.get_type_hints(section_type)
        for each in dataclasses.fields(section_type):
            default = each.default
            if default is None or isinstance(default, bool) or each.name == "path":
                default = argparse.SUPPRESS  # keeps "(default: None)" out of the help
            settings = {"help": each.metadata["help"], "default": default, **_parse_as(hints[each.name], each)}
            if flag_of(each).startswith("--"):
                settings["dest"] = each.name
            group.add_argument(flag_of(each), **settings)


def _parse_as(hint: Any, each: "dataclasses.Field[Any]") -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": "store_false" if each.default else "store_true"}
    if each.name.endswith("_bytes"):
        return {"type": parse_size, "metavar": "SIZE"}
    if not flag_of(each).startswith("--"):
        return {"nargs": "?", "metavar": "MODEL"}
    return {"type": hint, "metavar": {int: "N", float: "SECONDS", Path: "FILE"}.get(hint, "TEXT")}


def read_options(arguments: argparse.Namespace) -> Options:
    """Raises ConfigError."""
    given = vars(arguments)
    sections = {}
    for section in dataclasses.fields(Options):
        section_type = typing.get_type_hints(Options)[section.name]
        names = {each.name for each in dataclasses.fields(section_type)} & given.keys()
        sections[section.name] = section_type(**{name: given[name] for name in names})
    return Options(**sections)


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GiB, 512MB or 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b|)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 2GiB, 512MB or a number of bytes")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


# -------------------------------------------------------------------------------------------------- serve


async def serve(options: Options) -> int:
    """Listen at once, load the model, serve until a signal. Returns the exit code."""
    # Imported here: torch and transformers take seconds, and --help should not.
    from nanoserve.rpc.server import Server

    started_s = time.monotonic()
    server = Server(options.server)
    try:
        address = f"{options.server.host}:{await server.start()}"
        serving = asyncio.create_task(server.run_until_signal())
        await asyncio.sleep(0)  # lets it take over the signals
        logger.info("listening on %s, not ready yet: loading %s", address, options.model.path)
        loading = asyncio.create_task(asyncio.to_thread(_build, options))
        await asyncio.wait([serving, loading], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # A signal came first, and nothing can stop a thread that loads a model.
            logging.shutdown()
            os._exit(0)
        engine = loading.result()
    except ConfigError:
        await server.stop()
        raise
    engine.start()
    server.set_engine(engine)
    logger.info("ready after %.1f s: %s on %s", time.monotonic() - started_s, engine.model.name, address)
    ended = asyncio.create_task(engine.wait_until_ended())
    await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        # Nothing mends it in this process; whoever watches over it starts another.
        logger.critical("the engine is gone; stopping")
        await server.stop()
        return 1
    await engine.close()
    logger.info("stopped")
    return 0


def _build(options: Options) -> "Engine":
    from nanoserve.build import build_engine

    return build_engine(options)
