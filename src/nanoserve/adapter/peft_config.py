"""adapter_config.json of PEFT: what of it changes the mathematics of LoRA, and what of that is served.

PEFT computes x W^T + scaling * (x A^T) B^T in a layer, with a rank and a scaling for each layer. Nearly all other
settings say how the adapter was trained. Those that change the result are refused by name, and so is a setting that
is not known here, unless it is off: the next version of PEFT may have one that matters.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)

FILE = "adapter_config.json"
# Those that PEFT writes have about 1 KB.
MAX_BYTES = 2**20

# Settings that LoraConfig below is made of, or that say how it was trained, where, and from what. The file's tensors
# tell which layers it has.
USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path"}
DESCRIPTIVE = {
    *("peft_version", "task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout", "merge_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
    *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config"),
}
# Settings that change the result, and what they stand for. Each is off when it is empty.
REFUSED = {
    "use_dora": "DoRA, which scales the columns of the merged weight",
    "lora_bias": "a bias in each pair",
    "modules_to_save": "whole modules of its own: merge the adapter into the model, and serve that",
    "trainable_token_indices": "token embeddings of its own: merge the adapter into the model, and serve that",
    "target_parameters": "parameters that are no linear layers, such as fused experts",
    "layer_replication": "a model with more layers",
    "alora_invocation_tokens": "an adapter that begins in the middle of the prompt",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "use_bdlora": "block-diagonal pairs",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "enable_lora": "a layer that is adapted in part",
}
# Initialisations that leave the weights of the model as they are. Others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) take
# from them what the new pair holds, and the adapter fits no other model.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

# PEFT takes patterns of layers as regular expressions. One that could take for ever is refused.
MAX_PATTERN_LENGTH = 256
MAX_REPETITIONS = 3
MANY_REPEATED = re.compile(r"\)\s*[*+?{]")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What the tensors are to be, and by what their product is multiplied."""

    rank: int
    alpha: float
    # alpha / sqrt(rank) instead of alpha / rank.
    is_rank_stabilized: bool
    # Of layers whose path ends with a match of the regular expression. The first that matches holds.
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    # What it was trained for; empty = not told.
    base_model: str

    def rank_of(self, path: str) -> int:
        """Of the layer of this path, as the adapter calls it."""
        return _first_match(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        rank = self.rank_of(path)
        return _first_match(self.alpha_pattern, path, self.alpha) / (
            math.sqrt(rank) if self.is_rank_stabilized else rank
        )


def _first_match(values: Mapping[str, Number], path: str, default: Number) -> Number:
    """As in PEFT, peft/utils/other.py::get_pattern_key."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def read_config(path: Path) -> tuple[LoraConfig | None, list[str]]:
    """The config, or None, and all that is wrong with the file."""
    if path.stat().st_size > MAX_BYTES:
        return None, [f"{FILE} has more than {MAX_BYTES} bytes"]
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return None, [f"{FILE} is not valid JSON: {error}"]
    if not isinstance(settings, dict):
        return None, [f"{FILE} is not a JSON object"]
    kind = settings.get("peft_type")
    if kind != "LORA":
        return None, [f"peft_type in {FILE} is {_shown(kind)}; LORA alone is served"]
    problems = [*_refused(settings), *_wrong_values(settings)]
    if problems:
        return None, problems
    config = LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        is_rank_stabilized=settings.get("use_rslora") or False,
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
        base_model=settings.get("base_model_name_or_path") or "",
    )
    return config, []


def _refused(settings: dict[str, Any]) -> Iterator[str]:
    """Settings that the result would depend on, and that are not served."""
    for name, meaning in REFUSED.items():
        if settings.get(name):
            yield f"{name} in {FILE} stands for {meaning}, which is not served"
    if settings.get("bias", "none") != "none":
        yield f"bias in {FILE} is {_shown(settings['bias'])}; only 'none' is served"
    start = settings.get("init_lora_weights")
    if not any(start is each or (isinstance(start, str) and start == each) for each in INITIALISATIONS):
        yield (
            f"init_lora_weights in {FILE} is {_shown(start)}, which changes the model's own weights; let PEFT convert "
            "the adapter by save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for name in settings.keys() - USED - DESCRIPTIVE - REFUSED.keys() - {"bias"}:
        if settings[name]:
            yield f"{_shown(name)} in {FILE} is not known to this server, and is not off"


def _wrong_values(settings: dict[str, Any]) -> Iterator[str]:
    """Of those that are used."""
    if not _is_rank(settings.get("r")):
        yield f"r in {FILE} is {_shown(settings.get('r'))}; it must be a positive whole number"
    if not _is_number(settings.get("lora_alpha")):
        yield f"lora_alpha in {FILE} is {_shown(settings.get('lora_alpha'))}; it must be a finite number"
    if not isinstance(settings.get("use_rslora"), bool | None):
        yield f"use_rslora in {FILE} is {_shown(settings['use_rslora'])}; it must be true or false"
    if not isinstance(settings.get("base_model_name_or_path"), str | None):
        yield f"base_model_name_or_path in {FILE} is no string"
    for name, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{name} in {FILE} is no object of patterns to numbers"
            continue
        for pattern, value in patterns.items():
            if not is_right(value):
                yield f"{name} in {FILE} has {_shown(value)} for {_shown(pattern)}, which is no such number"
            if (problem := _wrong_pattern(pattern)) is not None:
                yield f"the pattern {_shown(pattern)} of {name} in {FILE} {problem}"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    """A float holds integers only up to some size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _wrong_pattern(pattern: str) -> str | None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"is longer than {MAX_PATTERN_LENGTH} characters"
    if MANY_REPEATED.search(pattern) or len(re.findall(r"[*+?{]", pattern)) > MAX_REPETITIONS:
        return f"repeats a group, or more than {MAX_REPETITIONS} parts: it could take for ever to match"
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    return None


def _shown(value: object) -> str:
    """For a message: without line breaks, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
