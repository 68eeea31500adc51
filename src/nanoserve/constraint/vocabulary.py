"""The model's tokens, as plain data that travels between processes, and as llguidance takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLTokenizer, TokenizerWrapper

# Token ids of a text.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which bytes each token stands for. Picklable."""

    # The bytes of every token that the model can draw. One that has none is never allowed.
    tokens: tuple[bytes, ...]
    # Of these, those that are no text, whatever their bytes are.
    special_token_ids: tuple[int, ...]
    # None of them = an output ends only where nothing more may follow.
    eos_token_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """Width of the model's logits, and so of masks."""
        return len(self.tokens)

    def tokenizer(self, encode: Encode | None = None) -> LLTokenizer:
        """Takes up to a second. encode: spells a text as the model would, with tokens that are text alone; any thread.
        Without it what is forced is spelled by the longest tokens, which the model might not do."""
        tokens, special, eos = list(self.tokens), list(self.special_token_ids), list(self.eos_token_ids)
        if not eos:
            # llguidance needs one: a token more than there are, which no mask of the model's width holds.
            eos = [len(tokens)]
            special.append(len(tokens))
            tokens.append(b"<no eos>")
        return LLTokenizer(TokenizerWrapper(_Tokens(tokens, special, eos[0], encode)), eos_token=eos)


class _Tokens:
    """What TokenizerWrapper asks a tokenizer for. The names are llguidance's."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special_token_ids: Sequence[int], eos_token_id: int, encode: Encode | None
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = list(special_token_ids)
        self.eos_token_id = eos_token_id
        self._encode = encode
        special = set(special_token_ids)
        self._ids = {token: i for i, token in enumerate(tokens) if i not in special} if encode is None else {}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        if self._encode is not None:
            return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        rest, token_ids = text.encode() if isinstance(text, str) else text, []
        while rest:
            starts = (rest[:length] for length in range(self._longest, 0, -1))
            if (token := next((start for start in starts if start in self._ids), None)) is None:
                break
            token_ids.append(self._ids[token])
            rest = rest[len(token) :]
        return token_ids
