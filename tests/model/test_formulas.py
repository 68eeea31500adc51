"""Formulas tell a compiled function that computes the same from one that does not, and are for all sizes they say."""

from typing import Any

import pytest
import torch

from nanoserve.model import narrow, packing
from nanoserve.model.attention import AttentionForm
from nanoserve.model.compiled import map_tensors
from nanoserve.model.formulas import Formula, attention_formula

PLAIN = AttentionForm(4, 2, 64, 64, 0.125, None, has_sinks=False)
SINKS = AttentionForm(4, 2, 64, 32, 0.125, 30.0, has_sinks=True)
FORMULAS = {
    "packed product": packing._formula(2),
    "narrow product": narrow._formula(torch.float16, 6),
    "attention": attention_formula(PLAIN, torch.float32, block_size=16),
    "attention in bfloat16": attention_formula(PLAIN, torch.bfloat16, block_size=16),
    "attention with sinks and cap": attention_formula(SINKS, torch.float32, block_size=8),
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_only_what_computes_the_same_is_taken(formula: Formula) -> None:
    def changed(change: Any) -> Any:
        return lambda *args: map_tensors(change, formula.function(*args))

    assert formula.is_computed_by(formula.function)
    assert not formula.is_computed_by(changed(lambda out: out * 1.03))
    assert not formula.is_computed_by(changed(lambda out: out + 0.1))
    assert not formula.is_computed_by(changed(lambda out: out * torch.nan))


def test_each_tensor_of_several_must_be_the_same() -> None:
    formula = FORMULAS["attention"]
    for wrong in (0, 1):
        assert not formula.is_computed_by(
            lambda *args, wrong=wrong: [out + (i == wrong) for i, out in enumerate(formula.function(*args))]
        )
    assert not formula.is_computed_by(lambda *args: formula.function(*args)[0])


@pytest.mark.parametrize("name", ["attention", "attention with sinks and cap"])
@pytest.mark.parametrize("argument", [0, 1, 2, 3, 4, 5])
def test_attention_depends_on_each_argument(name: str, argument: int) -> None:
    """So that a compiled function which leaves one out is found out."""
    formula = FORMULAS[name]

    def with_other(*args: Any) -> Any:
        other = args[argument]
        if other is None:
            pytest.skip("has none")
        other = other.flip(-1) if other.dim() > 1 else other + 3
        return formula.function(*args[:argument], other, *args[argument + 1 :])

    assert not formula.is_computed_by(with_other)
