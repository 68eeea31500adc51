"""Writes Lark as the llguidance library reads it."""

import json
import re
from collections.abc import Callable, Iterable

from nanoserve.dialect.formats import OPEN

# Of whitespace that may stand at one place.
MAX_SPACE = 16
SPACE, ANY = "SPACE", "ANY"
# Within a terminal, where it may be missing; and as much as there may be in a text.
SPACES = rf"/[ \n\r\t]{{0,{MAX_SPACE}}}/"
ANY_SPACES = r"/[ \n\r\t]*/"
# What may be a special token.
_MARKER = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")


class Lark:
    """A grammar that is being written."""

    def __init__(self, special_id: Callable[[str], int | None]) -> None:
        self._special_id = special_id
        self._lines: dict[str, str] = {
            SPACE: rf"/[ \n\r\t]{{1,{MAX_SPACE}}}/",
            ANY: "/(?s:.*)/",
        }

    def text(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._lines.items())

    def rule(self, name: str, body: str) -> str:
        """Add a rule, or a terminal if the name is in capitals; one that was added already stays. Returns the name."""
        self._lines.setdefault(name, body)
        return name.partition("[")[0]

    def literal(self, text: str, *, is_exact: bool = False) -> str:
        """A text of the format: its special tokens as such, and unless it is to be exact its whitespace as it likes."""
        parts = []
        for part in _MARKER.split(text):
            if (token_id := self._special_id(part) if part else None) is not None:
                parts.append(f"<[{token_id}]>")
            elif is_exact:
                parts.append(quoted(part) if part else "")
            else:
                parts += [self._loosely(each) for each in re.split(rf"(\s+|{OPEN})", part) if each]
        return " ".join(filter(None, parts))

    def _loosely(self, part: str) -> str:
        if part == OPEN:
            return self.rule("NUMBER", "/[0-9]{1,4}/")
        return f"{SPACE}?" if part.isspace() else quoted(part)

    def is_special(self, text: str) -> bool:
        """It begins with a special token."""
        first = next(filter(None, _MARKER.split(text)), "")
        return self._special_id(first) is not None

    def opening(self, name: str, text: str) -> str:
        """An expression for what else a text of the model's own would begin with, and the whitespace before it.

        The lexer reads as far as any terminal goes. So where a text may stand instead, this has to be one terminal.
        """
        if self.is_special(text):
            return f"{SPACE}? {self.literal(text)}"
        return self.rule(f"{name}[lazy]", self.rule(name.upper(), f"{SPACES} {quoted(text)}"))

    def without(self, texts: Iterable[str], at_start: Iterable[str] = ()) -> str:
        """The body of a terminal for any text that does not contain some texts, nor begin with others. `at_start` has
        expressions of terminals."""
        anywhere, first = " | ".join(map(quoted, sorted({*texts}))), " | ".join(at_start)
        # One negation of all: several would have to be followed at once.
        excluded = [f"{ANY} ({anywhere})"] if anywhere else []
        excluded += [f"{ANY_SPACES} ({first})"] if first else []
        return f"{ANY} & ~(({' | '.join(excluded)}) {ANY})" if excluded else ANY

    def up_to(self, name: str, marker: str, body: str) -> str:
        """An expression for a text of a kind and the marker that ends it.

        body: of a terminal that does not contain the marker.
        """
        if self.is_special(marker):
            return f"{self.rule(name.upper(), body)} {self.literal(marker, is_exact=True)}"
        terminal = self.rule(f"{name.upper()}_END", f"({body}) {quoted(marker)}")
        return self.rule(f"{name}[lazy]", terminal)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
