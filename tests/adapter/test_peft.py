"""Adapters of PEFT are read as PEFT reads them, or refused with all that is in the way."""

import json
import logging
import math
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import linear_layers, make_adapter, peft_logits
from families import FAMILIES, LONGEST, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nanoserve.adapter.peft import read_adapter
from nanoserve.adapter.vocabulary import AdapterInfo
from nanoserve.adapter.weights import AdapterWeights
from nanoserve.errors import AdapterInvalid, AdapterMemoryFull

PROMPT = [(7 * i) % 90 + 3 for i in range(LONGEST)]
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0"
QUERY = f"{LAYER}.self_attn.q_proj"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
NAN, INFINITE = math.nan, math.inf


def read(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[AdapterInfo, AdapterWeights]:
    return read_adapter("legal", folder, linear_layers(model), dtype, **{"max_bytes": 2**30, **options})


def computed_with(model: PreTrainedModel, weights: AdapterWeights) -> Tensor:
    """Logits of the model with x a^T b added behind each layer."""

    def hook(pair: Any) -> Callable[..., Tensor]:
        return lambda _module, inputs, out: out + (inputs[0] @ pair.a.t()) @ pair.b

    handles = [model.get_submodule(p).register_forward_hook(hook(pair)) for p, pair in weights.pairs.items()]
    try:
        return peft_logits(model, None, PROMPT)
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def valid(llama, tmp_path_factory) -> Path:
    """An adapter of the query, key and head layers."""
    return make_adapter(tmp_path_factory.mktemp("valid"), llama, target_modules=["q_proj", "k_proj", "lm_head"])


@pytest.fixture
def folder(valid, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(valid, tmp_path / "legal"))


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


def rename(folder: Path, pattern: str, replacement: str) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}, folder / TENSORS)


def problems(folder: Path, model: PreTrainedModel, **options: Any) -> list[str]:
    with pytest.raises(AdapterInvalid) as caught:
        read(folder, model, **options)
    assert caught.value.name == "legal"
    return caught.value.problems


# ------------------------------------------------------------------------------------------ computed as PEFT does it


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_each_family_are_those_of_peft(family, tmp_path):
    model = tiny_model(family)
    make_adapter(tmp_path, model)
    _, weights = read(tmp_path, model)
    theirs = peft_logits(model, tmp_path, PROMPT)
    torch.testing.assert_close(computed_with(model, weights), theirs, rtol=0, atol=5e-5)
    assert (theirs - peft_logits(model, None, PROMPT)).abs().max() > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 20}},
        # The first that matches holds, from the end of the path, between two dots.
        {"rank_pattern": {"1.self_attn.q_proj": 3, "q_proj": 2, "proj": 9}, "alpha_pattern": {"self_attn.*": 5}},
        {"rank_pattern": {r"^model\.layers\.0\..*": 6, r"layers\.\d+\.self_attn\.[qk]_proj": 2}},
        {"rank_pattern": {"^layers.0.self_attn.q_proj": 6, "(q|k)_proj": 2}, "use_rslora": True},
    ],
)
def test_scaling_and_patterns_are_those_of_peft(settings, llama, tmp_path):
    make_adapter(tmp_path, llama, rank=4, **settings)
    _, weights = read(tmp_path, llama)
    torch.testing.assert_close(computed_with(llama, weights), peft_logits(llama, tmp_path, PROMPT), rtol=0, atol=5e-5)


def test_shapes_type_and_sizes_are_told(llama, tmp_path):
    make_adapter(tmp_path, llama, rank=4, rank_pattern={"q_proj": 6}, target_modules=["q_proj", "k_proj"])
    info, weights = read(tmp_path, llama, torch.bfloat16)
    pair = weights.pairs["model.layers.0.self_attn.k_proj"]
    assert (pair.a.shape, pair.b.shape) == ((4, 32), (4, 16))
    assert all(
        tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        for pair in weights.pairs.values()
        for tensor in (pair.a, pair.b)
    )
    assert len(weights.pairs) == 4
    assert info.rank == weights.rank == 6
    assert info.num_bytes == weights.num_bytes == 2 * 2 * (4 * (32 + 16) + 6 * (32 + 32))
    assert (info.adapter.name, info.adapter.revision) == ("legal", weights.revision)
    assert info.path == str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"^base_model\.model\.", ""),
        (r"^base_model\.model\.model\.", ""),
        (r"^base_model\.model\.model\.", "base_model.model.model.language_model."),
        (r"^base_model\.model\.model\.", "base_model.model.language_model.model."),
        (r"\.weight$", ".default.weight"),
        (r"^base_model\.model\.", "base_model.model._orig_mod."),
        (r"\.self_attn", "._checkpoint_wrapped_module.self_attn._fsdp_wrapped_module"),
    ],
)
def test_names_that_others_give_to_the_same_layers(pattern, replacement, llama, folder):
    edit_config(folder, alpha_pattern={"0.self_attn.q_proj": 1})
    _, expected = read(folder, llama)
    rename(folder, pattern, replacement)
    _, weights = read(folder, llama)
    assert weights.pairs.keys() == expected.pairs.keys()
    assert weights.revision == expected.revision


def test_an_adapter_of_the_text_model_serves_the_multimodal_one_and_the_other_way_round(tmp_path):
    text, whole = tiny_model("gemma3"), tiny_model("gemma3-vision")
    make_adapter(tmp_path / "text", text, target_modules=["q_proj", "down_proj"])
    _, weights = read(tmp_path / "text", whole)
    assert len(weights.pairs) == 4
    assert weights.pairs.keys() <= linear_layers(whole).keys()
    targets = [path for path in linear_layers(whole) if path.endswith("q_proj")]
    make_adapter(tmp_path / "whole", whole, target_modules=targets)
    assert len(read(tmp_path / "whole", text)[1].pairs) == 2


def test_a_copy_of_the_models_head_is_told_in_the_log(llama, folder, caplog):
    _, expected = read(folder, llama)
    key = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(96, 32)}))
    with caplog.at_level(logging.WARNING):
        assert read(folder, llama)[1].revision == expected.revision
    assert key in caplog.text
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(97, 32)}))
    assert "replaces a weight of the model" in problems(folder, llama)[0]


def test_another_base_model_is_told_in_the_log(llama, folder, caplog):
    edit_config(folder, base_model_name_or_path="someone/Llama-7B")
    with caplog.at_level(logging.WARNING):
        read(folder, llama, base_model="/models/llama-7b")
        assert caplog.text == ""
        read(folder, llama, base_model="/models/llama-8b")
    assert "someone/Llama-7B" in caplog.text


# -------------------------------------------------------------------------------------------------- the revision


def test_the_revision_is_that_of_the_content(llama, folder, tmp_path):
    _, weights = read(folder, llama)
    assert re.fullmatch("[0-9a-f]{64}", weights.revision)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    edit_config(elsewhere, lora_dropout=0.5, base_model_name_or_path="x", target_modules=["q_proj"])
    tensors = load_file(elsewhere / TENSORS)
    save_file(dict(reversed(tensors.items())), elsewhere / TENSORS, metadata={"format": "pt"})
    assert read(elsewhere, llama)[1].revision == weights.revision
    assert read(elsewhere, llama, torch.bfloat16)[1].revision == weights.revision


def swap_layers(folder: Path) -> None:
    for old, new in (("layers.0", "layers.x"), ("layers.1", "layers.0"), ("layers.x", "layers.1")):
        rename(folder, old, new)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_config(folder, lora_alpha=9),
        lambda folder: edit_config(folder, use_rslora=True),
        lambda folder: edit_config(folder, alpha_pattern={"q_proj": 1}),
        lambda folder: edit_tensors(folder, lambda tensors: tensors[A][0, 0].add_(1)),
        lambda folder: edit_tensors(folder, lambda tensors: tensors[B][0, 0].add_(1)),
        lambda folder: edit_tensors(folder, lambda tensors: (tensors.pop(A), tensors.pop(B))),
        swap_layers,
    ],
)
def test_another_content_is_another_revision(change, llama, folder):
    revision = read(folder, llama)[1].revision
    change(folder)
    assert read(folder, llama)[1].revision != revision


def test_the_same_pair_in_another_layer_is_another_revision(llama, folder):
    tensors = load_file(folder / TENSORS)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.0" in key}, folder / TENSORS)
    revision = read(folder, llama)[1].revision
    rename(folder, "layers.0", "layers.1")
    assert read(folder, llama)[1].revision != revision


# -------------------------------------------------------------------------------------------------- refused configs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type in adapter_config.json is 'IA3'; LORA alone"),
        ({"peft_type": None}, "peft_type in adapter_config.json is None"),
        ({"peft_type": ["LORA"]}, "LORA alone"),
        ({"use_dora": True}, "use_dora .* DoRA"),
        ({"bias": "all"}, "bias .* is 'all'; only 'none'"),
        ({"bias": "lora_only"}, "'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* merge the adapter"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices .* merge"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters .* experts"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights .* 'pissa_niter_4', which changes"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"next_idea": {"strength": 2}}, "'next_idea' .* is not known"),
        ({"r": 0}, "r in adapter_config.json is 0; it must be a positive whole number"),
        ({"r": True}, "r .* is True"),
        ({"r": 4.0}, "r .* is 4.0"),
        ({"r": None}, "r .* is None"),
        ({"lora_alpha": "8"}, "lora_alpha .* is '8'; it must be a finite number"),
        ({"lora_alpha": NAN}, "lora_alpha .* is nan"),
        ({"lora_alpha": INFINITE}, "lora_alpha .* is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha .* 10000"),
        ({"use_rslora": "yes"}, "use_rslora .* 'yes'; it must be true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"rank_pattern": [1]}, "rank_pattern .* is no object"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern .* has -1 for 'q_proj'"),
        ({"alpha_pattern": {"q_proj": "big"}}, "alpha_pattern .* has 'big' for 'q_proj'"),
        ({"alpha_pattern": {"q_proj(": 1}}, r"pattern 'q_proj\(' of alpha_pattern .* is no regular expression"),
        ({"alpha_pattern": {"(q+)+x": 1}}, "could take for ever"),
        ({"rank_pattern": {".*a.*b.*c.*d": 1}}, "could take for ever"),
        ({"rank_pattern": {"q" * 300: 1}}, "longer than 256"),
    ],
)
def test_settings_that_are_refused(settings, words, llama, folder):
    edit_config(folder, **settings)
    [problem] = problems(folder, llama)
    assert re.search(words, problem), problem
    assert len(problem) < 300


def test_settings_that_say_how_it_was_trained_are_allowed(llama, folder):
    _, weights = read(folder, llama)
    settings = {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "fan_in_fan_out": True, "task_type": None}
    newer = {"next_idea": None, "another_idea": False, "third_idea": {}}
    edit_config(folder, **settings, **newer, layers_to_transform=[0, 1], eva_config={"rho": 2}, peft_version="0.99")
    assert read(folder, llama)[1].revision == weights.revision


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"r": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "peft_type"),
        (b" " * 2**21, "more than 1048576 bytes"),
    ],
)
def test_config_files_that_are_refused(content, words, llama, folder):
    (folder / CONFIG).write_bytes(content)
    [problem] = problems(folder, llama)
    assert words in problem


# -------------------------------------------------------------------------------------------------- refused tensors


def put(key: str, *shape: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Callable[..., object]:
    return lambda tensors: tensors.update({key: torch.full(shape, value, dtype=dtype)})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(A), f"tensor '{B}' has no lora_A beside it"),
        (lambda tensors: tensors.pop(B), f"tensor '{A}' has no lora_B beside it"),
        (put(A, 4, 31), f"tensor '{A}' has shape [4, 31], expected [4, 32]"),
        (put(A, 5, 32), f"tensor '{A}' has shape [5, 32], expected [4, 32]"),
        (put(B, 4, 32), f"tensor '{B}' has shape [4, 32], expected [32, 4]"),
        (put(A, 4, 32, 1), f"tensor '{A}' has shape [4, 32, 1], expected [4, 32]"),
        (put(A), f"tensor '{A}' has shape [], expected [4, 32]"),
        (put(A, 0, 32), f"tensor '{A}' has shape [0, 32], expected [4, 32]"),
        (put(A, 4, 32, dtype=torch.int64), f"tensor '{A}' has type I64; F32, BF16, F16, F64 are served"),
        (put(A, 4, 32, dtype=torch.float8_e4m3fn), f"tensor '{A}' has type F8_E4M3"),
        (put(A, 4, 32, value=NAN), f"tensor '{A}' has numbers that are not finite"),
        (put(B, 32, 4, value=-INFINITE), f"tensor '{B}' has numbers that are not finite"),
        (lambda tensors: tensors[B][3, 1].fill_(INFINITE), f"tensor '{B}' has numbers that are not finite"),
        (lambda tensors: tensors[B][31, 3].fill_(NAN), f"tensor '{B}' has numbers that are not finite"),
        (put(B, 32, 4, value=3e38), f"tensor '{B}' is too large for float32"),
        (put(f"{LAYER}.self_attn.q_proj.lora_A.default.weight", 4, 32), "is of a layer that the file has twice"),
        (put(f"{LAYER}.self_attn.qkv_proj.lora_A.weight", 4, 32), "is of no linear layer of the served model, which"),
        (put(f"{LAYER}.mlp.experts.0.up_proj.lora_A.weight", 4, 32), "is of no linear layer of the served model"),
        (put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", 4, 32), "is of no linear layer"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 96), "adapts an embedding"),
        (put("base_model.model.model.embed_tokens.weight", 97, 32), "replaces a weight of the model"),
        (put("base_model.model.lm_head.modules_to_save.weight", 96, 32), "replaces a weight of the model"),
        (put(f"{QUERY}.lora_magnitude_vector", 32), "is of DoRA"),
        (put(f"{QUERY}.bias", 32), "is a bias"),
        (put(f"{QUERY}.lora_B.bias", 32), "is a bias"),
        (put(f"{QUERY}.base_layer.bias", 32), "is a bias"),
        (put(f"{QUERY}.lora_C.weight", 4, 4), "is no LoRA weight of a linear layer"),
        (put("surprise", 1), "tensor 'surprise' is no LoRA weight of a linear layer"),
        (put(" \n", 1), "tensor ' \\n' is no LoRA weight"),
        (lambda tensors: tensors.clear(), "adapter_model.safetensors has no tensors"),
    ],
)
def test_tensors_that_are_refused(edit, words, llama, folder):
    edit_tensors(folder, edit)
    [problem] = problems(folder, llama)
    assert words in problem


def test_a_number_may_be_too_large_for_the_served_type_alone(llama, folder):
    edit_tensors(folder, put(A, 4, 32, value=1e5))
    assert read(folder, llama)
    assert problems(folder, llama, dtype=torch.float16) == [f"tensor '{A}' is too large for float16"]


def test_all_that_is_wrong_is_told_at_once(llama, folder):
    edit_config(folder, use_dora=True, bias="all", next_idea=1)
    edit_tensors(folder, lambda tensors: (tensors.pop(A), put("surprise", 1)(tensors)))
    found = problems(folder, llama)
    assert len(found) == 5
    for word in ("use_dora", "bias", "next_idea", "no lora_A", "surprise"):
        assert any(word in problem for problem in found)


def test_a_problem_of_many_tensors_is_told_once(llama, folder):
    rename(folder, "self_attn", "attention")
    [problem] = problems(folder, llama)
    assert "attention.q_proj" in problem
    assert "has 'down_proj', 'gate_proj', 'k_proj', 'lm_head', 'o_proj'" in problem
    edit_tensors(folder, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(20)}))
    assert any("and 12 others is no LoRA weight" in problem for problem in problems(folder, llama))


# ---------------------------------------------------------------------------------------------------- hostile files


def test_folders_that_are_no_adapter(llama, folder, tmp_path):
    assert "there is no folder" in problems(tmp_path / "none", llama)[0]
    assert "there is no folder" in problems(folder / CONFIG, llama)[0]
    assert problems(Path("\0"), llama)
    assert problems(Path("x" * 5000), llama) == ["its folder cannot be read: File name too long"]
    (folder / CONFIG).unlink()
    (folder / TENSORS).unlink()
    assert problems(folder, llama) == [f"the folder has no file {CONFIG}", f"the folder has no file {TENSORS}"]
    (folder / CONFIG).mkdir()
    os.mkfifo(folder / TENSORS)
    assert len(problems(folder, llama)) == 2


def test_a_pickle_is_not_read_and_its_owner_is_told_what_to_do(llama, folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    [problem] = problems(folder, llama)
    assert "found adapter_model.bin" in problem
    assert "save_pretrained" in problem


def test_added_tokens_are_refused_and_a_tokenizer_is_not_read(llama, folder):
    (folder / "tokenizer.json").write_text("?")
    (folder / "added_tokens.json").write_text('{"<new>": 96}')
    assert read(folder, llama)
    (folder / "new_embeddings.safetensors").write_bytes(b"")
    assert "adds tokens" in problems(folder, llama)[0]


def header(tensors: dict[str, Any], content: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 10 * 2**30) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        header({}, size=3),
        struct.pack("<Q", 9 * 2**20) + b"{}".ljust(9 * 2**20),
        header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 2**40]}}),
        header({A: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 512]}}, bytes(512)),
        header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 4]}}, bytes(4)),
        header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [512, 0]}}, bytes(512)),
        header({A: {"dtype": "F32", "shape": [-4, 32], "data_offsets": [0, 512]}}, bytes(512)),
        header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}, bytes(511)),
        header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}, bytes(600)),
        header(
            {
                A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]},
                B: {"dtype": "F32", "shape": [32, 4], "data_offsets": [0, 512]},
            },
            bytes(512),
        ),
        header({A: {"dtype": "C77", "shape": [4, 32], "data_offsets": [0, 512]}}, bytes(512)),
        b"\x80\x04\x95" + bytes(100),
    ],
)
def test_tensor_files_that_lie_are_refused_at_once(content, llama, folder):
    (folder / TENSORS).write_bytes(content)
    began = time.monotonic()
    [problem] = problems(folder, llama)
    assert "header" in problem or "damaged" in problem or "no tensors" in problem
    if len(content) > 2**23:
        assert "the header of adapter_model.safetensors would have 9437184 bytes" in problem
    assert time.monotonic() - began < 1


def test_a_file_that_is_too_large_is_not_read(llama, folder):
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(100 * 2**30)  # takes no disk
    began = time.monotonic()
    with pytest.raises(AdapterMemoryFull) as caught:
        read(folder, llama)
    assert time.monotonic() - began < 1
    assert (caught.value.num_bytes, caught.value.max_bytes) == (100 * 2**30, 2**30)


def test_weights_that_are_too_large_are_refused(llama, folder):
    info, _ = read(folder, llama, torch.bfloat16)
    read(folder, llama, torch.bfloat16, max_bytes=info.num_bytes)
    with pytest.raises(AdapterMemoryFull):
        read(folder, llama, torch.bfloat16, max_bytes=info.num_bytes - 1)


def test_symbolic_links_stay_under_the_root(llama, folder, tmp_path):
    assert read(folder, llama, root=tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / TENSORS).rename(outside / TENSORS)
    (folder / TENSORS).symlink_to(outside / TENSORS)
    assert read(folder, llama)
    assert read(folder, llama, root=tmp_path)
    [problem] = problems(folder, llama, root=folder)
    assert problem == f"{TENSORS} is a symbolic link that leads out of the root folder"


def test_the_file_may_change_after_it_was_read(llama, folder):
    """Memory that is mapped from the file would change with it, and a shorter file would end the process."""
    _, weights = read(folder, llama)
    copies = {path: (pair.a.clone(), pair.b.clone()) for path, pair in weights.pairs.items()}
    with (folder / TENSORS).open("r+b") as file:
        file.write(b"\xff" * 5000)
        file.truncate(10)
    for path, (a, b) in copies.items():
        assert torch.equal(weights.pairs[path].a, a)
        assert torch.equal(weights.pairs[path].b, b)
