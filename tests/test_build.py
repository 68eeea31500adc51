"""What the composition root decides itself."""

from types import SimpleNamespace

import pytest

from nanoserve import build


@pytest.mark.parametrize(
    ("of_checkpoint", "of_tokenizer", "want"),
    [
        # A fine-tune of a base model whose config still names the base model's.
        ({0}, 2, (0, 2)),
        ({2, 5}, 2, (2, 5)),
        ({2}, None, (2,)),
        (set(), None, ()),
        # The tokenizer may know more tokens than the model.
        ({2}, 100, (2,)),
    ],
)
def test_a_completion_ends_with_the_checkpoints_eos_and_the_tokenizers(of_checkpoint, of_tokenizer, want):
    model = SimpleNamespace(eos_token_ids=frozenset(of_checkpoint), vocab_size=100)
    assert build._eos_token_ids(model, SimpleNamespace(eos_token_id=of_tokenizer)) == want
