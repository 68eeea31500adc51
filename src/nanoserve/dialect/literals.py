"""Values as models write them, JSON or Python, made into JSON while they are read.

    {'a': (True, None), "b": "x\\d",}   ──▶   {"a": [true, null], "b": "x\\\\d"}

What is JSON already passes as it is, whitespace too, in the pieces in which it came.
"""

import json
import re
from collections.abc import Callable

from nanoserve.dialect.source import Over, Source, Steps, Unread

# Objects and arrays within each other.
MAX_NESTING = 200
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
# Characters of a string that JSON writes as they are.
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"[^'\"\\\x00-\x1f]+")}
_ATOM = re.compile(r"[^\s,:;()\[\]{}\"'<]+")
_NAMES = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"[+-]?[0-9_]*\.?[0-9_]*(?:[eE][+-]?[0-9]+)?")
# Of Python, those that JSON does not have.
_ESCAPES = {"'": "'", "\n": "", "a": "\\u0007", "v": "\\u000b", "0": "\\u0000"}
_NUM_HEX = {"x": 2, "u": 4, "U": 8}

Write = Callable[[str], None]


def in_string(text: str) -> str:
    """A text as it stands within a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def scalar(atom: str) -> str | None:
    """A number, a truth value or nothing, as JSON. None if it is none of these."""
    if atom in _NAMES:
        return _NAMES[atom]
    if _NUMBER.fullmatch(atom):
        return atom
    if not _PYTHON_NUMBER.fullmatch(atom):
        return None
    try:
        number = float(atom) if {*".eE"} & {*atom} else int(atom)
    except ValueError:
        return None
    return json.dumps(number) if number not in (float("inf"), float("-inf")) else None


def value(source: Source, write: Write) -> Steps[None]:
    """Read a value. Raises Unread where it is neither JSON nor Python; what was written before stays."""
    closers: list[str] = []
    # Written when something follows: Python allows a comma behind the last.
    comma = ""
    while True:
        space = yield from source.space()
        char = yield from source.peek()
        is_end = bool(closers) and char == closers[-1]
        write(space if is_end else comma + space)
        if not is_end:
            if closers and closers[-1] == "}":
                yield from _key(source, write)
                char = yield from source.peek()
            if char in _CLOSERS:
                yield from source.take()
                closers.append(_CLOSERS[char])
                if len(closers) > MAX_NESTING:
                    raise Unread
                write("{" if char == "{" else "[")
                comma = ""
                continue
            yield from _scalar(source, write)
        comma = yield from _after_value(source, write, closers)
        if not closers:
            return


def _after_value(source: Source, write: Write, closers: list[str]) -> Steps[str]:
    """Read what is closed here, and the comma behind it, which is returned."""
    while closers:
        space = yield from source.space()
        char = yield from source.take()
        if char == ",":
            return space + char
        if char != closers.pop():
            raise Unread
        write(space + ("}" if char == "}" else "]"))
    return ""


def _key(source: Source, write: Write) -> Steps[None]:
    yield from string(source, write)
    write((yield from source.space()))
    if (yield from source.take()) != ":":
        raise Unread
    write(":" + (yield from source.space()))


def _scalar(source: Source, write: Write) -> Steps[None]:
    if (yield from source.peek()) in _PLAIN:
        yield from string(source, write)
        return
    atom = yield from source.whole_run(_ATOM)
    # It might go on.
    if not (yield from source.more()):
        raise Over
    if (text := scalar(atom)) is None:
        raise Unread
    write(text)


def string(source: Source, write: Write) -> Steps[None]:
    """Read a string in quotes of either kind. Raises Unread."""
    quote = yield from source.take()
    if quote not in _PLAIN:
        raise Unread
    write('"')
    while True:
        if plain := source.run(_PLAIN[quote]):
            write(plain)
        char = yield from source.peek()
        if _PLAIN[quote].match(char):
            continue
        yield from source.take()
        if char == quote:
            write('"')
            return
        write((yield from _escape(source)) if char == "\\" else in_string(char))


def _escape(source: Source) -> Steps[str]:
    """What follows a backslash, as JSON writes it."""
    char = yield from source.take()
    if char in '"\\/bfnrt':
        return "\\" + char
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char not in _NUM_HEX:
        # For Python, and for whoever forgot that JSON would have it doubled, this is a backslash.
        return "\\\\" + in_string(char)
    digits = ""
    for _ in range(_NUM_HEX[char]):
        digits += yield from source.take()
    try:
        code = int(digits, 16)
        return f"\\u{code:04x}" if code < 0x10000 else in_string(chr(code))
    except ValueError:
        raise Unread from None
