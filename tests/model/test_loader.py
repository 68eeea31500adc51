"""What is loaded, what is refused and why, and what the rest of the server is told of a model."""

import json
import os
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from families import COMMON, MAX_POSITION, VOCAB_SIZE, save_tiny_model, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanoserve.checkpoint import ModelLoadError
from nanoserve.config import ModelOptions
from nanoserve.kv_cache.paged_kv_cache import KVSpec
from nanoserve.model import layout, loader
from nanoserve.model.layout import has_plain
from nanoserve.model.loader import LoadedModel, fix_rope, load_model
from nanoserve.request import SamplingParams


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def load(folder: Path | str, **options: Any) -> LoadedModel:
    return load_model(ModelOptions(path=str(folder), device="cpu", **options))


def write_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# ------------------------------------------------------------------------------------------------ what is told


def test_a_folder_becomes_a_model(llama_folder: Path) -> None:
    model = load(llama_folder)
    assert model.facts.architecture == "LlamaForCausalLM"
    assert model.facts.folder == llama_folder
    assert (model.facts.vocab_size, model.facts.max_position) == (VOCAB_SIZE, MAX_POSITION)
    assert model.facts.num_parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert not model.model.training
    assert model.kv_specs == (KVSpec(2, 8, 8, torch.float32),) * 2


def test_weights_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "can_pack", lambda *_: False)  # packed weights cannot be read back
    theirs = tiny_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(attrgetter(name)(ours.model), parameter), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_once_packed_a_model_leaves_its_file(folder: Path) -> None:
    model = load(folder)
    if has_plain(model.layout):
        pytest.skip("this CPU does not pack float32")
    assert model.model.get_input_embeddings().weight.shape == (VOCAB_SIZE, model.model.config.hidden_size)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_keys_and_values_of_latent_attention_differ_in_width(tmp_path: Path) -> None:
    save_tiny_model("deepseek-v3", tmp_path)
    assert load(tmp_path).kv_specs == (KVSpec(4, 12, 6, torch.float32),) * 2


def test_windows_are_those_of_the_masks_not_of_the_arguments(tmp_path: Path) -> None:
    """Qwen2-MoE's attention does not pass its window on; Llama 4's chunk reaches only its mask."""
    save_tiny_model("qwen2-moe", tmp_path / "qwen")
    save_tiny_model("llama4", tmp_path / "llama4")
    assert [spec.window for spec in load(tmp_path / "qwen").kv_specs] == [11, None]
    assert [spec.window for spec in load(tmp_path / "llama4").kv_specs] == [16, None, 16]


def test_eos_ids_that_are_none_are_left_out_and_said_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(folder / "generation_config.json", eos_token_id=["2", None, True, 2.0, [3], 5])
    assert load(folder).facts.eos_token_ids == {5}
    assert "eos_token_id of the checkpoint has ['2', None, True, 2.0], which is left out" in caplog.text


@pytest.mark.parametrize(("in_generation", "in_config", "want"), [([5, 7], 2, {5, 7}), (9, 2, {9}), (None, 2, {2})])
def test_eos_ids_come_from_the_generation_config_or_the_config(
    folder: Path, in_generation: object, in_config: object, want: set[int]
) -> None:
    (folder / "generation_config.json").unlink()
    if in_generation is not None:
        write_json(folder / "generation_config.json", eos_token_id=in_generation)
    write_json(folder / "config.json", eos_token_id=in_config)
    assert load(folder).facts.eos_token_ids == want


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"do_sample": True, "temperature": 0.6}, SamplingParams(temperature=0.6)),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        ({"top_p": 0.0, "top_k": -1}, SamplingParams(top_p=0.0)),
    ],
)
def test_default_params_are_what_the_checkpoint_advises(
    folder: Path, generation: dict[str, object], want: SamplingParams
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).facts.default_params == want


def test_advice_that_no_caller_could_give_is_left_out_and_said_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"temperature": -1, "top_p": 1.5, "top_k": 2.5, "min_p": "0.1", "repetition_penalty": 0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    assert load(folder).facts.default_params == SamplingParams()
    for name in ("temperature is -1", "top_p is 1.5", "top_k is 2.5", "min_p is '0.1'", "repetition_penalty is 0"):
        assert f"generation_config.json: {name}, and is left out; allowed: " in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"{folder} is damaged: {name} has NaN or infinity"):
        load(folder)


def test_the_fingerprint_follows_the_weights(llama_folder: Path, folder: Path) -> None:
    assert load(folder).facts.fingerprint == load(llama_folder).facts.fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).facts.fingerprint != load(llama_folder).facts.fingerprint


def test_rope_that_stretches_the_context_counts(tmp_path: Path) -> None:
    save_tiny_model("llama-yarn", tmp_path / "yarn")
    save_tiny_model("llama-dynamic-rope", tmp_path / "dynamic")
    assert load(tmp_path / "yarn").facts.max_position == 96
    assert load(tmp_path / "dynamic").facts.max_position == 72


@pytest.mark.parametrize(("context", "is_long"), [(24, False), (25, True)])
def test_longrope_is_chosen_by_the_context_and_never_again(tmp_path: Path, context: int, is_long: bool) -> None:
    """Whatever the positions in a batch; and the choice can be made anew."""
    theirs = save_tiny_model("phi3-longrope", tmp_path)
    model = load(tmp_path).model
    fix_rope(model, 128)
    fix_rope(model, context)
    length = 25 if is_long else 24
    x, positions = torch.zeros(1, 1, 1), torch.arange(length)[None]
    want = theirs.get_submodule("model.rotary_emb")(x, positions)[0][0, :10]
    rope = model.get_submodule("model.rotary_emb")
    for longest in (10, 100):
        assert torch.equal(rope(x, torch.arange(longest)[None])[0][0, :10], want)


# ------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("stored", "asked", "is_fast", "want"),
    [
        (torch.bfloat16, "auto", True, torch.bfloat16),
        (torch.bfloat16, "auto", False, torch.float32),
        (torch.float16, "auto", True, torch.bfloat16),
        (torch.float16, "auto", False, torch.float32),
        (torch.float32, "auto", True, torch.float32),
        (torch.bfloat16, "float32", True, torch.float32),
        (torch.float32, "bfloat16", False, torch.bfloat16),
        (torch.float32, "float16", False, torch.float16),
    ],
)
@pytest.mark.parametrize("is_in_config", [True, False])
def test_dtype(
    tmp_path: Path,
    stored: torch.dtype,
    asked: Any,
    is_fast: bool,
    want: torch.dtype,
    is_in_config: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "_has_fast_bfloat16", lambda: is_fast)
    tiny_model("llama").to(stored).save_pretrained(tmp_path)
    if not is_in_config:
        write_json(tmp_path / "config.json", dtype=None)
    model = load(tmp_path, dtype=asked)
    assert model.dtype == want
    assert {p.dtype for p in model.model.parameters()} == {want}
    assert {spec.dtype for spec in model.kv_specs} == {want}


# ----------------------------------------------------------------------------------------------------- refusals


def drop_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    write_json(folder / "config.json", model_type="no-such-model")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def break_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_folder, "there is no folder"),
        (drop_config, "has no config.json"),
        (break_config, "config.json is not valid JSON"),
        (unknown_architecture, "no-such-model"),
        (cut_weights, "cannot be read: .*(incomplete|header|metadata)"),
        (drop_a_weight, r"1 missing keys, such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (reshape_a_weight, r"1 mismatched keys, such as .*model\.norm\.weight.*31"),
        (only_pickles, "neither model.safetensors nor .*; found only pytorch_model.bin, which are not loaded"),
        (break_generation_config, "is not a JSON object"),
    ],
)
def test_a_spoiled_folder_is_refused_with_its_cause(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: object) -> str:
        raise OSError(f"no network for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=r"'some/model' is no folder, .* no network for some/model"):
        load("some/model")


class Hub:
    """Has one model, in a folder named as its commit."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        # Of each download: its revision, and whether weights were wanted.
        self.asked: list[tuple[str | None, bool]] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def _download(self, name: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        assert name == "some/model"
        self.asked.append((revision, "*.safetensors" in allow_patterns))
        return str(self.folder)


def test_a_hub_id_is_loaded_at_its_revision(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(llama_folder, monkeypatch)
    assert load("some/model", revision="v1").facts.architecture == "LlamaForCausalLM"
    # Also if v1 is moved in the meantime.
    assert hub.asked == [("v1", False), (llama_folder.name, True)]


def test_a_hub_id_that_cannot_be_served_is_not_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder, monkeypatch)
    write_json(folder / "config.json", model_type="vit")
    with pytest.raises(ModelLoadError, match="vit cannot be served"):
        load("some/model")
    assert hub.asked == [(None, False)]


def test_a_revision_of_a_folder_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"--revision is for a Hub id, and .* is a folder"):
        load(llama_folder, revision="v1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says it lacks")
def test_a_device_that_is_not_there_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="no CUDA device"):
        load_model(ModelOptions(path=str(llama_folder), device="cuda"))


SMALL = {k: v for k, v in COMMON.items() if k != "head_dim"}
RECURRENT = {"layer_types": ["full_attention", "linear_attention"]}
UNSERVABLE: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "falcon": (lambda: hf.FalconConfig(**SMALL, alibi=False), "falcon cannot be served: its attention"),
    "bloom": (lambda: hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "BloomForCausalLM cannot"),
    "minimax": (
        lambda: hf.MiniMaxConfig(
            **COMMON, num_local_experts=2, num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"]
        ),
        "minimax cannot be served: it has layers of type linear_attention",
    ),
    "qwen3-next": (
        lambda: hf.Qwen3NextConfig(
            **COMMON,
            **RECURRENT,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        "qwen3_next cannot be served: it has layers of type linear_attention",
    ),
    "lfm2": (
        lambda: hf.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
        "lfm2 cannot be served: it has layers of type conv",
    ),
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2),
        "mamba cannot be served: it has layers of type linear_attention",
    ),
    "t5": (lambda: hf.T5Config(vocab_size=96, d_model=32, num_layers=1), "t5 cannot be served: it is an encoder-dec"),
    "bert": (lambda: hf.BertConfig(**SMALL), "BertLMHeadModel cannot be served: its attention is not causal"),
    "deepseek-v3.2": (
        lambda: hf.DeepseekV32Config(
            **{**COMMON, "head_dim": 4, "num_key_value_heads": 4},
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=8,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=6,
            index_head_dim=8,
            index_n_heads=2,
        ),
        "cannot be served: (its attention leaves tokens out|it has layers of type indexed)",
    ),
}


@pytest.mark.parametrize("family", UNSERVABLE)
def test_what_cannot_be_served_right_is_refused_by_name(family: str, tmp_path: Path) -> None:
    make_config, message = UNSERVABLE[family]
    config = make_config()
    if config.is_encoder_decoder:
        config.save_pretrained(tmp_path)
    else:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


def test_state_outside_attention_is_found_without_help_from_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial run alone refuses convolutions and linear attention, should a config not name them."""
    monkeypatch.setattr(loader, "LAYER_TYPES", {"full_attention", "linear_attention", "conv"})
    for family in ("minimax", "lfm2"):
        model = AutoModelForCausalLM.from_config(UNSERVABLE[family][0](), dtype=torch.float32)
        model.save_pretrained(tmp_path / family)
        with pytest.raises(ModelLoadError, match="a token depends on others outside attention"):
            load(tmp_path / family)


def test_a_rope_left_to_the_batch_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "fix_rope", lambda *_: None)
    save_tiny_model("phi3-longrope", tmp_path)
    with pytest.raises(ModelLoadError, match="depends on the positions of others"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_file_that_is_larger_than_memory_is_refused_too(tmp_path: Path, dtype: str | None) -> None:
    save_tiny_model("qwen3", tmp_path)
    write_json(tmp_path / "config.json", dtype=dtype)
    num_bytes = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tensor = {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)  # a hole, which takes no room on the disk
    with pytest.raises(ModelLoadError, match=r"the weights take .* GiB in (bfloat16|float32), and .* are free"):
        load(tmp_path)


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path)
    monkeypatch.setattr(loader, "available_memory", lambda: 1000)
    with pytest.raises(
        ModelLoadError, match=r"KiB in float32, and 1000 bytes of memory are free; --dtype bfloat16 takes half"
    ):
        load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu"))
