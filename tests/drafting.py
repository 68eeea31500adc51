"""Requests of every kind through the real scheduler, cache, runner and sampler, with drafts or without."""

import random
from dataclasses import dataclass, field

import pytest
from families import VOCAB_SIZE

from nanoserve.config import SchedulerConfig
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.request import Request, SamplingParams, SequenceOutput

BLOCK = 4
MAX_CONTEXT = 72
NUM_ROWS = 6
TOLERANCE = 1e-5


@dataclass
class Outcome:
    """What a caller learns of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    end: tuple | None = None


class Engine:
    """A scheduler and a runner, stepped by hand. Counts steps, drafts, and those that were right."""

    def __init__(self, model, speculator=None, *, draft_model=None, num_blocks=90):
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=NUM_ROWS, max_num_batched_tokens=64),
            self.pool,
            block_size=BLOCK,
            max_context_tokens=MAX_CONTEXT,
            cache_identity="model",
        )
        cache = PagedKVCache(model.kv_specs, num_blocks, BLOCK, model.device)
        sampler = Sampler(model.facts.vocab_size, model.device)
        draft = None
        if draft_model is not None:
            draft = draft_model, PagedKVCache(draft_model.kv_specs, num_blocks, BLOCK, model.device)
        self.runner = ModelRunner(model, cache, sampler, NUM_ROWS, 64, MAX_CONTEXT, speculator=speculator, draft=draft)
        self.num_steps = self.num_drafted = self.num_right = 0

    def step(self):
        """One step's events."""
        self.runner.submit(self.scheduler.schedule(0.0))
        result = self.runner.collect()
        self.num_steps += 1
        self.num_drafted += sum(r.num_drafted for r in result.sequences)
        self.num_right += sum(max(0, len(r.token_ids) - 1) for r in result.sequences)
        events = self.scheduler.commit(result, 0.0)
        self.scheduler.check_invariants()
        return events

    def serve(self, requests, cancelled=()):
        """Outcomes by (request, index). cancelled: ids of requests that are aborted after a few tokens."""
        for request in requests:
            self.scheduler.add(request)
        outcomes: dict[tuple[str, int], Outcome] = {}
        while self.scheduler.has_work:
            for event in self.step():
                if isinstance(event, SequenceOutput):
                    outcome = outcomes.setdefault((event.request_id, event.index), Outcome())
                    outcome.token_ids += event.token_ids
                    outcome.logprobs += event.logprobs
                    outcome.prompt_logprobs += event.prompt_logprobs
                    if event.finish_reason is not None:
                        outcome.end = event.finish_reason, event.stop_token_id
                    if event.request_id in cancelled and len(outcome.token_ids) > 3:
                        self.scheduler.abort(event.request_id)
        assert self.pool.num_owned == 0
        return outcomes


def serve(model, requests, speculator=None, *, draft_model=None, num_blocks=90, cancelled=()):
    """Outcomes by (request, index), the number of steps, and the drafts that were computed and that were right."""
    engine = Engine(model, speculator, draft_model=draft_model, num_blocks=num_blocks)
    outcomes = engine.serve(requests, cancelled)
    return outcomes, engine.num_steps, engine.num_drafted, engine.num_right


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
