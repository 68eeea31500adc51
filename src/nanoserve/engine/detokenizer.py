"""Detokenization of tokens that come one by one.

A decoder of the `tokenizers` library is a chain of steps, each of which maps the list of all tokens to a list of
texts. Here are the same steps as streams: each takes the next pieces, gives what no later token can change, and holds
the rest. So the joined output equals the library's for any tokens, at a constant cost a token; but for runs of byte
tokens that are no UTF-8, see `_ByteFallback`.

The library decodes whole texts, and some of its steps treat a text's start in a way of its own. A completion has no
start: it goes on from its prompt. `go_on` tells a step so.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any


class Step:
    """One step of a decoder, for one sequence. As it stands, it changes nothing and holds nothing back."""

    def feed(self, pieces: list[str]) -> list[str]:
        """The next pieces, as far as they are certain."""
        return pieces

    def finish(self) -> list[str]:
        """What was held back."""
        return []

    def go_on(self) -> None:
        """Before the first piece: it is not the start of a text."""

    def inside(self, piece: str) -> str | bytes:
        """What becomes of a piece that is neither the first nor the last; bytes if it may be a part of a character."""
        return piece


class Chain:
    """Tokens of one sequence to text, by known steps."""

    def __init__(self, steps: list[Step], token: Callable[[int], str], *, goes_on: bool = False) -> None:
        """`token` spells a token; an empty one is passed over. goes_on: the first token is not the start of a text."""
        self._steps = steps
        self._token = token
        if goes_on:
            for step in steps:
                step.go_on()

    def feed(self, token_id: int) -> str:
        """The next token. Returns text that no later token changes."""
        token = self._token(token_id)
        if not token:
            return ""
        pieces = [token]
        for step in self._steps:
            pieces = step.feed(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """There are no more tokens. Returns what was held back."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = step.feed(pieces) + step.finish()
        return "".join(pieces)


class Window:
    """The same as Chain for tokenizers whose inside is not known: it decodes the last few tokens again and again.

        tokens  ───────|── context ──|── new ──|
                    _start         _seen

    The text of `new` is what it adds to that of `context`. Exact where a token's text depends on the few tokens before
    it alone. Text that ends with U+FFFD waits for the rest of its character, up to MAX_WAIT tokens.
    """

    MAX_WAIT = 8

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """context: the tokens before; of a long text the last few will do."""
        self._decode = decode
        self._token_ids = list(context[-self.MAX_WAIT :])
        self._seen = len(self._token_ids)

    def feed(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        num_new = len(self._token_ids) - self._seen
        text = self._new_text()
        if (not text or text.endswith("\ufffd")) and num_new < self.MAX_WAIT:
            return ""
        self._token_ids = self._token_ids[self._seen :]
        self._seen = num_new
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        context = self._decode(self._token_ids[: self._seen])
        return self._decode(self._token_ids)[len(context) :]


# ---------------------------------------------------------------------------------------------------- the steps


class _Each(Step):
    """Changes each piece alone; the first one may differ (Replace, Metaspace, or no decoder at all)."""

    def __init__(self, change: Callable[[str], str], first: Callable[[str], str] | None = None) -> None:
        self._change = change
        self._next = change if first is None else first

    def feed(self, pieces: list[str]) -> list[str]:
        if not pieces:
            return pieces
        changed = [self._next(pieces[0]), *map(self._change, pieces[1:])]
        self._next = self._change
        return changed

    def go_on(self) -> None:
        self._next = self._change

    def inside(self, piece: str) -> str:
        return self._change(piece)


class _Bytes(Step):
    """Makes text of bytes. A character whose bytes are not all there is held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _ByteLevel(_Bytes):
    """Spells bytes with letters."""

    BYTES = _byte_of_char()

    def feed(self, pieces: list[str]) -> list[str]:
        return [self._decoder.decode(self.inside(piece)) for piece in pieces]

    def inside(self, piece: str) -> bytes:
        try:
            return bytes([self.BYTES[char] for char in piece])
        except KeyError:
            # An added token, in plain letters.
            return piece.encode()


class _ByteFallback(_Bytes):
    """Tokens such as <0xE2> are bytes, of which each complete character is text at once.

    The library takes a run of them as one: if any of it is no UTF-8, it gives one U+FFFD for each byte, those of
    complete characters too. Then nothing of a run would be certain before its end, and an answer that is cut within a
    character would lose those before.
    """

    BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")

    def feed(self, pieces: list[str]) -> list[str]:
        ready: list[str] = []
        for piece in pieces:
            if byte := self.BYTE.fullmatch(piece):
                ready.append(self._decoder.decode(bytes([int(byte[1], 16)])))
            else:
                ready += [*self.finish(), piece]
        return [piece for piece in ready if piece]

    def inside(self, piece: str) -> str | bytes:
        byte = self.BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece


class _StripStart(Step):
    """Removes up to `count` times a character from the start of the text."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._count = count

    def feed(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        if not self._count or not text:
            return [text]
        stripped = _strip_start(text, self._char, self._count)
        # The text has begun with something else, or all of it is gone.
        self._count = 0 if stripped else self._count - len(text)
        return [stripped]

    def go_on(self) -> None:
        self._count = 0


# ------------------------------------------------------------------------------- from the library's decoder


def compile_decoder(decoder: Any) -> Callable[[], list[Step]] | None:
    """A maker of the steps of one of the library's decoders, anew for each sequence.

    `decoder` None is the library's way to join tokens with spaces. Returns None if a step is not known here, such as
    those of BERT's and GPT-1's tokenizers, whose models are not served.
    """
    config = None if decoder is None else json.loads(decoder.__getstate__())
    makers: list[Callable[[], Step]] = []
    # From here on all pieces are one text, so a step must not depend on where one ends.
    is_fused = False
    for part in _parts(config):
        if part == {"type": "Fuse"}:
            is_fused = True
            continue
        maker = _maker(part, is_fused=is_fused)
        if maker is None:
            return None
        makers.append(maker)
        is_fused = is_fused or maker is _ByteLevel
    return lambda: [make() for make in makers]


def _parts(config: Any) -> list[Any]:
    """The steps of a sequence, and of sequences within it."""
    if config is None or config["type"] != "Sequence":
        return [config]
    return [part for child in config["decoders"] for part in _parts(child)]


def _maker(config: Any, *, is_fused: bool) -> Callable[[], Step] | None:
    """Of one step. Of what can stand behind one that makes one text of all pieces, only a few are known."""
    match config:
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if not is_fused or len(old) == 1:
            return lambda: _Each(lambda piece: piece.replace(old, new))
        case {"type": "Strip", "content": char, "start": count, "stop": 0} if is_fused:
            return lambda: _StripStart(char, count)
        case _ if is_fused:
            return None
        case {"type": "Strip", "content": char, "start": count, "stop": 0}:
            return lambda: _Each(lambda piece: _strip_start(piece, char, count))
        case None:
            return lambda: _Each(lambda piece: f" {piece}", first=str)
        case {"type": "ByteLevel"}:
            return _ByteLevel
        case {"type": "ByteFallback"}:
            return _ByteFallback
        case {"type": "Metaspace", "replacement": char, "prepend_scheme": scheme}:
            first = " " if scheme == "never" else ""
            return lambda: _Each(lambda piece: piece.replace(char, " "), lambda piece: piece.replace(char, first))
    return None


def _strip_start(text: str, char: str, count: int) -> str:
    """The text without up to `count` times the character at its start."""
    return text[:count].lstrip(char) + text[count:]
