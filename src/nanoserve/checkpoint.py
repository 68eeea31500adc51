"""A checkpoint's files: where they are, and what can be told of them before anything is loaded, without torch.

A path that cannot be served is refused here at once, before the seconds that importing torch takes.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanoserve.config import ConfigError, ModelOptions

# What a model's config is made of; its code only where that is trusted.
CONFIG_FILES = ["config.json"]
CODE_FILES = ["*.py"]
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# The same weights once more, in other formats.
IGNORED_FILES = ["original/*", "consolidated*", "onnx/*"]
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".gguf"}
# The oldest models have no owner.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
# Of each checkpoint file, for the fingerprint.
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096


class ModelLoadError(ConfigError):
    """The model cannot be loaded or not be served; the message says why."""


def check_path(options: ModelOptions) -> None:
    """Refuse what can be refused without a network: no folder and no Hub id, or a folder without a config."""
    folder = Path(options.path)
    if folder.is_dir():
        if options.revision is not None:
            raise ModelLoadError(f"--revision is for a Hub id, and {folder} is a folder")
        check_config(folder)
    elif not HUB_ID.fullmatch(options.path):
        raise ModelLoadError(f"there is no folder {options.path!r}, and it is not a Hub id such as 'owner/name'")
    if options.draft is not None:
        with of_draft_model():
            check_path(options.draft)


@contextmanager
def of_draft_model() -> Iterator[None]:
    """An error from within says which model it speaks of."""
    try:
        yield
    except ConfigError as error:
        raise ModelLoadError(f"--draft-model: {error}") from error


def fetch(options: ModelOptions, patterns: list[str], *, revision: str | None = None) -> Path:
    """The folder of the model's files; of a Hub id, those of such names are there, downloaded if they were not.

    revision: instead of the one in `options`.
    """
    folder = Path(options.path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                options.path,
                revision=revision or options.revision,
                allow_patterns=[*patterns, *(CODE_FILES if options.trust_remote_code else ())],
                ignore_patterns=IGNORED_FILES,
            )
        )
    except Exception as error:  # the Hub's client raises its own, requests' and OS errors
        raise ModelLoadError(f"{options.path!r} is no folder, and could not be had from the Hub: {error}") from error


def check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json: it is not a model in Hugging Face format")
    read_json(folder / "config.json")


def check_weights(folder: Path) -> None:
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing and (folder / WEIGHTS_INDEX).is_file():
        raise ModelLoadError(f"{folder} lacks {len(missing)} files of its {WEIGHTS_INDEX}, such as {missing[0]}")
    if missing:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {*PICKLES, ".safetensors"})
        found = f"; found only {', '.join(others[:4])}, which are not loaded" if others else ""
        raise ModelLoadError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{found}")


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads: one file, or those of the index. Others may hold the same weights once more."""
    if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file():
        return [folder / WEIGHTS]
    names = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelLoadError(f"{folder / WEIGHTS_INDEX} has no weight_map of tensors to files")
    return sorted({folder / name for name in names.values()})


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return content


def stored_tensors(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Of each tensor of the checkpoint: its type as safetensors names it, such as "BF16", and its shape."""
    for path in weight_files(folder):
        try:
            # Not "pt": that asks the system for as much memory as the file is long, and nothing is read here.
            with safe_open(path, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_slice(name)
                    yield tensor.get_dtype(), tensor.get_shape()
        except SafetensorError as error:
            raise ModelLoadError(f"{path} cannot be read: {error}") from error


def fingerprint(folder: Path) -> str:
    """Equal for equal weights, on every machine.

    A hash over the config and over samples of every checkpoint file: the whole would take minutes to read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(NUM_SAMPLES):
                file.seek(size * i // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
