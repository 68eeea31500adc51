"""What is told of a checkpoint's files before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

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


@pytest.mark.parametrize("path", ["nowhere", "/no/where", "./owner/name", "a/b/c"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_id(path: str) -> None:
    assert refusal(path) == f"there is no folder {path!r}, and it is not a Hub id such as 'owner/name'"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)
    assert "is not valid JSON" in refusal(folder_with(tmp_path, config__json="{"))
    assert "is not a JSON object" in refusal(folder_with(tmp_path, config__json="[]"))


def test_what_may_be_a_model_is_not_refused(tmp_path: Path) -> None:
    for path in (BUILTIN_MODEL, folder_with(tmp_path, config__json="{}"), "owner/name"):
        checkpoint.check_path(ModelOptions(path=str(path)))


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, pytorch_model__bin="")
    with pytest.raises(ModelLoadError, match=r"found only pytorch_model.bin, and pickles are not loaded"):
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
