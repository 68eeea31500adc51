"""What is known of a loaded model besides its modules: plain values, for whoever has no torch or is another process."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoserve.request import SAMPLING_RANGES, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Can be pickled."""

    # Where its files lie; the tokenizer is there too.
    folder: Path
    architecture: str
    # What it is computed in, as torch names it: "float32".
    dtype: str
    vocab_size: int
    # Tokens of prompt and completion together.
    max_position: int
    eos_token_ids: frozenset[int]
    # The checkpoint's own, for requests that say nothing.
    default_params: SamplingParams
    num_parameters: int
    # Classes of modules whose weights no kind of weights.py is for: they are served as transformers has them.
    left_out: tuple[str, ...]
    # Equal for equal weights, on every machine: part of every prefix hash.
    fingerprint: str


def max_position(config: Any) -> int | None:
    """The longest context: what the config says, or what its RoPE stretches the original length to. None = unknown."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not longest:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("yarn", "dynamic"):
        original = rope.get("original_max_position_embeddings") or longest
        longest = max(longest, original * rope.get("factor", 1.0))
    return int(longest)


def eos_token_ids(generation: dict[str, Any], config: Any) -> frozenset[int]:
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.get_text_config().eos_token_id
    if ids is None:
        return frozenset()
    ids = ids if isinstance(ids, list) else [ids]
    if odd := [token_id for token_id in ids if type(token_id) is not int]:
        logger.warning("eos_token_id of the checkpoint has %s, which is left out: it is no token id", odd[:4])
    return frozenset(token_id for token_id in ids if type(token_id) is int)


def default_params(generation: dict[str, Any], folder: Path) -> SamplingParams:
    """The sampling that the checkpoint's makers advise.

    Fields that are there are taken, whatever is not there is off. An explicit "do_sample": false means greedy; without
    the field the temperature holds, because callers of a server expect samples unless told otherwise. A value that no
    caller could choose either is left out, and said so; a top_k of -1 is how some write that it is off.
    """
    advised: dict[str, Any] = {}
    for name, allowed in SAMPLING_RANGES.items():
        value = generation.get(name)
        # With one seed for all requests they would all draw alike.
        if value is None or name == "seed" or (name == "top_k" and value == -1):
            continue
        kinds = int if isinstance(getattr(SamplingParams(), name), int) else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or value not in allowed:
            where = folder / "generation_config.json"
            logger.warning("%s: %s is %r, and is left out; allowed: %s", where, name, value, allowed)
        else:
            advised[name] = value
    if generation.get("do_sample") is False:
        advised["temperature"] = 0.0
    return SamplingParams(**advised)
