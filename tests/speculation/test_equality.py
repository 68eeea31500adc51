"""Drafts change nothing but the number of steps: requests end with the same tokens, log-probabilities and reasons.

A small random model in float32 behind the real scheduler, cache, runner and sampler. Requests are random, and drafters
are the real ones and some that no sensible person would write.
"""

import functools
import random
from dataclasses import replace

import pytest
import torch
from drafting import Scripted, assert_equal, random_requests, right_drafts, serve
from families import VOCAB_SIZE, tiny_model

from nanoserve.model.paged_model import PagedModel
from nanoserve.request import Request, SamplingParams
from nanoserve.speculation.speculator import Speculator


def drafters(plain, requests):
    """Of every character."""
    right = right_drafts(plain, requests)

    def half_right(admission, text):
        tokens = right(admission, text)
        return [*tokens[: len(text) % 4], 3, *tokens[len(text) % 4 + 1 :]]

    chance = random.Random(1)
    return {
        "right": Scripted(right),
        "half right": Scripted(half_right),
        "wrong": Scripted(lambda _, text: [(text[-1] + 1) % VOCAB_SIZE] * 5),
        "random": Scripted(lambda _a, _t: [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(7))]),
        "no such token": Scripted(lambda _a, _t: [VOCAB_SIZE, -1, 10**9]),
        "endless": Scripted(lambda admission, text: right(admission, text) + [5] * 100),
        "ngram": Speculator.of("ngram:5"),
        "suffix": Speculator.of("suffix"),
        "auto": Speculator.of("auto"),
        "prediction": Speculator.of("off"),
    }


def with_predictions(requests, plain):
    """The same requests, whose callers expect about what comes, or something else."""
    chance = random.Random(2)
    predicting = []
    for request in requests:
        tokens = list(plain[request.id, 0].token_ids) if (request.id, 0) in plain else []
        for _ in range(chance.randrange(3)):
            place = chance.randrange(len(tokens) + 1)
            tokens[place : place + chance.randrange(3)] = [chance.randrange(VOCAB_SIZE)] * chance.randrange(3)
        params = replace(request.params, prediction=tuple(tokens if chance.random() < 0.8 else tokens[::-1]))
        predicting.append(replace(request, params=params, block_hashes=[]))
    return predicting


# With few blocks sequences are preempted too.
SIZES = [(24, 90), (24, 40), pytest.param(500, 40, marks=pytest.mark.soak)]
NAMES = ("right", "half right", "wrong", "random", "no such token", "endless", "ngram", "suffix", "auto", "prediction")
MODELS = ("itself", "another model", "a narrower model", "a wider model", "a short model")


@pytest.fixture(scope="module")
def without_drafts(model):
    """Of so many requests and blocks: what they give, and in how many steps. Each is served once."""

    @functools.cache
    def served(count, num_blocks):
        plain, num_steps, num_drafted, _ = serve(model, random_requests(count, seed=count), num_blocks=num_blocks)
        assert num_drafted == 0
        return plain, num_steps

    return served


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "num_blocks"), SIZES)
@pytest.mark.usefixtures("whatever_it_costs")
def test_drafts_change_no_output(model, without_drafts, name, count, num_blocks):
    requests = random_requests(count, seed=count)
    plain, num_steps = without_drafts(count, num_blocks)
    drafter = drafters(plain, requests)[name]
    if name in ("auto", "prediction"):
        requests = with_predictions(requests, plain)
    got, num_steps_drafted, num_drafted, num_right = serve(model, requests, drafter, num_blocks=num_blocks)
    assert_equal(got, plain)
    if name in ("right", "half right", "endless", "prediction"):
        assert num_steps_drafted < num_steps
        assert num_right > 0
    assert (num_drafted > 0) == (name != "no such token")
    if name in ("half right", "wrong", "random", "endless"):
        assert num_drafted > num_right


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("count", "num_blocks"), SIZES)
@pytest.mark.usefixtures("whatever_it_costs")
def test_a_model_that_drafts_changes_no_output(model, draft_models, without_drafts, name, count, num_blocks):
    """And one that would say the same is right every time, at any temperature: it draws with the same noise."""
    requests = random_requests(count, seed=count)
    plain, num_steps = without_drafts(count, num_blocks)
    drafter = Speculator.of("draft:5", has_draft_model=True)
    got, num_steps_drafted, num_drafted, num_right = serve(
        model, requests, drafter, draft_model=draft_models[name], num_blocks=num_blocks
    )
    assert_equal(got, plain)
    assert num_drafted > 0
    if name == "itself":
        assert num_right > 0.98 * num_drafted
        assert num_steps_drafted < num_steps


def test_a_guess_that_makes_a_nan_is_dropped_and_nothing_else(model, monkeypatch):
    """Even one that is right: the next step computes it again, as the one known token."""
    request = Request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=12, seed=1))
    plain, num_steps, _, _ = serve(model, [request])
    run_trunk = PagedModel._run_trunk

    def run_with_nan(self, token_ids):
        hidden = run_trunk(self, token_ids)
        hidden[2:] = torch.nan  # behind the known token and the first guess
        return hidden

    drafter = drafters(plain, [request])["right"]
    with monkeypatch.context() as patch:
        patch.setattr(
            PagedModel, "_run_trunk", lambda self, ids: (run_with_nan if len(ids) > 3 else run_trunk)(self, ids)
        )
        got, num_steps_drafted, num_drafted, num_right = serve(model, [replace(request, block_hashes=[])], drafter)
    assert_equal(got, plain)
    assert num_steps_drafted < num_steps
    assert 0 < num_right < 11
    assert num_drafted > 0


@pytest.mark.usefixtures("whatever_it_costs")
def test_what_another_model_drafts_at_random_keeps_the_distribution(model, draft_models):
    """Chi-square over seeds, of the second token, which was drafted, by all ways to get there."""
    prompt, num_seeds = [9, 30, 5, 61], 1500
    requests = [
        Request(f"{seed}", list(prompt), SamplingParams(temperature=1.0, max_tokens=3, seed=seed))
        for seed in range(num_seeds)
    ]
    drafter = Speculator.of("draft:2", has_draft_model=True)
    got, _, num_drafted, num_right = serve(model, requests, drafter, draft_model=draft_models["another model"])
    assert 0.02 * num_drafted < num_right < 0.9 * num_drafted
    counts = torch.zeros(VOCAB_SIZE)
    for outcome in got.values():
        counts[outcome.token_ids[1]] += 1
    assert is_drawn_from(counts, second_token(tiny_model("qwen3"), prompt))
    assert not is_drawn_from(counts, second_token(tiny_model("llama", num_hidden_layers=1), prompt))


def second_token(model, prompt):
    """Its distribution: [VOCAB_SIZE]."""
    with torch.inference_mode():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        texts = torch.tensor([[*prompt, token_id] for token_id in range(VOCAB_SIZE)])
        return first @ model(texts).logits[:, -1].softmax(-1)


def is_drawn_from(counts, probabilities):
    """False once in some ten thousand times though it is so. Rare tokens are counted together."""
    expected = probabilities * counts.sum()
    is_rare = expected < 5
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is about normal.
    spread = 2 / (9 * (len(counts) - 1))
    return (chi_square / (len(counts) - 1)) ** (1 / 3) < 1 - spread + 3.7 * spread**0.5
