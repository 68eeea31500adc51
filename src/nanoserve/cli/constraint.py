"""Flags for what the output must be: the client's ConstraintOptions, as far as they fit a terminal."""

import argparse
import json
import typing
from pathlib import Path
from typing import Any

from nanoserve_client import ConstraintOptions

from nanoserve.cli.flags import escape
from nanoserve.cli.terminal import CommandError

# By flag what argparse is told of it. `dest` is the key of ConstraintOptions. Of these at most one is given.
CONSTRAINT_FLAGS: dict[str, dict[str, Any]] = {
    "--schema": {
        "dest": "schema",
        "metavar": "FILE",
        "help": "A JSON text that the JSON Schema in this file allows.",
    },
    "--json-object": {
        "dest": "json_object",
        "action": "store_true",
        "default": None,
        "help": "Any JSON object.",
    },
    "--regex": {
        "dest": "regex",
        "metavar": "REGEX",
        "help": "A text that this regular expression matches as a whole, in the syntax of Rust's regex crate.",
    },
    "--choice": {
        "dest": "choices",
        "metavar": "TEXT",
        "action": "append",
        "help": "One of the texts that are given so. May be given several times.",
    },
    "--grammar": {
        "dest": "grammar",
        "metavar": "FILE",
        "help": "A text of the Lark grammar in this file, as llguidance reads it.",
    },
}
RELAXED_FLAG = "--relaxed"
RELAXED_HELP = "With --schema: what of it cannot be enforced is only checked when the output is complete."


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """A group of flags."""
    group = parser.add_argument_group("What the output must be, by default any text")
    kinds = group.add_mutually_exclusive_group()
    for flag, told in CONSTRAINT_FLAGS.items():
        kinds.add_argument(flag, **{**told, "help": escape(told["help"])})
    group.add_argument(RELAXED_FLAG, action="store_true", default=None, help=RELAXED_HELP)


def read_constraint(arguments: argparse.Namespace) -> ConstraintOptions:
    """What was given, for the client. Raises CommandError for a file that cannot be read, or is no JSON."""
    names = [*(told["dest"] for told in CONSTRAINT_FLAGS.values()), "relaxed"]
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "relaxed" in options and "schema" not in options:
        raise CommandError("--relaxed is for --schema")
    for name in options.keys() & {"schema", "grammar"}:
        options[name] = _text_of(options[name])
    if "schema" in options:
        _check_json(options["schema"], arguments.schema)
    return typing.cast(ConstraintOptions, options)


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not UTF-8: {error}") from None


def _check_json(text: str, file: str) -> None:
    """Here the file's name is known."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{file} is not JSON: {error}") from None
