"""What the composition root decides itself."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, MambaConfig

from nanoserve import build
from nanoserve.config import BUILTIN_MODEL, CacheOptions, ConfigError, ModelOptions, Options, SchedulerConfig
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


def options(speculate="auto", **model):
    return Options(
        ModelOptions(device="cpu", compile=False, **model),
        CacheOptions(kv_memory_bytes=8 << 20),
        scheduler=SchedulerConfig(speculate=speculate),
    )


def test_a_draft_model_of_another_vocabulary_is_refused_by_a_token_that_differs(tmp_path):
    folder = shutil.copytree(BUILTIN_MODEL, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    a, b = vocabulary["a"], vocabulary["b"]
    told = f"('a' is {a} there and {b} in|'b' is {b} there and {a} in) the model that is served"
    with pytest.raises(ConfigError, match=rf"^--draft-model: {folder} has another vocabulary: {told}$"):
        build.build_core(options(draft_model=str(folder)))


def test_a_draft_model_that_cannot_take_back_a_token_is_refused_by_name(tmp_path):
    AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^--draft-model: mamba cannot be served|MambaForCausalLM cannot be served"):
        build.build_core(options(draft_model=str(tmp_path)))


def test_the_keys_of_both_models_lie_in_the_same_blocks():
    facts = {}
    built = build.build_core(options(draft_model="builtin"), report=lambda said: facts.update({said.name: said}))
    served, draft = built.core._executor.models
    num_blocks = {len(layer.keys) for model in (served, draft) for layer in model.cache.layers}
    assert len(num_blocks) == 1
    size = sum(layer.keys.nbytes + layer.values.nbytes for model in (served, draft) for layer in model.cache.layers)
    assert (8 << 20) - size // num_blocks.pop() < size <= 8 << 20
    assert facts["draft model"].value.startswith("builtin: Qwen3ForCausalLM, 0.")
    assert "2 layers x 1 KV heads" in facts["KV cache"].value


def test_the_served_model_says_how_it_guesses():
    served = build.build_core(options("draft:5", draft_model="builtin")).model
    assert served.draft_sources == (DraftSource.DRAFT_MODEL,)
    assert (served.max_draft_tokens, served.draft_model) == (5, "builtin")
