"""`nanoserve generate`: completions of prompts, written as they come.

    prompts ─▶ up to IN_FLIGHT requests at once, so that the engine can batch ─▶ output in the prompts' order

The output of one completion is its text and nothing else. Of several each has a heading, as `head` gives files; with
--json each prompt is one line of JSON.
"""

import argparse
import dataclasses
import enum
import json
import logging
import sys
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from nanoserve_client import Client, ConstraintOutcome, GenerateOptions, GenerateStream, NanoserveError, Result

from nanoserve.cli.adapter import add_adapter, read_adapter
from nanoserve.cli.connection import connected
from nanoserve.cli.constraint import add_constraint, read_constraint
from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.sampling import add_sampling, read_sampling
from nanoserve.cli.terminal import CommandError, start_logging, write, write_error
from nanoserve.config import ENGINE_SECTIONS

IN_FLIGHT = 64
HEADING_CHARS = 60

DESCRIPTION = """
    Complete prompts: arguments, a text on standard input, or the lines of a file.

    The model is loaded into this process, or another process serves it (--target).
"""
EXAMPLES = """
    nanoserve generate "Once upon a time" --max-tokens 50
    nanoserve generate --chat "What is paged attention?" --temperature 0
    cat essay.txt | nanoserve generate --model Qwen/Qwen3-0.6B
    nanoserve generate --chat "Name a city." --schema city.json
    nanoserve generate --chat "Who are you?" --adapter pirate=./adapters/pirate
    nanoserve generate --file prompts.txt --json --target 127.0.0.1:50051 > answers.jsonl
"""


def add_arguments(parser: Parser) -> None:
    parser.describe("[PROMPT ...] [OPTIONS]", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("Prompts and output")
    group.add_argument("prompts", nargs="*", metavar="PROMPT", help="A prompt. Default: all of standard input.")
    group.add_argument("--file", metavar="FILE", help="Each line of this file is a prompt; - = of standard input.")
    group.add_argument(
        "--chat",
        action="store_true",
        help="A prompt is a message to the model, put into its chat template. Default: a text to be continued.",
    )
    group.add_argument("--json", action="store_true", help="Write a line of JSON for each prompt.")
    add_constraint(parser)
    add_sampling(parser)
    add_options(parser, ("client", *ENGINE_SECTIONS), has_positional=False)
    add_adapter(parser)


def run(arguments: argparse.Namespace) -> int:
    status_line = start_logging(logging.WARNING)
    prompts = read_prompts(arguments.prompts, arguments.file)
    options: GenerateOptions = {**read_sampling(arguments), **read_constraint(arguments), **read_adapter(arguments)}
    is_alone = len(prompts) == 1 and options.get("n") in (None, 1)
    show = show_json if arguments.json else show_text if is_alone else show_with_heading
    num_failed = 0
    with connected(arguments, status_line) as (client, _):
        for prompt, stream in _send(client, prompts, options, is_chat=arguments.chat):
            try:
                show(prompt, stream)
                why = unmet(stream.result())
            except NanoserveError as error:
                why = str(error)
                if arguments.json:
                    write(json.dumps({"prompt": prompt, "error": why}, ensure_ascii=False) + "\n")
            if why is not None:
                num_failed += 1
                write_error(f"nanoserve: prompt {_shorten(prompt)!r}: {why}\n")
    return 1 if num_failed else 0


def unmet(result: Result) -> str | None:
    """Why a completion is not what it must be; None if all are."""
    outcomes = {each.constraint_outcome: each for each in result.completions}
    if (cut := outcomes.get(ConstraintOutcome.TRUNCATED)) is not None:
        return f"the output is cut off before it is what it must be ({cut.finish_reason.value})"
    if ConstraintOutcome.RELAXED_VIOLATED in outcomes:
        keywords = ", ".join(f"{each.pointer}/{each.keyword}" for each in result.unenforced)
        return f"the output breaks the schema, of which this was only checked: {keywords}"
    return None


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """From wherever they are. Raises CommandError if there are none, or two sources."""
    if given and file is not None:
        raise CommandError("prompts come as arguments or from --file, not both")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise CommandError("there is no prompt: give one as an argument, through a pipe, or with --file")
    try:
        text = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text()
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"the prompts are not UTF-8: {error}") from None
    # The newline that ends a text file is not part of the text.
    prompts = [text.removesuffix("\n")] if file is None else text.splitlines()
    if not any(prompts):
        raise CommandError("there is no prompt: the input is empty")
    return prompts


def _send(
    client: Client, prompts: list[str], options: GenerateOptions, *, is_chat: bool
) -> Iterator[tuple[str, GenerateStream]]:
    """Each prompt with its stream, in order; the streams of the next ones run already."""
    send = client.chat if is_chat else client.generate
    running: deque[tuple[str, GenerateStream]] = deque()
    try:
        for prompt in prompts:
            if len(running) == IN_FLIGHT:
                yield running.popleft()
            running.append((prompt, send(prompt, **options)))
    except (TypeError, ValueError) as error:
        raise CommandError(f"a value does not fit its parameter: {error}") from None
    yield from running


def show_text(_prompt: str, stream: GenerateStream) -> None:
    """The text as it comes."""
    text = ""
    try:
        for delta in stream:
            text = delta.text or text
            write(delta.text)
    finally:
        if text and not text.endswith("\n"):
            write("\n")


def show_with_heading(prompt: str, stream: GenerateStream) -> None:
    """Each completion whole, because those of one prompt come at the same time."""
    completions = stream.result().completions
    for each in completions:
        which = f" ({each.index + 1} of {len(completions)})" if len(completions) > 1 else ""
        write(f"==> {_shorten(prompt)}{which} <==\n{each.text}\n")


def show_json(prompt: str, stream: GenerateStream) -> None:
    """A line with the prompt and the fields of nanoserve_client.Result."""
    result = dataclasses.asdict(stream.result())
    for completion in result["completions"]:
        # It is a function.
        del completion["parse"]
    write(json.dumps({"prompt": prompt, **result}, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: object) -> object:
    """For json: what it does not know."""
    match value:
        case enum.Enum():
            return value.value
        case datetime():
            return value.isoformat()
        case bytes():
            return value.decode(errors="replace")
    raise TypeError(f"{value!r} has no form in JSON")


def _shorten(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= HEADING_CHARS else line[: HEADING_CHARS - 3] + "..."
