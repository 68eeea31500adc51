"""Compiles every schema of a file, walks its instances token by token, and says what was enforced and what it took.

    python benchmarks/schemas.py [FILE] [--model FOLDER] [--relaxed] [--examples N]

FILE has one JSON object a line, and may be packed with xz: {"name", "schema", "tests": [{"valid", "data"}]}, as
MaskBench has them. Default: tests/constraint/schemas.jsonl. Each instance is spelled twice, compact and indented; it is
accepted if every token of one of the spellings is allowed where it stands, and the end is. Ends with status 1 if an
instance is accepted that is not valid, or, with --relaxed, if that is not found out at the end either.

Times are of one thread. A compile time is of a schema that is new, without the tokenizer's share, which is made once.
"""

import argparse
import json
import lzma
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoserve.config import BUILTIN_MODEL
from nanoserve.constraint.compiler import CompiledConstraint, ConstraintCompiler
from nanoserve.constraint.matcher import make_masks
from nanoserve.constraint.outcome import Outcome, outcome_of
from nanoserve.constraint.schema import ENFORCED, UNSUPPORTED
from nanoserve.engine.text import TextCodec
from nanoserve.errors import ConstraintInvalid
from nanoserve.request import Constraint, ConstraintKind

SHIPPED = Path(__file__).resolve().parent.parent / "tests" / "constraint" / "schemas.jsonl"
# In the table of refusals: what is no keyword of the standard, and no annotation that is known.
UNKNOWN = "(unknown keywords)"


@dataclass
class Report:
    """What was seen so far."""

    num_schemas: int = 0
    num_enforced: int = 0
    num_relaxed: int = 0
    # By the first keyword that is in the way.
    refused: Counter[str] = field(default_factory=Counter)
    num_valid: int = 0
    num_invalid: int = 0
    # Names of schemas, one for each instance.
    invalid_accepted: list[str] = field(default_factory=list)
    valid_refused: list[str] = field(default_factory=list)
    # Seconds.
    compile_s: list[float] = field(default_factory=list)
    first_mask_s: list[float] = field(default_factory=list)
    mask_s: list[float] = field(default_factory=list)


def read_cases(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    # Not splitlines: a JSON string may hold what it takes for the end of a line.
    yield from map(json.loads, filter(str.strip, text.split("\n")))


def spellings(value: Any) -> list[str]:
    """An indentation by one, so that no place has more white space than is allowed."""
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return [compact, json.dumps(value, ensure_ascii=False, indent=1)]


class Walker:
    """Has the tokenizer and a compiler for its tokens."""

    def __init__(self, model: Path) -> None:
        self._codec = TextCodec.load(model)
        num_tokens, eos = self._codec.vocab_size, self._codec.eos_token_id
        self.compiler = ConstraintCompiler(
            lambda: self._codec.vocabulary(num_tokens, [] if eos is None else [eos]), self._codec.encode_plain
        )
        self._masks = make_masks(1, num_tokens)
        self.compiler.compile(Constraint(ConstraintKind.JSON_OBJECT))

    def accepts(self, compiled: CompiledConstraint, text: str, mask_s: list[float]) -> bool:
        """Whether each token is in the mask of its place. Adds the seconds that each mask took."""
        matcher = compiled.matcher()
        for token_id in self._codec.encode(text, add_special_tokens=False):
            start_s = time.perf_counter()
            matcher.fill(self._masks)
            mask_s.append(time.perf_counter() - start_s)
            word = int(np.uint32(self._masks[0, token_id // 32].view(np.uint32)))
            if not word >> token_id % 32 & 1:
                return False
            assert matcher.read([token_id]) == 1, "the mask allows what the matcher does not"
        return matcher.may_end


def measure(case: dict[str, Any], walker: Walker, report: Report, *, is_relaxed: bool) -> None:
    """Add one schema and its instances to the report."""
    report.num_schemas += 1
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(case["schema"]), is_relaxed)
    try:
        compiled = walker.compiler.compile(constraint)
    except ConstraintInvalid as error:
        first = error.problems[0]
        is_known = first.keyword in ENFORCED | UNSUPPORTED
        report.refused[first.keyword if is_known else UNKNOWN if first.keyword else first.description] += 1
        return
    report.num_enforced += not compiled.report.relaxed
    report.num_relaxed += bool(compiled.report.relaxed)
    report.compile_s.append(compiled.report.compile_s)
    report.first_mask_s.append(compiled.report.first_mask_s)
    for test in case["tests"]:
        texts = spellings(test["data"])
        accepted = [walker.accepts(compiled, text, report.mask_s) for text in texts]
        if test["valid"]:
            report.num_valid += 1
            report.valid_refused += [] if all(accepted) else [case["name"]]
        else:
            report.num_invalid += 1
            is_relaxed = bool(compiled.report.relaxed)
            outcome = outcome_of(constraint, texts[0], satisfies=True, is_relaxed=is_relaxed)
            is_unseen = outcome is not Outcome.RELAXED_VIOLATED
            report.invalid_accepted += [case["name"]] if any(accepted) and is_unseen else []


def microseconds(name: str, seconds: list[float]) -> str:
    """A row of the table of times."""
    values = sorted(each * 1e6 for each in seconds)
    if not values:
        return ""

    def at(share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]

    figures = (statistics.mean(values), at(0.5), at(0.99), at(0.999), values[-1])
    return f"{name:<22}" + "".join(f"{each:>11,.0f}" for each in figures) + f"{len(values):>11,}\n"


def written(report: Report, num_examples: int) -> str:
    passed = report.num_enforced + report.num_relaxed
    share = 100 * passed / max(1, report.num_schemas)
    lines = [
        f"schemas             {report.num_schemas}, of which {passed} compile ({share:.1f} %): "
        f"{report.num_enforced} enforced whole, {report.num_relaxed} relaxed",
        f"invalid accepted    {len(report.invalid_accepted)} of {report.num_invalid} instances",
        f"valid refused       {len(report.valid_refused)} of {report.num_valid} instances",
        *(f"  accepted: {name}" for name in report.invalid_accepted),
        *(f"  refused: {name}" for name in report.valid_refused[:num_examples]),
        "",
        "refused for         schemas",
        *(f"{keyword[:60]:<20}{count:>7}" for keyword, count in report.refused.most_common()),
        "",
        f"{'microseconds':<22}" + "".join(f"{name:>11}" for name in ("average", "p50", "p99", "p99.9", "max", "count")),
        microseconds("compile", report.compile_s)
        + microseconds("first mask", report.first_mask_s)
        + microseconds("mask of a token", report.mask_s),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--model", type=Path, default=BUILTIN_MODEL, help="folder whose tokenizer is used")
    parser.add_argument("--relaxed", action="store_true", help="what cannot be enforced is validated at the end")
    parser.add_argument("--examples", type=int, default=20, help="names of schemas that refuse a valid instance")
    arguments = parser.parse_args()
    walker, report = Walker(arguments.model), Report()
    for case in read_cases(arguments.file):
        measure(case, walker, report, is_relaxed=arguments.relaxed)
    print(written(report, arguments.examples))
    sys.exit(1 if report.invalid_accepted else 0)


if __name__ == "__main__":
    main()
