"""What the composition root decides itself."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from nanoserve import build
from nanoserve.config import (
    BUILTIN_MODEL,
    AdapterOptions,
    CacheOptions,
    ConfigError,
    ModelOptions,
    Options,
    SchedulerConfig,
)
from nanoserve.request import DraftSource, Fact


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


def options(speculate="auto", adapters=None, **model):
    return Options(
        ModelOptions(device="cpu", compile=False, **model),
        CacheOptions(kv_memory_bytes=8 << 20),
        AdapterOptions(**(adapters or {})),
        SchedulerConfig(speculate=speculate),
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


def test_without_adapters_the_model_has_none():
    built = build.build_core(options())
    assert built.model.adapter_folders is None
    assert built.core._scheduler.adapters is None


def test_adapters_of_the_start_are_read_then(tmp_path):
    adapter = BUILTIN_MODEL / "adapters" / "json"
    shutil.copytree(adapter, tmp_path / "lazy")
    told = []
    wanted = {"adapter": f"eager={adapter}", "adapters": tmp_path, "adapter_slots": 3}
    built = build.build_core(options(adapters=wanted), report=told.append)
    [info] = built.model.adapters
    assert (info.adapter.name, info.path) == ("eager", str(adapter))
    assert list(built.model.adapter_folders.names()) == ["lazy"]
    [line] = [fact.value for fact in told if isinstance(fact, Fact) and fact.name == "adapters"]
    assert line == f"3 slots; at most 2 GiB; read: eager (rank {info.rank}); 1 in {tmp_path}"


def test_what_reads_adapters_has_no_threads_to_help_it():
    """They would make those of each step sleep: see release_threads."""
    store = build.build_core(options(adapters={"adapters": Path("builtin")})).core._scheduler.adapters.store
    told, woken = [], threading.Event()
    store.wake = woken.set
    store.submit(torch.get_num_threads, told.append)
    assert woken.wait(10)
    store.settle()
    assert told == [1]


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"adapter": "a=/no/where,b=/nor/there"}, r"--adapter: .*'a'.*'b'"),
        ({"adapter": "a"}, "--adapter: 'a' is not NAME=PATH"),
        ({"adapter": f"nanoserve-builtin={BUILTIN_MODEL}"}, "the model's own name"),
        ({"adapters": "/no/where"}, "--adapters: there is no folder '/no/where'"),
    ],
)
def test_adapters_that_cannot_be_served_refuse_the_start_and_all_are_told(wanted, problem):
    if "adapters" in wanted:
        wanted = {"adapters": Path(wanted["adapters"])}
    with pytest.raises(ConfigError, match=problem):
        build.build_core(options(adapters=wanted))
