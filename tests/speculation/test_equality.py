"""Drafts change nothing but the number of steps: requests end with the same tokens, log-probabilities and reasons.

A small random model in float32 behind the real scheduler, cache, runner and sampler. Requests are random, and drafters
are the real ones and some that no sensible person would write.
"""

import random
from dataclasses import replace

import pytest
import torch
from drafting import assert_equal, random_requests, serve
from families import VOCAB_SIZE, save_tiny_model

from nanoserve.config import ModelOptions
from nanoserve.model.loader import load_model
from nanoserve.model.paged_model import PagedModel
from nanoserve.request import DraftSource, Request, SamplingParams
from nanoserve.speculation import speculator
from nanoserve.speculation.speculator import Speculator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", folder)
    return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def draft_models(tmp_path_factory, model):
    """Models that draft: the same, another of as many tokens, one of fewer, and one whose context ends early."""

    def load(name, family, **changes):
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(family, folder, **changes)
        return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))

    return {
        "itself": model,
        "another model": load("other", "llama", num_hidden_layers=1),
        "a narrower model": load("narrow", "llama", vocab_size=VOCAB_SIZE - 10),
        "a wider model": load("wide", "llama", vocab_size=VOCAB_SIZE + 10),
        "a short model": load("short", "llama", max_position_embeddings=30),
    }


class Scripted:
    """Takes a Speculator's place, and drafts what a function says of row and text; all of it, whatever it costs."""

    def __init__(self, draft):
        self._draft = draft
        self._texts = {}

    def admit(self, row, admission):
        self._texts[row] = admission, list(admission.token_ids)

    def extend(self, row, token_ids):
        self._texts[row][1].extend(token_ids)

    def _next(self, row):
        admission, text = self._texts[row]
        return [] if admission.params.max_draft_tokens == 0 else self._draft(admission, text)

    def num_places(self, row):
        return len(self._next(row))

    def choose(self, places, num_tokens, model):  # noqa: ARG002
        return {row: self._next(row)[:room] for row, room in places.items() if room}

    def learn(self, row, num_tried, num_right):  # noqa: ARG002
        return DraftSource.NGRAM

    def add_step(self, num_tokens, num_drafted, seconds):
        pass


def drafters(plain, requests):
    """Of every character."""
    texts = {
        (request.params.seed + index) % 2**64: request.prompt_token_ids + plain[request.id, index].token_ids
        for request in requests
        for index in range(request.params.n)
        if (request.id, index) in plain
    }

    def right(admission, text):
        return texts.get(admission.seed, [])[len(text) : len(text) + 9]

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


NAMES = ("right", "half right", "wrong", "random", "no such token", "endless", "ngram", "suffix", "auto", "prediction")
MODELS = ("itself", "another model", "a narrower model", "a wider model", "a short model")


@pytest.fixture
def whatever_it_costs(monkeypatch):
    """With a model of this size no draft pays."""
    monkeypatch.setattr(speculator, "may_pay", lambda _times, _num, most: most > 0)
    monkeypatch.setattr(speculator, "choose_counts", lambda _times, _num, chances: list(map(len, chances)))
    monkeypatch.setattr(speculator, "may_guess_more", lambda *others: any(prospect.room for prospect in others[-1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("num_blocks", [90, 40])
@pytest.mark.usefixtures("whatever_it_costs")
def test_drafts_change_no_output(model, name, count, num_blocks):
    """With few blocks sequences are preempted too."""
    requests = random_requests(count, seed=count)
    plain, num_steps, num_drafted, _ = serve(model, requests, num_blocks=num_blocks)
    assert num_drafted == 0
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
@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("num_blocks", [90, 40])
@pytest.mark.usefixtures("whatever_it_costs")
def test_a_model_that_drafts_changes_no_output(model, draft_models, name, count, num_blocks):
    """And one that would say the same is right every time, at any temperature: it draws with the same noise."""
    requests = random_requests(count, seed=count)
    plain, num_steps, _, _ = serve(model, requests, num_blocks=num_blocks)
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
