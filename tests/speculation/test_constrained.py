"""Outputs under a constraint are right, or cut off; and they are the same whatever runs beside them, and however tokens
are guessed.

A small random model in float32 behind the real scheduler, cache, runner and sampler. Its tokens are made texts by
constrained.py.
"""

import random
from dataclasses import replace

import pytest
from constrained import COMPILER, CONSTRAINTS, VOCABULARY, decode, is_right, thinking
from drafting import Engine, Scripted, assert_equal, random_requests, serve
from families import VOCAB_SIZE
from llguidance import LLParserLimits

from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.request import Constraint, ConstraintKind, Failure, FinishReason, Request, SamplingParams
from nanoserve.speculation.speculator import Speculator

ENDED_BY_ITSELF = (FinishReason.COMPLETE, FinishReason.EOS)
CUT_OFF = (FinishReason.LENGTH, FinishReason.CONTEXT, FinishReason.STOP)


def check(requests, outcomes):
    """Every output is right, or the beginning of one that is; returns how many were right to the end."""
    num_right = 0
    for request in requests:
        for index in range(request.params.n):
            outcome = outcomes[request.id, index]
            (reason, stop_token_id), satisfies = outcome.end, outcome.satisfies
            if request.constraint is None:
                assert not satisfies
                continue
            matcher = COMPILER.compile(request.constraint).matcher([], request.params.max_reasoning_tokens)
            assert matcher.read(outcome.token_ids) == len(outcome.token_ids)
            assert satisfies is (matcher.may_end and request.params.max_tokens != 0)
            if reason in ENDED_BY_ITSELF or satisfies:
                assert satisfies
                assert is_right(request.constraint, decode(outcome.token_ids))
                num_right += 1
            else:
                assert reason in CUT_OFF
            assert (reason is FinishReason.COMPLETE) == matcher.is_complete or stop_token_id is not None
    return num_right


@pytest.mark.parametrize(
    ("count", "num_blocks"), [(60, 90), (60, 40), pytest.param(10_000, 40, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", ["off", "auto", "wrong"])
@pytest.mark.usefixtures("whatever_it_costs")
def test_outputs_are_right_and_the_same_alone(model, name, count, num_blocks):
    """With few blocks sequences are preempted; then their grammars read again what was generated."""
    constraints = [*CONSTRAINTS, *map(thinking, CONSTRAINTS[:6]), None]
    requests = random_requests(count, seed=3, constraints=constraints)
    speculators = {
        "off": lambda: None,
        "auto": lambda: Speculator.of("auto"),
        "wrong": lambda: Scripted(lambda _, text: [(text[-1] + 1) % VOCAB_SIZE] * 5),
    }
    together, _, num_drafted, _ = serve(model, requests, speculators[name](), num_blocks=num_blocks)
    assert (num_drafted > 0) == (name != "off")
    assert check(requests, together) > count // 4
    some = random.Random(1).sample(requests, min(count, 100))
    for request in some:
        alone, *_ = serve(model, [replace(request, block_hashes=[])])
        assert_equal({key: together[key] for key in alone}, alone)


@pytest.mark.parametrize(
    ("constraint", "limits"),
    [
        (Constraint(ConstraintKind.REGEX, r"(\S+\s+){9,99}y"), {"max_lexer_states": 30}),
        (CONSTRAINTS[3], {"max_items_in_row": 4}),
    ],
)
@pytest.mark.usefixtures("whatever_it_costs")
def test_a_grammar_that_goes_beyond_its_limits_fails_its_request_alone(model, monkeypatch, constraint, limits):
    """Seen at a mask, or at a token that the mask allowed."""
    others = [replace(r, id=f"other {r.id}") for r in random_requests(8, seed=5, constraints=[CONSTRAINTS[0], None])]
    want, *_ = serve(model, others)
    monkeypatch.setattr("nanoserve.constraint.checker.LIMITS", LLParserLimits(**limits, verbose_errors=False))
    compiler = ConstraintCompiler(lambda: VOCABULARY)
    usual = COMPILER.submit
    monkeypatch.setattr(COMPILER, "submit", lambda c: compiler.submit(c) if c == constraint else usual(c))
    params = [SamplingParams(temperature=2.0, seed=seed, logit_bias={31: 8.0}) for seed in range(4)]
    failing = [Request(f"{i}", [5, 6, 7], each, constraint=constraint) for i, each in enumerate(params)]
    engine = Engine(model, Speculator.of("auto"))
    got = engine.serve([*failing, *others])
    assert_equal({key: outcome for key, outcome in got.items() if key in want}, want)
    assert set(engine.failures.values()) == {Failure.CONSTRAINT}
    assert engine.failures.keys() <= {request.id for request in failing}


def test_what_one_request_after_the_other_makes_of_a_lexer_is_forgotten_when_it_is_full(model, monkeypatch):
    """Its states are shared by all that have the same constraint, and each of them adds some."""
    constraint = Constraint(
        ConstraintKind.REGEX, "|".join(f"{first}[a-z{i}]{{1,40}}" for i, first in enumerate("abcdef"))
    )
    params = [SamplingParams(temperature=2.0, seed=seed, max_tokens=40) for seed in range(40)]
    requests = [Request(f"{i}", [5, 6, 7], each, constraint=constraint) for i, each in enumerate(params)]
    want, *_ = serve(model, requests)
    limits = LLParserLimits(max_lexer_states=90, verbose_errors=False)
    monkeypatch.setattr("nanoserve.constraint.checker.LIMITS", limits)
    monkeypatch.setattr("drafting.COMPILER", ConstraintCompiler(lambda: VOCABULARY))
    engine = Engine(model)
    got = {}
    for request in requests:
        got |= engine.serve([replace(request, block_hashes=[])])
    assert engine.num_worn > 0
    assert not engine.failures
    assert_equal(got, want)
