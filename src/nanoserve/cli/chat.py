"""`nanoserve chat`: a conversation with a model, on a terminal or through pipes.

    line ─▶ /command
         └▶ message ─▶ client.chat(whole conversation) ─▶ text as it comes, then how fast it came

Answers go to standard output, everything else to standard error, so that a pipe gets the answers alone. Ctrl-C ends the
answer that is being written, Ctrl-D the program.
"""

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanoserve_client import (
    Cancelled,
    Client,
    ConstraintOutcome,
    Delta,
    FinishReason,
    GenerateOptions,
    InvalidRequest,
    NanoserveError,
)

from nanoserve.cli import line_editor
from nanoserve.cli.adapter import add_adapter, read_adapter
from nanoserve.cli.connection import connected
from nanoserve.cli.constraint import add_constraint, read_constraint
from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.sampling import add_sampling, read_sampling
from nanoserve.cli.terminal import has_colour, on_signals, start_logging, write, write_error
from nanoserve.config import ENGINE_SECTIONS

DESCRIPTION = """
    Talk to a model: MODEL, loaded into this process, or the one that a server has (--target).
"""
EXAMPLES = """
    nanoserve chat
    nanoserve chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.7
    nanoserve chat --target 127.0.0.1:50051
    nanoserve chat --target 127.0.0.1:50051 --adapter pirate
    echo "What is TTFT?" | nanoserve chat
"""
# What ends an answer that was not cut off.
WHOLE = (FinishReason.EOS, FinishReason.STOP, FinishReason.COMPLETE)
HELP = """\
/system TEXT   instructions for the model, from now on; without TEXT, none
/reset         forget the conversation
/save FILE     write the conversation into a new file, as JSON
/help          this
Ctrl-C stops an answer, Ctrl-D leaves."""


def add_arguments(parser: Parser) -> None:
    parser.describe("[MODEL] [OPTIONS]", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("The conversation")
    group.add_argument("--system", metavar="TEXT", help="Instructions for the model.")
    add_constraint(parser)
    add_sampling(parser, leave_out=("n", "logprobs", "prompt_logprobs"))
    add_options(parser, ("client", *ENGINE_SECTIONS))
    add_adapter(parser)


def run(arguments: argparse.Namespace) -> int:
    status_line = start_logging(logging.WARNING)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    options: GenerateOptions = {**read_sampling(arguments), **read_constraint(arguments), **read_adapter(arguments)}
    with connected(arguments, status_line) as (client, model):
        chat = Chat(client, options, arguments.system)
        if is_interactive:
            name = f"{model.name} with adapter {options['adapter']}" if "adapter" in options else model.name
            say(f"{name}, context of {model.max_context_tokens} tokens. /help lists commands, Ctrl-D leaves.")
        with line_editor.lines(is_interactive=is_interactive) as lines:
            for line in lines:
                # Ctrl-C before the first or after the last moment of an answer.
                with contextlib.suppress(KeyboardInterrupt):
                    chat.take(line)
    return 1 if chat.has_failed and not is_interactive else 0


def say(text: str) -> None:
    """What does not come from the model."""
    write_error(f"\x1b[2m{text}\x1b[0m\n" if has_colour(sys.stderr) else f"{text}\n")


@dataclass(slots=True)
class Pace:
    """How fast an answer comes."""

    sent_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0

    def count(self, delta: Delta) -> None:
        if delta.token_ids:
            self.last_s = time.monotonic()
            self.num_tokens += len(delta.token_ids)
            if self.first_s is None:
                self.first_s = self.last_s

    def describe(self) -> str:
        if self.first_s is None:
            return "no tokens"
        parts = [f"{self.num_tokens} tokens", f"first after {self.first_s - self.sent_s:.2f} s"]
        if self.last_s > self.first_s:
            # The first token has its own time.
            parts.append(f"then {(self.num_tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        return ", ".join(parts)


class Chat:
    """One conversation. Main thread."""

    def __init__(self, client: Client, options: GenerateOptions, system: str | None) -> None:
        self.has_failed = False
        self._client = client
        self._options = options
        self._system = system
        # Without the system message.
        self._messages: list[dict[str, str]] = []

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a message to be answered."""
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            self._command(name, rest.strip())
        elif line.strip():
            self._answer(line)

    def _command(self, name: str, rest: str) -> None:
        match name:
            case "/help":
                say(HELP)
            case "/reset":
                self._messages.clear()
                say("The conversation is forgotten.")
            case "/system":
                self._system = rest or None
                say(f"Instructions: {rest}" if rest else "There are no instructions.")
            case "/save" if rest:
                self._save(Path(rest).expanduser())
            case "/save":
                say("/save needs the name of a file.")
            case _:
                say(f"There is no command {name}.\n{HELP}")

    def _save(self, path: Path) -> None:
        try:
            # Not over what is there.
            with path.open("x") as file:
                json.dump(self._conversation(), file, ensure_ascii=False, indent=2)
                file.write("\n")
        except OSError as error:
            say(f"cannot write {path}: {error.strerror}")
        else:
            say(f"Saved to {path}.")

    def _conversation(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._messages]

    def _answer(self, message: str) -> None:
        question = {"role": "user", "content": message}
        pace, text, ending = Pace(), "", ""
        try:
            stream = self._client.chat([*self._conversation(), question], **self._options)
        except (TypeError, ValueError) as error:
            self._give_up(f"A value does not fit its parameter: {error}.")
            return
        try:
            # Its reader then gets Cancelled.
            with on_signals(stream.cancel, signal.SIGINT):
                for delta in stream:
                    pace.count(delta)
                    write(delta.text)
                    text += delta.text
                    if delta.finish_reason is not None and delta.finish_reason not in WHOLE:
                        ending = f", ended by its limit ({delta.finish_reason.value})"
                if self._options.get("relaxed"):
                    outcome = stream.result().completions[0].constraint_outcome
                    ending += ", breaks the schema" if outcome is ConstraintOutcome.RELAXED_VIOLATED else ""
        except Cancelled as error:
            ending = ", stopped" if error.reason is None else f", ended: {error.message}"
        except NanoserveError as error:
            write("\n" if text else "")
            hint = ". /reset begins anew." if isinstance(error, InvalidRequest) and self._messages else ""
            self._give_up(f"{error}{hint}")
            return
        write("\n")
        # A part of an answer is part of the conversation too: it is what the person saw.
        self._messages += [question, {"role": "assistant", "content": text}]
        say(f"[{pace.describe()}{ending}]")

    def _give_up(self, why: str) -> None:
        """A message that has no answer is no part of the conversation."""
        self.has_failed = True
        say(why)
