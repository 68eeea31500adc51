"""The command line: nanoserve serve | generate | chat | adapters | top | bench | version.

    main ─▶ one module a command: add_arguments(parser), run(arguments) -> exit code

    flags.py       options and their flags          sources.py     flag > environment > file > default
    sampling.py    sampling parameters as flags     connection.py  a server elsewhere, or one in this process
    terminal.py    what is written, and where    adapter.py     which adapter a request is computed with

A command's module is imported when it is run, and nothing here imports torch, so that help comes at once. Exit codes:
0, 1 if a request failed, 2 if the command cannot be run so, 128 + the signal's number if a signal ended it.
"""

import difflib
import importlib
import signal
import sys

from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import CommandError, write, write_error
from nanoserve.config import ConfigError

COMMANDS = {
    "serve": "serve a model over gRPC, and over OpenAI's API",
    "generate": "complete prompts, from arguments, a pipe or a file",
    "chat": "talk to a model in the terminal",
    "adapters": "list, load and unload the LoRA adapters of a running server",
    "top": "watch a running server: its sequences, KV blocks and queue",
    "bench": "measure throughput and latency",
    "version": "print versions, device and CPU features",
}
OVERVIEW = """\
usage: nanoserve COMMAND [OPTIONS]

An LLM serving engine that people can read.

Commands:
{commands}

Examples:
  nanoserve serve                             the small model that is built in, on 127.0.0.1:50051
  nanoserve chat --target 127.0.0.1:50051     talk to it from another terminal
  nanoserve chat Qwen/Qwen3-0.6B              talk to a model of the Hugging Face Hub, without a server

nanoserve COMMAND --help says more.
""".format(commands="\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        write(OVERVIEW)
        return 0
    if name == "--version":
        name = "version"
    if name not in COMMANDS:
        write_error(_unknown(name) if name else OVERVIEW)
        return 2
    try:
        return run_command(name, f"nanoserve.cli.{name}", rest)
    except (ConfigError, CommandError) as error:
        # Messages of libraries may have several lines.
        write_error(f"nanoserve: {' '.join(str(error).split())}\n")
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run_command(name: str, module: str, argv: list[str]) -> int:
    """Run the command of a module with what follows its name on the command line; returns the exit code."""
    command = importlib.import_module(module)
    parser = Parser(f"nanoserve {name}")
    command.add_arguments(parser)
    exit_code: int = command.run(parser.parse(argv))
    return exit_code


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}."
    return f"nanoserve: there is no command {name!r}; {hint} See nanoserve --help\n"
