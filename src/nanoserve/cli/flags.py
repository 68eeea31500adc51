"""Flags: how they look in help, how a wrong one is refused, and those that are made from the options of config.py."""

import argparse
import difflib
import inspect
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from nanoserve.config import SECTIONS, SERVE_SECTIONS, Setting, settings

CONFIGURATION = """\
Every option but those of single requests may also stand in the environment, as NANOSERVE_MAX_NUM_SEQS, and in a file,
as max-num-seqs = 32. A flag overrules a variable, a variable the file. A switch that one of them turned is turned back
by its opposite: --compile for --no-compile, --no-tls for --tls."""


class Parser(argparse.ArgumentParser):
    """A parser whose help is for people, and whose errors are one line. No flag may be abbreviated: one that a later
    version adds would make it mean two."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def describe(self, usage: str, description: str, examples: str) -> None:
        """usage: what follows the command's name. examples: a command a line, each with what it does."""
        self.usage = f"{self.prog} {usage}".rstrip()
        self.description = inspect.cleandoc(description)
        self.epilog = "Examples:\n" + "\n".join(f"  {line}" for line in inspect.cleandoc(examples).splitlines())

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """As parse_args does, but what has no flag may stand before, between and behind flags."""
        # argparse cannot do that beside `--`, and where the rest of the line is for another parser.
        has_rest = any(action.nargs == argparse.REMAINDER for action in self._get_positional_actions())
        return self.parse_args(argv) if has_rest or "--" in argv else self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        wrong = message.rpartition(" ")[2].partition("=")[0]
        known = [flag for flag, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        is_unknown = wrong.startswith("--") and wrong not in known
        close = difflib.get_close_matches(wrong, known, n=1) if is_unknown else []
        hint = f"; did you mean {close[0]}?" if close else "."
        self.exit(2, f"{self.prog}: {message}{hint} See {self.prog} --help\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to what is easy to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size().columns - 2))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """A flag is not broken at its dashes."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled; lists and commands have lines of their own, which are indented."""
        wrapper = textwrap.TextWrapper(width - len(indent), break_on_hyphens=False)
        paragraphs = [each if "\n " in each else wrapper.fill(each) for each in text.split("\n\n")]
        return textwrap.indent("\n\n".join(paragraphs), indent)


def add_options(
    parser: argparse.ArgumentParser, sections: Sequence[str] = SERVE_SECTIONS, *, has_positional: bool = True
) -> None:
    """A group of flags for each of these sections of config.SECTIONS, and --config; sources.py reads them.

    has_positional: the model stands alone on the command line; else it is --model.
    """
    for name in sections:
        group = parser.add_argument_group(SECTIONS[name].__doc__.splitlines()[0].removesuffix("."))
        for setting in settings(name):
            place, help = destination(setting), escape(setting.full_help)
            if setting.is_positional and has_positional:
                group.add_argument(place, nargs="?", metavar=setting.metavar, help=help)
            elif setting.kind is bool:
                group.add_argument(setting.flag, dest=place, action="store_const", const=True, help=help)
                # For a switch that a file or variable turned.
                hidden = argparse.SUPPRESS
                group.add_argument(setting.opposite, dest=place, action="store_const", const=False, help=hidden)
            else:
                group.add_argument(setting.flag, dest=place, metavar=setting.metavar, help=help)
    group = parser.add_argument_group("Configuration", CONFIGURATION)
    group.add_argument("--config", metavar="FILE", help="TOML file of options.")


def number(low: float, high: float, wanted: str) -> Callable[[str], float]:
    """Reads a flag's number within these bounds; `wanted` says what they are."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be {wanted}")
        return value

    return read


def destination(setting: Setting) -> str:
    """The setting's place in parsed arguments, where a command's own flags cannot be."""
    return f"option {setting.name}"


def escape(help: str) -> str:
    """argparse takes a percent sign for the begin of a place for a value."""
    return help.replace("%", "%%")
