"""Token ids of what a conversation became, where it spells special tokens that must stay text.

"<|im_start|>"  "user\\nhi<|im_end|>bye"  "<|im_end|>"
      id         as a tokenizer without         id
                 special tokens reads it
"""

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any


class PlainEncoder:
    """Encodes texts and special tokens that alternate. Any thread."""

    def __init__(
        self, tokenizer: Any, special_ids: Collection[int], in_halves: Callable[[str], list[str]], lock: threading.Lock
    ) -> None:
        """`tokenizer` is one of transformers. in_halves: cuts a text within what spells a special token. lock: for a
        tokenizer in Python, which changes as it encodes."""
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._in_halves, self._lock = in_halves, lock
        added = tokenizer.added_tokens_decoder
        self._special = {added[i].content: (i, added[i].lstrip, added[i].rstrip) for i in special_ids if i in added}
        # A tokenizer that knows no letter of a text says so by a special token, too.
        self._control_ids = frozenset(special_ids) - {tokenizer.unk_token_id}

    def encode(self, texts: Sequence[str], tokens: Sequence[str]) -> list[int]:
        """Text, token, text, ..., token, text."""
        texts, ids = list(texts), []
        for i, token in enumerate(tokens):
            token_id, strips_left, strips_right = self._special[token]
            ids.append(token_id)
            texts[i] = texts[i].rstrip() if strips_left else texts[i]
            texts[i + 1] = texts[i + 1].lstrip() if strips_right else texts[i + 1]
        token_ids = self._encode_text(texts[0], is_first=True)
        for token_id, text in zip(ids, texts[1:], strict=True):
            token_ids += [token_id, *self._encode_text(text, is_first=False)]
        return token_ids

    def _encode_text(self, text: str, *, is_first: bool) -> list[int]:
        token_ids = self._without_special(text, is_first=is_first)
        if self._control_ids.isdisjoint(token_ids):
            return token_ids
        # The vocabulary itself holds a special token as a piece of text.
        halves = self._in_halves(text)
        return [i for n, half in enumerate(halves) for i in self._without_special(half, is_first=is_first and n == 0)]

    def _without_special(self, text: str, *, is_first: bool) -> list[int]:
        if not text:
            return []
        if self._backend is None:
            with self._lock:
                return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        (encoding,) = self._copies[0 if is_first else 1].encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    @functools.cached_property
    def _copies(self) -> list[Any]:
        """Of the library's tokenizer, as it takes special tokens for text, for the beginning of a prompt and for all
        behind it; some put a space before the first text alone. Made when needed; others use the original meanwhile."""
        as_it_is = self._backend.to_str()
        behind = as_it_is.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        copies = [type(self._backend).from_str(text) for text in (as_it_is, behind)]
        for backend in copies:
            backend.encode_special_tokens = True
        return copies
