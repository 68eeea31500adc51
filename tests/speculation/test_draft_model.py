"""The model that drafts chases the text of the served one, through prefix hits, preemptions and its own failures."""

from dataclasses import replace

import pytest
import torch
from drafting import BLOCK, Engine, assert_equal, random_requests
from families import VOCAB_SIZE

from nanoserve.model import draft_model as draft_model_module
from nanoserve.model.paged_model import PagedModel
from nanoserve.request import Request, SamplingParams
from nanoserve.speculation.speculator import Speculator

PROMPT = [(7 * i) % VOCAB_SIZE for i in range(30)]


pytestmark = pytest.mark.usefixtures("whatever_it_costs")


def engine_of(model, num_blocks=90):
    """The model drafts for itself: it is right, and its keys and values must be those of the served one."""
    return Engine(model, Speculator.of("draft:3", has_draft_model=True), draft_model=model, num_blocks=num_blocks)


def request(name, prompt=PROMPT, **params):
    return Request(name, list(prompt), SamplingParams(**{"temperature": 0, "max_tokens": 12, "seed": 1} | params))


def watch_passes(monkeypatch, engine):
    """How many tokens each of its passes computes."""
    passes = []
    run = PagedModel.run

    def watch(self, rows, starts, counts):
        if self is engine.runner.draft_model.model:
            passes.append(sum(counts))
        return run(self, rows, starts, counts)

    monkeypatch.setattr(PagedModel, "run", watch)
    return passes


@pytest.mark.parametrize("num_blocks", [90, 40])
def test_blocks_that_it_calls_filled_hold_its_keys_and_values(model, num_blocks):
    """It is the same model, so they are those of the served one; with few blocks sequences are preempted too."""
    engine = engine_of(model, num_blocks)
    engine.serve([r for seed in range(3) for r in renamed(random_requests(20, seed), seed)])
    draft = engine.runner.draft_model
    filled = [block for block, is_filled in enumerate(draft._is_filled) if is_filled]
    assert len(filled) > num_blocks // 3
    for ours, theirs in zip(draft.model.cache.layers, engine.runner.model.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys[filled], theirs.keys[filled], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values[filled], theirs.values[filled], rtol=1e-4, atol=1e-5)


def renamed(requests, seed):
    return [replace(r, id=f"{seed} {r.id}") for r in requests]


def test_a_guess_that_was_wrong_is_computed_over(model, draft_models):
    """What it has of the text is what it would have without any guess."""
    other = draft_models["another model"]
    engine = Engine(model, Speculator.of("draft:3", has_draft_model=True), draft_model=other)
    outcomes = engine.serve([request("0", max_tokens=40, temperature=1.0, top_k=3)])
    assert 0 < engine.num_right < engine.num_drafted
    alone = Engine(other)
    alone.serve([request("0", PROMPT + outcomes["0", 0].token_ids, max_tokens=1)])
    draft = engine.runner.draft_model
    ours, theirs = engine.runner._rows.block_ids[0], alone.runner._rows.block_ids[0]
    num_filled = sum(draft._is_filled[block] for block in ours)
    assert num_filled >= len(PROMPT + outcomes["0", 0].token_ids) // BLOCK - 1
    for a, b in zip(draft.model.cache.layers, alone.runner.model.cache.layers, strict=True):
        torch.testing.assert_close(a.keys[ours[:num_filled]], b.keys[theirs[:num_filled]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values[ours[:num_filled]], b.values[theirs[:num_filled]], rtol=1e-4, atol=1e-5)


def test_it_stops_at_the_end_of_its_own_context(model, draft_models, monkeypatch):
    engine = Engine(model, Speculator.of("draft:3", has_draft_model=True), draft_model=draft_models["a short model"])
    ends = []
    run = PagedModel.run

    def watch(self, rows, starts, counts):
        if self is engine.runner.draft_model.model:
            ends.append(starts[0] + counts[0])
        return run(self, rows, starts, counts)

    monkeypatch.setattr(PagedModel, "run", watch)
    outcomes = engine.serve([request("0", PROMPT[:20], max_tokens=30)])
    assert len(outcomes["0", 0].token_ids) == 30
    assert 28 <= max(ends) <= 30


def test_each_token_is_computed_once(model, monkeypatch):
    engine = engine_of(model)
    passes = watch_passes(monkeypatch, engine)
    engine.serve([request("0")])
    # Behind the prompt and two tokens, three guesses in each step; all of them right, and a fourth token.
    assert passes == [32, 1, 1, 2, 1, 1, 2]
    assert engine.num_right == engine.num_drafted


def test_what_it_has_of_a_prefix_it_does_not_compute_again(model, monkeypatch):
    engine = engine_of(model)
    passes = watch_passes(monkeypatch, engine)
    engine.serve([request("0")])
    passes.clear()
    engine.serve([request("1")])
    assert passes[0] == len(PROMPT) + 1 - len(PROMPT) // BLOCK * BLOCK


def test_what_only_the_served_model_has_of_a_prefix_it_computes(model, monkeypatch):
    engine = engine_of(model)
    passes = watch_passes(monkeypatch, engine)
    engine.serve([request("0", max_draft_tokens=0)])
    assert passes == []
    engine.serve([request("1")])
    assert passes[0] == len(PROMPT) + 1
    assert engine.num_right == engine.num_drafted > 0


def test_blocks_that_others_had_are_not_taken_for_filled(model, monkeypatch):
    engine = engine_of(model, num_blocks=18)
    passes = watch_passes(monkeypatch, engine)
    for i in range(5):
        passes.clear()
        engine.serve([request(f"{i}", [(i + 5 * k) % VOCAB_SIZE for k in range(30)])])
        assert passes[0] > len(PROMPT)
    assert engine.num_right == engine.num_drafted > 0


def test_a_long_text_is_caught_up_with_in_parts(model, monkeypatch):
    monkeypatch.setattr(draft_model_module, "MAX_PASS_TOKENS", 12)
    engine = engine_of(model)
    passes = watch_passes(monkeypatch, engine)
    engine.serve([request("0")])
    # The text grows by a token in each of these steps.
    assert passes[:4] == [12, 12, 10, 1]
    assert engine.num_right == engine.num_drafted > 0


def test_rows_that_need_little_come_first(model, monkeypatch):
    monkeypatch.setattr(draft_model_module, "MAX_PASS_TOKENS", 12)
    engine = engine_of(model)
    passes = watch_passes(monkeypatch, engine)
    engine.serve([request("0"), request("1", PROMPT[:4])])
    assert passes[0] == 12
    assert engine.num_right == engine.num_drafted > 0


def test_the_rest_of_a_pass_may_be_one_token_of_the_longest(model, monkeypatch):
    """Rows with fewer tokens stand before it in the pass, as everywhere."""
    monkeypatch.setattr(draft_model_module, "MAX_PASS_TOKENS", 12)
    plain = Engine(model).serve([request("0", PROMPT[:9]), request("1", PROMPT[:10])])
    engine = engine_of(model)
    all_counts = []
    run = PagedModel.run

    def watch(self, rows, starts, counts):
        all_counts.append(counts)
        return run(self, rows, starts, counts)

    monkeypatch.setattr(PagedModel, "run", watch)
    assert_equal(engine.serve([request("0", PROMPT[:9]), request("1", PROMPT[:10])]), plain)
    assert [1, 11] in all_counts
    assert all(counts == sorted(counts) for counts in all_counts)
    assert engine.num_right == engine.num_drafted > 0


def test_nan_ends_its_guesses_for_the_row_and_nothing_else(model, monkeypatch):
    requests = [request("0"), request("1", PROMPT[::-1])]
    plain = Engine(model).serve(requests)
    engine = engine_of(model)
    run = PagedModel.run

    def run_with_nan(self, rows, starts, counts):
        hidden = run(self, rows, starts, counts)
        if self is engine.runner.draft_model.model and rows[0] == 0:
            hidden[0] = torch.nan
            slot = int(self.facts.slots[0])
            self.cache.layers[0].keys[slot // BLOCK, :, slot % BLOCK] = torch.nan
        return hidden

    monkeypatch.setattr(PagedModel, "run", run_with_nan)
    assert_equal(engine.serve([replace(r, block_hashes=[]) for r in requests]), plain)
    assert engine.num_right == engine.num_drafted > 0
    assert engine.runner.draft_model.room(0) == 0
    for layer in engine.runner.draft_model.model.cache.layers:
        assert layer.keys.isfinite().all()


def test_a_draft_model_that_fails_drafts_no_more_and_serving_goes_on(model, monkeypatch, caplog):
    plain = Engine(model).serve([request("0")])
    engine = engine_of(model)
    run = PagedModel.run

    def fail(self, rows, starts, counts):
        hidden = run(self, rows, starts, counts)
        if self is engine.runner.draft_model.model and starts[0] > 32:
            raise RuntimeError("out of memory")
        return hidden

    monkeypatch.setattr(PagedModel, "run", fail)
    assert_equal(engine.serve([request("0")]), plain)
    assert caplog.text.count("the draft model failed; serving goes on without it") == 1
    assert engine.num_drafted > 0
    engine.serve([request("1")])
    assert caplog.text.count("the draft model failed") == 1
