"""Lines from a person, with editing and a history that outlasts the program; or from a pipe, as they are.

Editing is the standard library's readline: arrows, Ctrl-R, Ctrl-W and the person's own ~/.inputrc.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from nanoserve.cli.terminal import has_colour, write_error

PROMPT = "> "
HISTORY_LINES = 1000


@contextlib.contextmanager
def lines(*, is_interactive: bool) -> Iterator[Iterator[str]]:
    """Each line without its end, until the end of the input, which is Ctrl-D on a terminal. Main thread."""
    if not is_interactive:
        yield (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline
    except ImportError:  # Python may be built without it
        yield _typed_lines()
        return
    history = Path.home() / ".nanoserve_history"
    # A text of several lines that is pasted is one message.
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield _typed_lines()
    finally:
        try:
            # What people write is nobody else's.
            history.touch(mode=0o600)
            readline.write_history_file(history)
        except OSError as failure:
            write_error(f"cannot keep the history in {history}: {failure.strerror}\n")


def _typed_lines() -> Iterator[str]:
    """Ctrl-C throws away the line that is being written."""
    # Between \1 and \2 stands what takes no room on the screen.
    prompt = f"\1\x1b[1m\2{PROMPT}\1\x1b[0m\2" if has_colour(sys.stdout) else PROMPT
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            write_error("\n")
        except EOFError:
            write_error("\n")
            return
