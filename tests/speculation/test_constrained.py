"""Outputs under a constraint are right, or cut off; and they are the same whatever runs beside them, and however tokens
are guessed.

A small random model in float32 behind the real scheduler, cache, runner and sampler. Its tokens are made texts by
constrained.py.
"""

import random
from dataclasses import replace

import pytest
from constrained import COMPILER, CONSTRAINTS, decode, is_right
from drafting import Scripted, assert_equal, random_requests, serve
from families import VOCAB_SIZE

from nanoserve.request import FinishReason
from nanoserve.speculation.speculator import Speculator

ENDED_BY_ITSELF = (FinishReason.COMPLETE, FinishReason.EOS)
CUT_OFF = (FinishReason.LENGTH, FinishReason.CONTEXT, FinishReason.STOP)


def check(requests, outcomes):
    """Every output is right, or the beginning of one that is; returns how many were right to the end."""
    num_right = 0
    for request in requests:
        for index in range(request.params.n):
            outcome = outcomes[request.id, index]
            reason, stop_token_id, satisfies = outcome.end
            if request.constraint is None:
                assert not satisfies
                continue
            matcher = COMPILER.compile(request.constraint).matcher()
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
    requests = random_requests(count, seed=3, constraints=[*CONSTRAINTS, None])
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
