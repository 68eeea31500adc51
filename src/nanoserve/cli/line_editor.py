"""Lines from a person, with editing and a history that outlasts the program; or from a pipe, as they are.

Editing is the standard library's readline: arrows, Ctrl-R, Ctrl-W and the person's own ~/.inputrc.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from nanoserve.cli.terminal import has_colour, write_error

PROMPT = "> "
HISTORY_LINES = 1000


class LineEditor:
    """Reads until the end of the input, which is Ctrl-D on a terminal. Main thread."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = Path.home() / ".nanoserve_history"

    def lines(self) -> Iterator[str]:
        """Each line without its end. Ctrl-C throws away the line that is being written."""
        if not self.is_interactive:
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
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

    def __enter__(self) -> Self:
        if self.is_interactive:
            with contextlib.suppress(ImportError):  # Python may be built without it
                import readline

                # A text of several lines that is pasted is one message.
                readline.parse_and_bind("set enable-bracketed-paste on")
                readline.set_history_length(HISTORY_LINES)
                with contextlib.suppress(OSError):
                    readline.read_history_file(self._history)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_interactive and "readline" in sys.modules:
            import readline

            try:
                # What people write is nobody else's.
                self._history.touch(mode=0o600)
                readline.write_history_file(self._history)
            except OSError as failure:
                write_error(f"cannot keep the history in {self._history}: {failure.strerror}\n")
