"""What the composition root decides itself."""

from types import SimpleNamespace

import pytest

from nanoserve import build
from nanoserve.config import BUILTIN_MODEL, CacheOptions, ModelOptions, Options, SchedulerConfig
from nanoserve.request import DraftSource


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


def test_the_served_model_says_how_it_guesses():
    options = Options(
        ModelOptions(device="cpu", compile=False, draft_model=str(BUILTIN_MODEL)),
        CacheOptions(kv_memory_bytes=8 << 20),
        SchedulerConfig(speculate="draft:5"),
    )
    served = build.build_core(options).model
    assert served.draft_sources == (DraftSource.DRAFT_MODEL,)
    assert (served.max_draft_tokens, served.draft_model) == (5, BUILTIN_MODEL.name)
