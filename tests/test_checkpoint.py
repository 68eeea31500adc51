"""What is told of a checkpoint's files before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import pytest
from safetensors.numpy import save_file

from nanoserve import checkpoint
from nanoserve.checkpoint import ModelLoadError
from nanoserve.config import BUILTIN_MODEL, ModelOptions


def folder_with(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        checkpoint.check_path(ModelOptions(path=str(path), **options))
    return str(caught.value)


@pytest.mark.parametrize("path", ["/no/where", "./owner/name", "a/b/c", "a b", "/name", "owner/"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_id(path: str) -> None:
    assert refusal(path) == f"there is no folder {path!r}, and it is not a Hub id such as 'owner/name'"


def test_a_draft_model_that_is_neither() -> None:
    assert refusal("owner/name", draft_model="/no/where").startswith("--draft-model: there is no folder '/no/where'")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)
    assert "is not valid JSON" in refusal(folder_with(tmp_path, config__json="{"))
    assert "is not a JSON object" in refusal(folder_with(tmp_path, config__json="[]"))


def test_what_may_be_a_model_is_not_refused(tmp_path: Path) -> None:
    for path in (BUILTIN_MODEL, folder_with(tmp_path, config__json="{}"), "owner/name", "gpt2"):
        checkpoint.check_path(ModelOptions(path=str(path)))


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, pytorch_model__bin="")
    with pytest.raises(ModelLoadError, match=r"found only pytorch_model.bin, which are not loaded"):
        checkpoint.check_weights(tmp_path)


def write_weights(path: Path, dtype: str) -> None:
    save_file({"weight": numpy.zeros((2, 3), dtype)}, path)


def test_weights_are_those_that_transformers_loads(tmp_path: Path) -> None:
    """Mistral's shards lie beside a file with the same weights once more."""
    write_weights(tmp_path / "consolidated.safetensors", "float64")
    with pytest.raises(ModelLoadError, match=r"neither .*; found only consolidated.safetensors"):
        checkpoint.check_weights(tmp_path)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    folder_with(tmp_path, config__json="{}", model__safetensors__index__json=json.dumps(index))
    write_weights(tmp_path / shards[0], "float16")
    with pytest.raises(ModelLoadError, match=r"lacks 1 files .* such as model-00002-of-00002.safetensors"):
        checkpoint.check_weights(tmp_path)
    write_weights(tmp_path / shards[1], "float16")
    checkpoint.check_weights(tmp_path)
    assert list(checkpoint.stored_tensors(tmp_path)) == [("F16", [2, 3])] * 2
    before = checkpoint.fingerprint(tmp_path)
    write_weights(tmp_path / "consolidated.safetensors", "float32")
    assert checkpoint.fingerprint(tmp_path) == before
    # A single file goes before an index.
    write_weights(tmp_path / "model.safetensors", "float32")
    assert list(checkpoint.stored_tensors(tmp_path)) == [("F32", [2, 3])]
    assert checkpoint.fingerprint(tmp_path) != before


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        folder_with(tmp_path, model__safetensors__index__json=text)
        with pytest.raises(ModelLoadError, match="weight_map"):
            checkpoint.check_weights(tmp_path)


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_is_fetched_only_where_it_is_trusted(is_trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return "/snapshots/abc"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = ModelOptions(path="owner/name", revision="v1", trust_remote_code=is_trusted)
    assert checkpoint.fetch(options, checkpoint.CONFIG_FILES) == Path("/snapshots/abc")
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert asked["allow_patterns"] == ["config.json", *(["*.py"] if is_trusted else [])]


def test_tensors_are_told_of_without_being_read() -> None:
    tensors = list(checkpoint.stored_tensors(BUILTIN_MODEL))
    config = json.loads((BUILTIN_MODEL / "config.json").read_text())
    assert [config["vocab_size"], config["hidden_size"]] in [shape for _, shape in tensors]
    assert {dtype for dtype, _ in tensors} == {"BF16"}
