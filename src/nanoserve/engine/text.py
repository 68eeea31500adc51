"""Text to tokens and back: the tokenizer, and the text of a sequence as it grows.

    str or Chat ── TextCodec.encode_prompt ──▶ token ids          conversations: chat_template.py
    token ids ──▶ detokenizer ──▶ certain text ──▶ stop strings ──▶ text that may be shown
                 └──────────────────── one TextStream a sequence ────────────────────┘

`TextCodec` is shared by all threads. A `TextStream` lives on the event loop, with the sequence it belongs to. The
joined text of a stream is what `TextCodec.decode` makes of its tokens, less what a stop string trims; where the
sequence goes on from a text, it is what those tokens add to that text.
"""

import pickle
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanoserve.config import ConfigError
from nanoserve.constraint.vocabulary import Vocabulary
from nanoserve.engine.chat_template import Chat, ChatTemplate, has_marks, without_marks
from nanoserve.engine.detokenizer import Chain, Step, Window, compile_decoder
from nanoserve.engine.plain_encoder import PlainEncoder
from nanoserve.request import FinishReason, SamplingParams

# Of which a folder with a tokenizer has at least one.
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


class TextCodec:
    """The model's tokenizer and chat template.

    Any thread. After construction the tokenizer is only read. What transformers wraps around the `tokenizers` library
    changes settings in each call, which another thread would feel; so the library itself is called. A tokenizer of
    another kind encodes under a lock; its decode only reads, and the event loop must not wait for a long prompt there.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers, owned by the codec from now on."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        # None = how this tokenizer decodes is not known, or not a chain of steps.
        self._make_steps: Callable[[], list[Step]] | None = None
        if self._backend is None:
            self.special_token_ids = frozenset(tokenizer.all_special_ids)
        else:
            # A checkpoint may bring settings of its training.
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder()
            self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
            self._make_steps = compile_decoder(self._backend.decoder)
        # Tokens seen so far; the texts of a vocabulary are small, and threads can only write the same twice.
        self._tokens: dict[int, str] = {}
        self._bytes_steps = self._make_steps() if self._make_steps is not None else []
        self._special_ids = {self.token(token_id): token_id for token_id in self.special_token_ids}
        self._template = ChatTemplate(tokenizer, map(self.token, self.special_token_ids))
        self._plain_encoder = PlainEncoder(tokenizer, self.special_token_ids, self._template.in_halves, self._lock)

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> "TextCodec":
        """Read the tokenizer of a checkpoint. Raises ConfigError."""
        from transformers import AutoTokenizer  # slow to import, and not needed to use a codec

        missing = f"{folder} has no tokenizer: its tokenizer.json or tokenizer.model is missing"
        if not any(path for names in TOKENIZER_FILES for path in folder.glob(names)):
            # transformers would ask for a package to convert what is not there.
            raise ConfigError(missing)
        try:
            codec = cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
            # Of files that say nothing transformers makes a tokenizer without tokens.
            if codec.vocab_size > len(codec.special_token_ids):
                return codec
        except Exception as error:  # transformers lets through whatever a broken file provokes
            raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
        raise ConfigError(missing)

    def __reduce__(self) -> tuple[Callable[[bytes], "TextCodec"], tuple[bytes]]:
        """Travels to another process as its tokenizer. Other than `load`, that one need not import torch."""
        return _unpickle_codec, (pickle.dumps(self._tokenizer),)

    @property
    def eos_token_id(self) -> int | None:
        """What the tokenizer's configuration calls EOS. None = nothing."""
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id

    @property
    def chat_template(self) -> str:
        """All templates of the tokenizer, one after the other; empty if there is none."""
        found = getattr(self._tokenizer, "chat_template", None) or ""
        return found if isinstance(found, str) else "\n".join(map(str, found.values()))

    def special_token_id(self, token: str) -> int | None:
        """Of a special token, by its text; None if there is none."""
        return self._special_ids.get(token)

    def special_tokens_in(self, texts: Sequence[str]) -> frozenset[int]:
        """Ids of those special tokens that stand in one of the texts."""
        found = (i for token, i in self._special_ids.items() if token and any(token in text for text in texts))
        return frozenset(found)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones too. The model may have more, for which there is no text."""
        return len(self._tokenizer)

    def first_difference(self, other: "TextCodec") -> tuple[str, int | None, int | None] | None:
        """A token that the two do not have in common, with its id in each. None = they have the same vocabulary."""
        ours, theirs = self._tokenizer.get_vocab(), other._tokenizer.get_vocab()
        token = next((token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)), None)
        return None if token is None else (token, ours.get(token), theirs.get(token))

    def vocabulary(self, size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
        """The tokens as grammars are matched with them; takes up to a second. size: of the model's logits."""
        special = (token_id for token_id in sorted(self.special_token_ids) if token_id < size)
        return Vocabulary(tuple(map(self.token_bytes, range(size))), tuple(special), tuple(eos_token_ids))

    # ------------------------------------------------------------------------------------------------ encode

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Call it on a worker thread if the text may be long: 1 MB takes about a second."""
        if self._backend is None:
            with self._lock:
                return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # Other than `encode`, the batch call runs without the interpreter lock, so that the event loop goes on.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing that spells a special token is one."""
        return self._plain_encoder.encode([text], [])

    def encode_prompt(self, prompt: str | Chat, *, add_special_tokens: bool | None = None) -> tuple[list[int], str]:
        """Token ids of a prompt, and the text that they were made of.

        add_special_tokens: as the tokenizer's configuration says; None = to a text, and not to a chat, whose template
        writes them itself. Raises InvalidRequest if the template refuses the chat.
        """
        if isinstance(prompt, str):
            return self.encode(prompt, add_special_tokens=add_special_tokens is not False), prompt
        text = self._template.render(prompt)
        if not has_marks(text):
            return self.encode(text, add_special_tokens=bool(add_special_tokens)), text
        token_ids = self._plain_encoder.encode(*self._template.pieces(text))
        return self._with_special_tokens(token_ids) if add_special_tokens else token_ids, without_marks(text)

    def _with_special_tokens(self, token_ids: list[int]) -> list[int]:
        """Those that the tokenizer puts around any text."""
        bare, around = self.encode("a", add_special_tokens=False), self.encode("a")
        # Behind those before it, if it cannot spell even this.
        begin = next(i for i in range(len(around)) if around[i : i + len(bare)] == bare) if bare else len(around)
        return around[:begin] + token_ids + around[begin + len(bare) :]

    # ------------------------------------------------------------------------------------------------ decode

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids that no token has are passed over."""
        if self._backend is None:
            known = [token_id for token_id in token_ids if token_id < self.vocab_size]
            return str(self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens))
        # As in encode: the batch call runs without the interpreter lock.
        (text,) = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        if "\ufffd" in text and self._make_steps is not None:
            # Of bytes that are no UTF-8 the library may make another number of these than a stream.
            stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
            return "".join([*map(stream.feed, token_ids), stream.finish()])
        return str(text)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that no token has."""
        token = self._tokens.get(token_id)
        if token is None:
            if self._backend is None:
                is_known = token_id < self.vocab_size
                token = self._tokenizer.convert_ids_to_tokens(token_id) if is_known else None
            else:
                token = self._backend.id_to_token(token_id)
            token = self._tokens[token_id] = token or ""
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that goes on, as bytes: a part of a character where it is only that."""
        piece: str | bytes = self.token(token_id)
        for step in self._bytes_steps:
            if isinstance(piece, str) and piece:
                piece = step.inside(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    def detokenizer(self, *, skip_special_tokens: bool, context: Sequence[int] = ()) -> Chain | Window:
        """A fresh one, for one sequence. context: tokens whose text it goes on from."""
        if self._make_steps is None:
            return Window(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), context)
        skipped = self.special_token_ids if skip_special_tokens else frozenset()

        def spell(token_id: int) -> str:
            return "" if token_id in skipped else self.token(token_id)

        # Behind a prompt that shows nothing, such as BOS alone, a text begins.
        goes_on = any(map(spell, reversed(context)))
        return Chain(self._make_steps(), spell, goes_on=goes_on)


def _unpickle_codec(tokenizer: bytes) -> TextCodec:
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()  # where the code is that a checkpoint brought
    return TextCodec(pickle.loads(tokenizer))


# ---------------------------------------------------------------------------------------------- output stream


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What some tokens added to a sequence's text."""

    text: str
    # Of the tokens pushed, how many belong to the sequence: fewer than all if a stop string was complete before.
    num_tokens: int
    # The stop string that ended the sequence.
    stop_string: str | None = None
    # The text with those special tokens that are left out of it and are marks.
    marked: str = field(default="", compare=False)


class TextStream:
    """The text of one sequence, as its tokens come. Event loop only.

        |── emitted ──|── pending: the start of a stop string? ──|── in the detokenizer: half a character ──|

    Special tokens that are left out of the text count for stop strings all the same.

    The first place in the text at which a stop string is complete ends it; where several are complete at the same
    place, the longest. This depends on the text alone, not on how tokens or pushes cut it, and never waits to see
    whether another stop string gets longer.
    """

    def __init__(
        self,
        codec: TextCodec,
        params: SamplingParams,
        context: Sequence[int] = (),
        *,
        marks: frozenset[int] = frozenset(),
    ) -> None:
        """context: tokens of the prompt, if the sequence goes on from its text. marks: special tokens that `marked`
        is to show."""
        self._codec = codec
        self._marks = marks
        self._detokenizer = codec.detokenizer(skip_special_tokens=params.skip_special_tokens, context=context)
        self._params = params
        # Longest first, for where several are complete at the same place.
        self._stops = [_StopSearch(string) for string in sorted(params.stop, key=len, reverse=True)]
        self._pending = ""
        # Places in it that are not shown.
        self._hidden: set[int] = set()
        # Of these, those of tokens that are no marks.
        self._unmarked: set[int] = set()
        self._num_tokens = 0

    def push(self, token_ids: list[int], finish_reason: FinishReason | None = None) -> TextPiece:
        """Take the next tokens. `finish_reason` says that they are the last, and what the last one is.

        The text of an EOS token is left out unless special tokens are kept, that of a stop token unless
        `include_stop`. Nothing may be pushed after the end, be it a finish reason's or a stop string's.
        """
        hides_last = (finish_reason is FinishReason.EOS and self._params.skip_special_tokens) or (
            finish_reason is FinishReason.STOP and not self._params.include_stop
        )
        num_shown = len(token_ids) - 1 if hides_last else len(token_ids)
        for i in range(num_shown):
            self._num_tokens += 1
            stop_string = self._append(self._detokenizer.feed(token_ids[i]))
            is_hidden = bool(self._stops) or token_ids[i] in self._marks
            if stop_string is None and is_hidden and self._params.skip_special_tokens:
                stop_string = self._append_hidden(token_ids[i])
            if stop_string is not None:
                return self._stopped(stop_string, i + 1)
        if finish_reason is None:
            return self._piece(len(token_ids), hold=True)
        self._num_tokens += len(token_ids) - num_shown
        stop_string = self._append(self._detokenizer.finish())
        if stop_string is not None:
            return self._stopped(stop_string, len(token_ids))
        return self._piece(len(token_ids))

    def _append(self, text: str) -> str | None:
        """Add text to what is pending, up to the end of the first stop string, which is returned."""
        if self._stops:
            for i, char in enumerate(text):
                complete = [stop.string for stop in self._stops if stop.feed(char)]
                if complete and self._num_tokens >= self._params.min_tokens:
                    self._pending += text[: i + 1]
                    return complete[0]
        self._pending += text
        return None

    def _append_hidden(self, token_id: int) -> str | None:
        """The same for the text of a special token that is not shown; for that of any other, nothing."""
        if token_id not in self._codec.special_token_ids:
            return None
        start = len(self._pending)
        stop_string = self._append(self._codec.token(token_id))
        places = range(start, len(self._pending))
        self._hidden.update(places)
        if token_id not in self._marks:
            self._unmarked.update(places)
        return stop_string

    def _piece(
        self, num_tokens: int, stop_string: str | None = None, *, hold: bool = False, more: str = ""
    ) -> TextPiece:
        """Of the pending text and `more`; with `hold`, without the end that may become a stop string."""
        num_held = max((stop.progress for stop in self._stops), default=0) if hold else 0
        end = len(self._pending) - num_held
        ready, self._pending = self._pending[:end], self._pending[end:]
        text = marked = ready
        if self._hidden:
            text = "".join(char for i, char in enumerate(ready) if i not in self._hidden)
            marked = "".join(char for i, char in enumerate(ready) if i not in self._unmarked)
            self._hidden = {i - end for i in self._hidden if i >= end}
            self._unmarked = {i - end for i in self._unmarked if i >= end}
        return TextPiece(text + more, num_tokens, stop_string, marked + more)

    def _stopped(self, stop_string: str, num_tokens: int) -> TextPiece:
        self._pending = self._pending[: -len(stop_string)]
        return self._piece(num_tokens, stop_string, more=stop_string if self._params.include_stop else "")


class _StopSearch:
    """Looks for one stop string in text that comes by the character (Knuth, Morris and Pratt 1977).

    A bounded number of steps a character, whatever the text nearly matches.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self._borders = _borders(string)
        # How much of the string's start the text ends with; never all of it.
        self.progress = 0

    def feed(self, char: str) -> bool:
        """Whether the text, with this character, ends with the string."""
        progress = _advance(self.string, self._borders, self.progress, char)
        is_complete = progress == len(self.string)
        self.progress = self._borders[-1] if is_complete else progress
        return is_complete


def _advance(string: str, borders: Sequence[int], progress: int, char: str) -> int:
    """The longest start of the string that `char` extends, given the longest before it."""
    while progress and string[progress] != char:
        progress = borders[progress - 1]
    return progress + (string[progress] == char)


@lru_cache(maxsize=256)
def _borders(string: str) -> Sequence[int]:
    """For each start of the string, the length of its longest other start that it also ends with.

    Cached, since the sequences of a request have the same stop strings.
    """
    borders = array("I", [0])
    for char in string[1:]:
        borders.append(_advance(string, borders, borders[-1], char))
    return borders
