"""Where drafts meet an end: of a request, of its context, of its stay in the cache. The text is that without drafts."""

from dataclasses import replace

import pytest
from drafting import BLOCK, MAX_CONTEXT, Engine, Scripted, assert_equal, random_requests, right_drafts, serve
from families import VOCAB_SIZE

from nanoserve.request import FinishReason, Request, SamplingParams

PROMPT = [(5 * i + 3) % VOCAB_SIZE for i in range(10)]


def request(name="0", prompt=PROMPT, **changes):
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 20, "seed": 3} | changes)
    return Request(name, list(prompt), params)


def again(requests):
    return [replace(each, block_hashes=[]) for each in requests]


def served_with_drafts(model, requests, count=9, **options):
    """The same without drafts, and with drafts that are right."""
    plain, num_steps, _, _ = serve(model, again(requests), **options)
    drafter = Scripted(right_drafts(plain, requests, count))
    got, num_steps_drafted, num_drafted, num_right = serve(model, again(requests), drafter, **options)
    assert_equal(got, plain)
    return plain, num_steps, num_steps_drafted, num_drafted, num_right


@pytest.mark.parametrize(("max_tokens", "num_steps"), [(0, 1), (1, 1), (2, 2), (3, 2), (11, 2), (12, 3)])
def test_max_tokens(model, max_tokens, num_steps):
    """The first step makes one token, each further one up to nine that were guessed, and one more."""
    plain, _, num_steps_drafted, _, _ = served_with_drafts(model, [request(max_tokens=max_tokens)])
    assert len(plain["0", 0].token_ids) == max_tokens
    assert num_steps_drafted == num_steps


@pytest.mark.parametrize("num_left", [1, 2, 3, 10, 11])
def test_the_end_of_the_context(model, num_left):
    prompt = [(5 * i + 3) % VOCAB_SIZE for i in range(MAX_CONTEXT - num_left)]
    plain, _, _, num_drafted, num_right = served_with_drafts(model, [request(prompt=prompt, max_tokens=None)])
    assert len(plain["0", 0].token_ids) == num_left
    assert plain["0", 0].end == (FinishReason.CONTEXT, None)
    # One token is drawn from the prompt, one behind the drafts.
    assert num_drafted == num_right == max(0, num_left - 2)


@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("is_eos", [True, False])
def test_a_stop_at_each_place_of_a_draft(model, place, is_eos):
    """The first token is no draft's, the eleventh the one behind it."""
    plain, _, _, _ = serve(model, [request()])
    token_ids = plain["0", 0].token_ids
    stop = token_ids[place]
    stopping = request() if is_eos else request(stop_token_ids=frozenset([stop]))
    if is_eos:
        stopping = replace(stopping, eos_token_ids=frozenset([stop]))
    drafter = Scripted(right_drafts(plain, [request()]))
    got, _, _, _ = serve(model, [stopping], drafter)
    # Before min_tokens nothing is ruled out here, so the text is the same up to its first such token.
    end = token_ids.index(stop) + 1
    assert got["0", 0].token_ids == token_ids[:end]
    assert got["0", 0].end == (FinishReason.EOS if is_eos else FinishReason.STOP, stop)


def test_drafts_that_are_longer_than_blocks(model):
    _, num_steps, num_steps_drafted, _, _ = served_with_drafts(model, [request(max_tokens=50)], count=5 * BLOCK + 1)
    assert num_steps_drafted <= 4 < num_steps


def test_each_of_n_has_drafts_of_its_own(model):
    plain, num_steps, num_steps_drafted, num_drafted, num_right = served_with_drafts(model, [request(n=4)])
    assert len({tuple(outcome.token_ids) for outcome in plain.values()}) == 4
    assert num_drafted == num_right
    assert num_steps_drafted < num_steps / 3


def neighbours():
    return [request("a", max_tokens=30), request("b", PROMPT[::-1], max_tokens=30, seed=8, n=2)]


@pytest.mark.parametrize("step", range(10))
def test_a_request_that_is_cancelled_at_any_step(model, step):
    requests = neighbours()
    plain, _, _, _ = serve(model, again(requests))
    engine = Engine(model, Scripted(right_drafts(plain, requests, count=3)))

    def cancel(num_steps):
        if num_steps == step:
            engine.scheduler.abort("b")

    got = engine.serve(again(requests), before_step=cancel)
    assert_equal({key: got[key] for key in got if key[0] == "a"}, {("a", 0): plain["a", 0]})
    for key in got.keys() - {("a", 0)}:
        assert got[key].token_ids == plain[key].token_ids[: len(got[key].token_ids)]


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("is_soft", [True, False])
def test_a_deadline_at_any_step(model, step, is_soft):
    requests = neighbours()
    plain, _, _, _ = serve(model, again(requests))
    engine = Engine(model, Scripted(right_drafts(plain, requests, count=3)))
    limit = {"time_limit_s" if is_soft else "deadline_s": float(step)}
    got = engine.serve([again(requests)[0], replace(again(requests)[1], **limit)])
    assert_equal({("a", 0): got["a", 0]}, {("a", 0): plain["a", 0]})
    for key in got.keys() - {("a", 0)}:
        assert got[key].token_ids == plain[key].token_ids[: len(got[key].token_ids)]
        if is_soft:
            assert got[key].end[0] in (FinishReason.TIME_LIMIT, plain[key].end[0])


@pytest.mark.parametrize("step", range(1, 9))
def test_a_preemption_at_any_step(model, step):
    """Somebody more urgent takes all blocks at once, in the middle of drafts."""
    requests = neighbours()
    urgent = replace(request("urgent", [7] * 50, max_tokens=6), priority=9)
    plain, _, _, _ = serve(model, [*again(requests), *again([urgent])])
    drafter = Scripted(right_drafts(plain, [*requests, urgent], count=3))
    engine = Engine(model, drafter, num_blocks=MAX_CONTEXT // BLOCK)

    def interrupt(num_steps):
        if num_steps == step:
            engine.scheduler.add(again([urgent])[0])

    got = engine.serve(again(requests), before_step=interrupt)
    assert_equal(got, plain)
    assert engine.scheduler.stats().num_preemptions > 0


def test_cancellations_among_many(model):
    requests = random_requests(40, seed=5)
    plain, _, _, _ = serve(model, again(requests))
    cancelled = {each.id for each in requests[::4]}
    drafter = Scripted(right_drafts(plain, requests, count=3))
    got, _, _, _ = serve(model, again(requests), drafter, num_blocks=40, cancelled=cancelled)
    kept = {key for key in plain if key[0] not in cancelled}
    assert_equal({key: got[key] for key in kept}, {key: plain[key] for key in kept})
    for key in got.keys() - kept:
        assert got[key].token_ids == plain[key].token_ids[: len(got[key].token_ids)]
