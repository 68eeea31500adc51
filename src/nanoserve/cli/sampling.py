"""Flags for the sampling parameters of a request: one for each field of SamplingParams.

Types and explanations are those of the client's GenerateOptions, which takes the values. Ranges are the server's to
check; its error names every violation.
"""

import argparse
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from nanoserve_client import GenerateOptions
from nanoserve_client.requests import explanations

from nanoserve.cli.flags import escape
from nanoserve.request import CALLERS_NAMES, SamplingParams

# What a terminal has no use for: it wants text.
WITHOUT_FLAG = "omit_text"


def sampling_flags() -> dict[str, dict[str, Any]]:
    """By flag, in the order of SamplingParams, what argparse is told of it. `dest` is the key of GenerateOptions."""
    hints = typing.get_type_hints(GenerateOptions)
    helps = explanations(GenerateOptions)
    names = [CALLERS_NAMES.get(each.name, each.name) for each in fields(SamplingParams)]
    return {
        "--" + name.replace("_", "-"): {"dest": name, "help": helps.get(name, ""), **_reading(hints[name])}
        for name in names
        if name != WITHOUT_FLAG
    }


def add_sampling(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """A group of flags; one that is not given takes the model's own value."""
    group = parser.add_argument_group("How tokens are drawn, by default in the model's own way, and when they end")
    for flag, told in sampling_flags().items():
        if told["dest"] not in leave_out:
            repeats = " May be given several times." if told.get("action") == "append" else ""
            group.add_argument(flag, **{**told, "help": escape(told["help"]) + repeats})


def read_sampling(arguments: argparse.Namespace) -> GenerateOptions:
    """What was given, for the client."""
    options: dict[str, Any] = {}
    for told in sampling_flags().values():
        if (value := getattr(arguments, told["dest"], None)) is not None:
            options[told["dest"]] = dict(value) if told.get("type") is _pair else value
    return typing.cast(GenerateOptions, options)


def _reading(hint: Any) -> dict[str, Any]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in kinds:
        return {"action": "store_true", "default": None}
    if float in kinds or int in kinds:
        return {"type": float if float in kinds else int, "metavar": "X" if float in kinds else "N"}
    if any(typing.get_origin(kind) is Mapping for kind in kinds):
        return {"type": _pair, "action": "append", "metavar": "TOKEN=BIAS"}
    if str in kinds and Sequence[int] in kinds:  # in a terminal, a text
        return {"metavar": "TEXT"}
    return {"type": str if str in kinds else int, "action": "append", "metavar": "TEXT" if str in kinds else "TOKEN"}


def _pair(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS, such as 50=-100") from None
