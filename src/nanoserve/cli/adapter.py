"""--adapter of `generate` and `chat`: the adapter that answers.

--adapter NAME          one that the server has (--target), or that lies in the folder of --adapters
--adapter NAME=PATH     one that is first read from this folder, into the model of this process
"""

import argparse

from nanoserve_client import GenerateOptions

from nanoserve.cli.flags import destination
from nanoserve.cli.sources import ALL
from nanoserve.cli.terminal import CommandError

# The option of the same name loads adapters, and chooses none.
_SETTING = ALL["adapter"]
HELP = (
    "The LoRA adapter that answers. NAME: one that the server has, or that lies in the folder of --adapters. NAME=PATH:"
    " a PEFT folder, which the model in this process reads first. Default: the model as it is."
)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """After add_options, whose flag it changes: a command that makes requests chooses one adapter."""
    [action] = [each for each in parser._actions if each.dest == destination(_SETTING)]
    action.help, action.metavar = HELP, "NAME[=PATH]"


def read_adapter(arguments: argparse.Namespace) -> GenerateOptions:
    """What was given, for the client. What is no path to read is taken from the arguments. Raises CommandError."""
    given: str | None = getattr(arguments, destination(_SETTING))
    if given is None:
        return {}
    name, separator, path = given.partition("=")
    if not name or (separator and not path) or "," in given:
        raise CommandError(f"--adapter is {given!r}; it must be NAME or NAME=PATH, of one adapter")
    if not separator:
        setattr(arguments, destination(_SETTING), None)
    return {"adapter": name}
