"""Reads an adapter as PEFT writes it: a folder with adapter_config.json and adapter_model.safetensors.

    folder ─▶ config (peft_config.py) ─┐
           ─▶ tensors, by layer ───────┴─▶ pairs, each compared with the served layer ─▶ AdapterInfo, AdapterWeights

What is returned can be served. All that is in the way is told at once, in one AdapterInvalid: every tensor of the file
is used, or named. Files of others may be hostile: nothing in them is executed, sizes are checked before memory is
taken, and they are read once, so that what was checked is what is served.

Other files of the folder are not read. The tokenizer is the model's: an adapter that adds tokens has rows of an
embedding besides, and is refused for them.
"""

import hashlib
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from nanoserve.adapter import peft_config
from nanoserve.adapter.peft_config import LoraConfig
from nanoserve.adapter.vocabulary import Adapter, AdapterInfo
from nanoserve.adapter.weights import AdapterWeights, Pair
from nanoserve.errors import AdapterInvalid, AdapterMemoryFull

logger = logging.getLogger(__name__)

FILE = "adapter_model.safetensors"
# The same in other formats. Reading a pickle executes it.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# vLLM's file of added tokens.
ADDED_TOKENS = ("new_embeddings.safetensors", "new_embeddings.bin")
# One of a thousand tensors has a tenth of a megabyte.
MAX_HEADER_BYTES = 2**23
# What safetensors calls the types of numbers that a weight may have.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# Older versions of PEFT, and those who save a state dict themselves, leave the name of the adapter in.
LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight", re.DOTALL)
# Modules around the layers: PEFT's, that of a language model in a multimodal one, which differ between versions of
# transformers, and that of a model without its head. Wrappers of torch stand anywhere.
OUTER_MODULES = re.compile(r"^((base_model|model|language_model|text_model|transformer)\.)+")
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# PEFT adds the frozen weight of the head to the file when the head is a target.
FROZEN_HEAD = re.compile(r"(?P<path>.+)\.base_layer\.weight")
# Why other tensors are refused: the first that is found in the key.
OTHER_TENSORS = (
    (re.compile(r"\.lora_embedding_[AB]"), "adapts an embedding, which is not served"),
    (re.compile(r"\.lora_magnitude_vector"), "is of DoRA, which is not served"),
    (re.compile(r"\.bias$"), "is a bias, which is not served"),
    (
        re.compile(r"\.modules_to_save\.|(embed_tokens|lm_head|wte|embed_in|embed_out)(\.base_layer)?\.weight$"),
        "replaces a weight of the model, as one with other tokens would: merge the adapter into the model, and serve"
        " that",
    ),
    (re.compile("."), "is no LoRA weight of a linear layer"),
)
# Of tensors with the same problem, and of names that are allowed.
MAX_NAMES = 8


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the file."""

    key: str
    shape: tuple[int, ...]
    # As safetensors calls it.
    dtype: str
    # Its bytes, of this process alone.
    content: bytearray

    def tensor(self) -> Tensor:
        return torch.frombuffer(self.content, dtype=DTYPES[self.dtype]).view(self.shape)


class _Problems:
    """What is wrong, the same with many tensors told once."""

    def __init__(self, others: list[str]) -> None:
        self._others = others
        self._keys: dict[str, list[str]] = defaultdict(list)

    def add(self, key: str, what: str) -> None:
        self._keys[what].append(key)

    def texts(self) -> list[str]:
        return [*self._others, *(f"tensor {_names(keys)} {what}" for what, keys in self._keys.items())]


def read_adapter(
    name: str,
    folder: Path,
    targets: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    *,
    max_bytes: int,
    root: Path | None = None,
    base_model: str | None = None,
) -> tuple[AdapterInfo, AdapterWeights]:
    """Read an adapter and check it. Raises AdapterInvalid, or AdapterMemoryFull.

    targets: path of each layer that may be changed -> its in_features and out_features.
    dtype: that the model is computed in.
    max_bytes: of the weights.
    root: the files have to lie in this folder, symbolic links resolved. None = anywhere, as in the Hub's cache.
    base_model: what is served; an adapter that was trained for a model of another name gets a warning.
    """
    config, stored, wrong = _read_files(name, folder, root, max_bytes * 4 // dtype.itemsize)
    problems = _Problems(wrong)
    sides = _by_layer(stored, targets, problems)
    pairs: dict[str, Pair] = {}
    digest = hashlib.sha256()
    for path, (called, a, b) in sorted(sides.items()):
        if config is None:
            continue
        pair = _make_pair(config, called, a, b, targets[path], dtype, problems)
        if pair is not None:
            pairs[path] = pair
            facts = (path, config.scaling_of(called), *a.shape, *b.shape, a.dtype, b.dtype)
            for part in (repr(facts).encode(), a.content, b.content):
                digest.update(part)
    if texts := problems.texts():
        raise AdapterInvalid(name, texts)
    assert config is not None
    _warn_of_other_base(name, config.base_model, base_model)
    weights = AdapterWeights(digest.hexdigest(), pairs)
    info = AdapterInfo(Adapter(name, weights.revision), str(folder), weights.rank, weights.num_bytes)
    if info.num_bytes > max_bytes:
        raise AdapterMemoryFull(name, info.num_bytes, max_bytes)
    return info, weights


# ------------------------------------------------------------------------------------------------------ the files


def _read_files(
    name: str, folder: Path, root: Path | None, max_bytes: int
) -> tuple[LoraConfig | None, list[_Stored], list[str]]:
    """The config, if it can be used; the tensors; and what is wrong with them. Raises AdapterInvalid."""
    try:
        if missing := _missing_files(folder, root):
            raise AdapterInvalid(name, missing)
        config, wrong = peft_config.read_config(folder / peft_config.FILE)
        stored, unreadable = _read_tensors(name, folder / FILE, max_bytes)
    except OSError as error:
        raise AdapterInvalid(name, [f"its folder cannot be read: {error.strerror}"]) from error
    return config, stored, wrong + unreadable


def _missing_files(folder: Path, root: Path | None) -> list[str]:
    """Why the files cannot be opened, if so."""
    if not folder.is_dir():
        return [f"there is no folder {str(folder)!r}"]
    problems = []
    for file in (peft_config.FILE, FILE):
        path = folder / file
        if not path.is_file():
            problems.append(f"the folder has no file {file}")
        elif root is not None and not path.resolve().is_relative_to(root.resolve()):
            problems.append(f"{file} is a symbolic link that leads out of the root folder")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {*PICKLES, ".safetensors"})
    if f"the folder has no file {FILE}" in problems and others:
        found = ", ".join(others[:MAX_NAMES])
        problems[-1] += (
            f"; found {found}. A pickle is never read: PeftModel.from_pretrained and save_pretrained make {FILE} of it"
        )
    added = [file for file in ADDED_TOKENS if (folder / file).exists()]
    if added:
        problems.append(f"{added[0]} adds tokens: merge the adapter into the model, and serve that")
    return problems


def _read_tensors(name: str, path: Path, max_bytes: int) -> tuple[list[_Stored], list[str]]:
    """The tensors, and why there are none. Raises AdapterMemoryFull for a file of more than `max_bytes`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, size - 8):
            return [], [f"the header of {FILE} would have {header_bytes} bytes, of a file of {size}"]
        if size > max_bytes + MAX_HEADER_BYTES:
            raise AdapterMemoryFull(name, size, max_bytes)
        file.seek(0)
        content = file.read(size)  # a file that grows meanwhile is not what its header says
    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        return [], [f"{FILE} is damaged: {error}"]
    if not found:
        return [], [f"{FILE} has no tensors"]
    return [_Stored(key, tuple(each["shape"]), each["dtype"], each["data"]) for key, each in found], []


# --------------------------------------------------------------------------------------------- tensors to layers


def _by_layer(
    stored: list[_Stored], targets: Mapping[str, tuple[int, int]], problems: _Problems
) -> dict[str, tuple[str, _Stored, _Stored]]:
    """Path of a served layer -> what the adapter calls it, A, and B."""
    found: dict[str, dict[str, _Stored]] = defaultdict(dict)
    called: dict[str, str] = {}
    # Its own name first, if two have the same rest.
    inner = {_inner(path): path for path in targets} | {path: path for path in targets}
    kinds = _names(sorted({path.rpartition(".")[2] for path in targets}))
    for each in stored:
        match = LORA_KEY.fullmatch(each.key)
        if match is None:
            _judge_other(each, inner, targets, problems)
            continue
        name = WRAPPERS.sub("", match["path"]).removeprefix("base_model.model.")
        path = inner.get(name, inner.get(_inner(name)))
        if path is None:
            problems.add(each.key, f"is of no linear layer of the served model, which has {kinds}")
        elif match["side"] in found[path]:
            problems.add(each.key, "is of a layer that the file has twice")
        else:
            found[path][match["side"]] = each
            called[path] = name
    for sides in found.values():
        if len(sides) == 1:
            [(side, each)] = sides.items()
            problems.add(each.key, f"has no lora_{'B' if side == 'A' else 'A'} beside it")
    return {path: (called[path], sides["A"], sides["B"]) for path, sides in found.items() if len(sides) == 2}


def _inner(path: str) -> str:
    """What all names of a layer have in common."""
    return OUTER_MODULES.sub("", WRAPPERS.sub("", path))


def _judge_other(
    each: _Stored, inner: Mapping[str, str], targets: Mapping[str, tuple[int, int]], problems: _Problems
) -> None:
    """A tensor that is not of a pair."""
    frozen = FROZEN_HEAD.fullmatch(each.key)
    path = inner.get(_inner(frozen["path"])) if frozen else None
    if path is not None and each.shape == targets[path][::-1]:
        logger.warning("%s of an adapter is taken to be the model's own weight, which PEFT adds to the file", each.key)
        return
    problems.add(each.key, next(why for pattern, why in OTHER_TENSORS if pattern.search(each.key)))


def _names(names: list[str]) -> str:
    """Some of them, and how many there are besides."""
    shown = ", ".join(repr(name[:120]) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} others"


# ------------------------------------------------------------------------------------------------ layers to pairs


def _make_pair(
    config: LoraConfig,
    called: str,
    a: _Stored,
    b: _Stored,
    features: tuple[int, int],
    dtype: torch.dtype,
    problems: _Problems,
) -> Pair | None:
    """None if there is something wrong with it."""
    in_features, out_features = features
    rank = config.rank_of(called)
    fits = True
    for each, expected in ((a, (rank, in_features)), (b, (out_features, rank))):
        if each.shape != expected:
            problems.add(each.key, f"has shape {list(each.shape)}, expected {list(expected)}")
            fits = False
        if each.dtype not in DTYPES:
            problems.add(each.key, f"has type {each.dtype}; {', '.join(DTYPES)} are served")
            fits = False
    if not fits:
        return None
    # PEFT multiplies the product by the scaling; here the smaller of the two factors has it.
    scaled = b.tensor().to(torch.promote_types(torch.float32, DTYPES[b.dtype])) * config.scaling_of(called)
    pair = Pair(a.tensor().to(dtype), scaled.t().to(dtype, memory_format=torch.contiguous_format))
    for each, tensor in ((a, pair.a), (b, pair.b)):
        if not _is_finite(tensor):
            is_stored = not bool(each.tensor().isfinite().all())
            type_name = str(dtype).removeprefix("torch.")
            problems.add(each.key, "has numbers that are not finite" if is_stored else f"is too large for {type_name}")
            fits = False
    return pair if fits else None


def _is_finite(tensor: Tensor) -> bool:
    """In one pass, without a tensor of truth values: what is infinite or no number is the smallest or the largest."""
    return all(math.isfinite(number) for number in torch.aminmax(tensor))


def _warn_of_other_base(name: str, trained_for: str, served: str | None) -> None:
    if served is not None and trained_for and Path(trained_for).name.casefold() != Path(served).name.casefold():
        logger.warning("adapter %r was trained for %r; served is %r", name, trained_for, served)
