"""The model's tokens as llguidance takes them."""

from collections.abc import Callable, Sequence

from llguidance import LLTokenizer, TokenizerWrapper


def tokenizer_of_json(tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """From the JSON of a tokenizer of Hugging Face's `tokenizers` library.

    vocab_size: of the model's logits. What the tokenizer has no token for is never allowed.
    eos_token_ids: at least one.
    """
    return LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def tokenizer_of_tokens(
    tokens: Sequence[bytes],
    special_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    encode: Callable[[str], list[int]],
) -> LLTokenizer:
    """From the bytes of every token, for a tokenizer of another kind, and for a model that has no EOS.

    Where there is no EOS, an output ends with a token more than there are, which no mask of the model's width holds.
    encode: only for forced tokens; any thread.
    """
    if not eos_token_ids:
        eos_token_ids = [len(tokens)]
        tokens, special_token_ids = [*tokens, b"<no eos>"], [*special_token_ids, len(tokens)]
    return LLTokenizer(
        TokenizerWrapper(_Tokens(tokens, special_token_ids, eos_token_ids[0], encode)), eos_token=list(eos_token_ids)
    )


class _Tokens:
    """What TokenizerWrapper asks a tokenizer for. The names are llguidance's."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = list(special_token_ids)
        self.eos_token_id = eos_token_id
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
