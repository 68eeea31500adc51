"""`nanoserve top`: what a running server does, live in a terminal; through a pipe, a line a snapshot.

client.watch_engine ──▶ Screen: figures, KV map, queue, a line a sequence        on a terminal
                    └──▶ one line of figures                                    elsewhere
"""

import argparse
import contextlib
import itertools
import re
import shutil
import signal
import sys
import termios
import threading
import tty
from collections import Counter
from collections.abc import Iterator

from nanoserve_client import (
    Cancelled,
    Client,
    EngineSnapshot,
    EngineWatch,
    NanoserveError,
    SequencePhase,
    SequenceSnapshot,
)

from nanoserve.cli.connection import needed_server, remote_client, served_by
from nanoserve.cli.flags import Parser, add_options, number
from nanoserve.cli.terminal import CommandError, has_colour, is_screen, on_signals, write

DESCRIPTION = """
    Show what a running server does: its sequences with their progress, who owns the KV blocks, the queue, how fast
    it is. On a terminal it goes on until q or Ctrl-C; through a pipe it writes a line a snapshot.
"""
EXAMPLES = """
    nanoserve top --target 127.0.0.1:50051
    nanoserve top --target 127.0.0.1:50051 --interval 0.2
    nanoserve top --target 127.0.0.1:50051 | head -3
"""
# Rows of the screen for the KV map.
MAP_ROWS = 4
LABEL_WIDTH = 24
BAR_WIDTH = 30

COLOURS = {"prompt": "34", "cached": "33", "token": "32", "preempted": "31", "soft": "2", "bold": "1"}
PHASE_COLOURS = {
    SequencePhase.PREFILL: "prompt",
    SequencePhase.DECODE: "token",
    SequencePhase.PREEMPTED: "preempted",
}
_COLOUR_CODE = re.compile(r"\x1b\[\d+m")
# Of the KV map.
MARK_COLOURS = {"#": "token", "+": "cached", "o": "prompt", ".": "soft"}
TO_SCREEN = "\x1b[?1049h\x1b[?25l"
FROM_SCREEN = "\x1b[?25h\x1b[?1049l"


def add_arguments(parser: Parser) -> None:
    parser.describe("--target ADDRESS [OPTIONS]", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("How often")
    seconds = number(0.05, 60, "0.05 to 60")
    group.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="Between snapshots, 0.05 to 60. Default: 1."
    )
    add_options(parser, ("client",))


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError or CommandError."""
    target, options = needed_server(arguments)
    with remote_client(options, Client) as client:
        title = f"{served_by(client, target).name} at {target}"
        try:
            _show(client, arguments.interval, title)
        except Cancelled:
            return 0
        except NanoserveError as error:
            raise CommandError(f"the server at {target}: {error}") from None
    return 0


def _show(client: Client, interval_s: float, title: str) -> None:
    with client.watch_engine(interval=interval_s) as watch:
        if not is_screen(sys.stdout):
            for snapshot in watch:
                write(figures(snapshot) + "\n")
            return
        is_coloured = has_colour(sys.stdout)
        with _screen(watch):
            for snapshot in watch:
                size = shutil.get_terminal_size()
                lines = screen(snapshot, title, size.columns, size.lines, is_coloured=is_coloured)
                # Over what is there, so that nothing flickers.
                write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines[:-1]) + f"{lines[-1]}\x1b[K\x1b[J")


@contextlib.contextmanager
def _screen(watch: EngineWatch) -> Iterator[None]:
    """The terminal's second screen, which leaves the first as it was. q ends the watch, and so do signals."""
    settings = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    with on_signals(watch.cancel, signal.SIGINT, signal.SIGTERM):
        try:
            if settings is not None:
                tty.setcbreak(sys.stdin)
                threading.Thread(target=_end_on_q, args=[watch], daemon=True).start()
            write(TO_SCREEN)
            yield
        finally:
            write(FROM_SCREEN)
            if settings is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


def _end_on_q(watch: EngineWatch) -> None:
    while (key := sys.stdin.read(1)) and key not in "qQ":
        pass
    watch.cancel()


# ------------------------------------------------------------------------------------------- what is shown; pure


def figures(snapshot: EngineSnapshot) -> str:
    """One line."""
    stats = snapshot.stats
    times = [step.duration_s for step in snapshot.steps]
    step = f"{sum(times) / len(times) * 1000:.1f} ms" if times else "-"
    return (
        f"running {stats.running}  waiting {stats.waiting}  tokens/s {stats.tokens_per_second:.1f}  "
        f"KV {stats.kv_blocks_used} owned + {stats.kv_blocks_cached} cached of {stats.kv_blocks_total}  "
        f"prefix hits {stats.prefix_hit_ratio:.0%}  guesses right {stats.draft_acceptance_ratio:.0%}  step {step}  "
        f"preemptions {stats.preemptions}"
    )


def screen(snapshot: EngineSnapshot, title: str, width: int, height: int, *, is_coloured: bool) -> list[str]:
    """At most `height` lines of `width` characters, and colours."""
    uptime_s = int(snapshot.stats.uptime_s)
    up = f"up {uptime_s // 3600}:{uptime_s // 60 % 60:02}:{uptime_s % 60:02}"
    head = f"nanoserve: {title}"[: max(0, width - len(up) - 2)]
    lines = [_paint("bold", head) + up.rjust(width - len(head))[:width], figures(snapshot)[:width], ""]
    lines += kv_map(snapshot, width)
    lines += [_queue(snapshot)[:width], *(line[:width] for line in _adapters(snapshot)), ""]
    live = [each for each in snapshot.sequences if each.phase is not SequencePhase.ENDED]
    lines.append(_paint("bold", _HEADING[:width]))
    room = max(0, height - len(lines) - 1)
    lines += [_line(sequence, width) for sequence in live[:room]]
    if len(live) > room:
        lines.append(f"... and {len(live) - room} more"[:width])
    return lines[:height] if is_coloured else [_COLOUR_CODE.sub("", line) for line in lines[:height]]


def _paint(colour: str, text: str) -> str:
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if text else text


def kv_map(snapshot: EngineSnapshot, width: int) -> list[str]:
    """Who owns the KV blocks: a character for one block, or for several that lie together."""
    total = snapshot.stats.kv_blocks_total
    owners = Counter(block_id for sequence in snapshot.sequences for block_id in sequence.block_ids)
    cached = set(snapshot.cached_block_ids)
    num_shared = sum(count > 1 for count in owners.values())
    per_cell = max(1, -(-total // (width * MAP_ROWS)))
    cells = [_cell(range(i, min(total, i + per_cell)), owners, cached) for i in range(0, total, per_cell)]
    each = "each a block" if per_cell == 1 else f"each {per_cell} blocks"
    legend = f"KV blocks, {each}: # owned, + shared by sequences ({num_shared}), o cached, . free"
    rows = [itertools.groupby(cells[i : i + width]) for i in range(0, len(cells), width)]
    painted = ["".join(_paint(MARK_COLOURS[mark], "".join(run)) for mark, run in row) for row in rows]
    return [legend[:width], *painted, ""]


def _cell(block_ids: range, owners: Counter[int], cached: set[int]) -> str:
    if any(owners[block_id] > 1 for block_id in block_ids):
        return "+"
    if any(owners[block_id] for block_id in block_ids):
        return "#"
    return "o" if any(block_id in cached for block_id in block_ids) else "."


def _queue(snapshot: EngineSnapshot) -> str:
    if not snapshot.stats.waiting:
        return "Queue: nobody waits"
    wait = snapshot.steps[-1].wait if snapshot.steps else None
    return f"Queue: {snapshot.stats.waiting} wait" + (f", the first for {wait.text}" if wait else "")


def _adapters(snapshot: EngineSnapshot) -> Iterator[str]:
    """How many sequences there are of each adapter, the most first; nothing if there are none."""
    live = [each for each in snapshot.sequences if each.phase is not SequencePhase.ENDED]
    counts = Counter(each.adapter or "no adapter" for each in live)
    if counts.keys() - {"no adapter"}:
        yield "Adapters: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())


# GUESSES: of the tokens that were guessed, those that were right.
_HEADING = (
    f"{'REQUEST':{LABEL_WIDTH}}  {'PHASE':9}  {'PROGRESS':{BAR_WIDTH}}  PROMPT  CACHED  TOKENS  BLOCKS      AGE  "
    f"{'GUESSES':>9}  ADAPTER"
)


def _line(sequence: SequenceSnapshot, width: int) -> str:
    label = f"{sequence.request_id}#{sequence.index}" if sequence.index else sequence.request_id
    if len(label) > LABEL_WIDTH:
        label = f"{label[: LABEL_WIDTH - 3]}..."
    guesses = f"{sequence.accepted_draft_tokens}/{sequence.draft_tokens}" if sequence.draft_tokens else "-"
    counts = (
        f"{sequence.prompt_tokens:6}  {sequence.cached_tokens:6}  {sequence.completion_tokens:6}  "
        f"{len(sequence.block_ids):6}  {sequence.age_s:6.1f}s  {guesses:>9}  {sequence.adapter or '-'}"
    )
    plain = f"{label:{LABEL_WIDTH}}  {sequence.phase.value:9}  {_bar(sequence)}  {counts}"[:width]
    # The phase alone has a colour, at a place that every width but the smallest has.
    start = LABEL_WIDTH + 2
    colour = PHASE_COLOURS.get(sequence.phase, "soft")
    return plain[:start] + _paint(colour, plain[start : start + 9]) + plain[start + 9 :]


def _bar(sequence: SequenceSnapshot) -> str:
    """How much of the prompt is computed, as =; then how many of the tokens that it may generate are there, as #."""
    if sequence.phase is SequencePhase.DECODE:
        done, most, mark = sequence.completion_tokens, sequence.max_completion_tokens, "#"
    else:
        done, most, mark = sequence.computed_tokens, sequence.prompt_tokens + sequence.completion_tokens, "="
    filled = min(BAR_WIDTH, BAR_WIDTH * done // max(1, most))
    return (mark * filled).ljust(BAR_WIDTH, ".")
