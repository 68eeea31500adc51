"""Drafts change nothing but the number of steps: requests end with the same tokens, log-probabilities and reasons.

A small random model in float32 behind the real scheduler, cache, runner and sampler. Requests are random, and drafters
are the real ones and some that no sensible person would write.
"""

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from families import VOCAB_SIZE, save_tiny_model

from nanoserve.config import ModelOptions, SchedulerConfig
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.loader import load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.request import DraftSource, Request, SamplingParams, SequenceOutput
from nanoserve.speculation import speculator
from nanoserve.speculation.speculator import Speculator

BLOCK = 4
MAX_CONTEXT = 72
NUM_ROWS = 6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", folder)
    return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


@dataclass
class Outcome:
    """What a caller learns of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    end: tuple | None = None


def serve(model, requests, speculator=None, *, num_blocks=90, cancelled=()):
    """Outcomes by (request, index), the number of steps, and the drafts that were computed and that were right.

    cancelled: ids of requests that are aborted when they have made a few tokens.
    """
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=NUM_ROWS, max_num_batched_tokens=64),
        pool,
        block_size=BLOCK,
        max_context_tokens=MAX_CONTEXT,
        cache_identity="model",
    )
    cache = PagedKVCache(model.kv_specs, num_blocks, BLOCK, model.device)
    sampler = Sampler(model.facts.vocab_size, model.device)
    runner = ModelRunner(model, cache, sampler, NUM_ROWS, 64, MAX_CONTEXT, speculator=speculator)
    for request in requests:
        scheduler.add(request)
    outcomes: dict[tuple[str, int], Outcome] = {}
    num_steps = num_drafted = num_right = 0
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        runner.submit(plan)
        result = runner.collect()
        num_steps += 1
        num_drafted += sum(r.num_drafted for r in result.sequences)
        num_right += sum(max(0, len(r.token_ids) - 1) for r in result.sequences)
        for event in scheduler.commit(result, 0.0):
            if isinstance(event, SequenceOutput):
                outcome = outcomes.setdefault((event.request_id, event.index), Outcome())
                outcome.token_ids += event.token_ids
                outcome.logprobs += event.logprobs
                outcome.prompt_logprobs += event.prompt_logprobs
                if event.finish_reason is not None:
                    outcome.end = event.finish_reason, event.stop_token_id
                if event.request_id in cancelled and len(outcome.token_ids) > 3:
                    scheduler.abort(event.request_id)
        scheduler.check_invariants()
    assert pool.num_owned == 0
    return outcomes, num_steps, num_drafted, num_right


def random_requests(count, seed):
    """Prompts that repeat themselves, and parameters of every kind."""
    chance = random.Random(seed)
    requests = []
    for i in range(count):
        words = [[chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randint(1, 6))] for _ in range(3)]
        prompt = [t for _ in range(chance.randint(1, 8)) for t in chance.choice(words)][: MAX_CONTEXT - 2]
        room = MAX_CONTEXT - len(prompt)
        max_tokens = chance.choice([1, 2, 7, 30, room])
        params = SamplingParams(
            n=chance.choice([1, 1, 1, 4]),
            temperature=chance.choice([0, 0, 0.3, 1.0, 2.0]),
            top_k=chance.choice([0, 0, 3]),
            top_p=chance.choice([1.0, 0.8]),
            min_p=chance.choice([0.0, 0.1]),
            frequency_penalty=chance.choice([0.0, 0.0, 0.7]),
            presence_penalty=chance.choice([0.0, 0.0, -0.5]),
            repetition_penalty=chance.choice([1.0, 1.0, 1.3]),
            logit_bias=chance.choice([{}, {5: 4.0, 90: -100.0}]),
            seed=chance.randrange(2**32),
            max_tokens=max_tokens,
            min_tokens=chance.choice([0, min(5, max_tokens, room)]),
            stop_token_ids=frozenset(chance.choice([[], [7, 11], range(3, 40, 5)])),
            logprobs=chance.choice([None, 0, 3]),
            prompt_logprobs=chance.choice([None, None, 1]),
            max_draft_tokens=chance.choice([None, None, 0, 3]),
        )
        eos = frozenset(chance.choice([[], [2]]))
        requests.append(Request(f"{i}", prompt, params, eos_token_ids=eos, priority=chance.choice([0, 0, 1])))
    return requests


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

    def choose(self, places, num_tokens):  # noqa: ARG002
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


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for key, outcome in want.items():
        assert got[key].token_ids == outcome.token_ids, key
        assert got[key].end == outcome.end, key
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(got[key], name), getattr(outcome, name)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
                assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


NAMES = ("right", "half right", "wrong", "random", "no such token", "endless", "ngram", "suffix", "auto", "prediction")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("num_blocks", [90, 40])
def test_drafts_change_no_output(model, name, count, num_blocks, monkeypatch):
    """With few blocks sequences are preempted too."""
    # Whatever it costs: with a model of this size no draft pays.
    monkeypatch.setattr(speculator, "may_pay", lambda _times, _num, most: most > 0)
    monkeypatch.setattr(speculator, "choose_counts", lambda _times, _num, chances: [length for _, length in chances])
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


def test_a_guess_that_makes_a_nan_is_dropped_and_nothing_else(model, monkeypatch):
    """Even one that is right: the next step computes it again, as the one known token."""
    request = Request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=12, seed=1))
    plain, num_steps, _, _ = serve(model, [request])
    run_trunk = ModelRunner._run_trunk

    def run_with_nan(self, token_ids):
        hidden = run_trunk(self, token_ids)
        hidden[2:] = torch.nan  # behind the known token and the first guess
        return hidden

    drafter = drafters(plain, [request])["right"]
    with monkeypatch.context() as patch:
        patch.setattr(
            ModelRunner, "_run_trunk", lambda self, ids: (run_with_nan if len(ids) > 3 else run_trunk)(self, ids)
        )
        got, num_steps_drafted, num_drafted, num_right = serve(model, [replace(request, block_hashes=[])], drafter)
    assert_equal(got, plain)
    assert num_steps_drafted < num_steps
    assert 0 < num_right < 11
    assert num_drafted > 0
