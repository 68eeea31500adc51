"""Requests of every kind through the real scheduler, cache, runner and sampler, with drafts or without."""

import random
from dataclasses import dataclass, field

import pytest
from constrained import COMPILER
from families import VOCAB_SIZE

from nanoserve.config import SchedulerConfig
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.request import DraftSource, Request, RequestFailed, RequestStarted, SamplingParams, SequenceOutput

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
    satisfies: bool = False

    def add(self, output):
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None:
            self.end = output.finish_reason, output.stop_token_id
            self.satisfies = output.satisfies


class Engine:
    """A scheduler and a runner, stepped by hand. Counts steps, drafts, and those that were right."""

    def __init__(self, model, speculator=None, *, draft_model=None, num_blocks=90, adapters=None, slots=None):
        """adapters: those that are served, and slots of the model for them."""
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=NUM_ROWS, max_num_batched_tokens=64),
            self.pool,
            block_size=BLOCK,
            max_context_tokens=MAX_CONTEXT,
            cache_identity="model",
            adapters=adapters,
        )
        cache = PagedKVCache(model.kv_specs, num_blocks, BLOCK, model.device)
        sampler = Sampler(model.facts.vocab_size, model.device)
        draft = None
        if draft_model is not None:
            draft = draft_model, PagedKVCache(draft_model.kv_specs, num_blocks, BLOCK, model.device)
        self.runner = ModelRunner(
            *(model, cache, sampler, NUM_ROWS, 64, MAX_CONTEXT), speculator=speculator, draft=draft, adapters=slots
        )
        self.num_steps = self.num_drafted = self.num_right = 0
        self.failures = {}
        # Tokens of prompts whose blocks were there.
        self.num_cached = 0
        self.num_worn = 0

    def step(self):
        """One step's events. A step takes a second of the scheduler's clock."""
        now = float(self.num_steps)
        plan = self.scheduler.schedule(now)
        if not plan.sequences:
            return self.scheduler.settle(now)
        self.runner.submit(plan)
        result = self.runner.collect()
        self.num_steps += 1
        self.num_drafted += sum(r.num_drafted for r in result.sequences)
        self.num_right += sum(max(0, len(r.token_ids) - 1) for r in result.sequences)
        events = self.scheduler.commit(result, now)
        for sequence in self.scheduler.take_worn():
            self.num_worn += 1
            self.scheduler.await_grammar(sequence, COMPILER.submit(sequence.request.constraint), 1e9)
        self.compile()
        self.scheduler.check_invariants()
        return events

    def compile(self):
        """Wait for the constraints of all requests, so that they are queued in the order of their arrival."""
        for future, _ in self.scheduler._compiling.values():
            future.exception()
        self.scheduler.keep_time(0.0)

    def serve(self, requests, cancelled=(), before_step=lambda _: None):
        """Outcomes by (request, index). cancelled: ids of requests that are aborted after a few tokens.

        before_step: called with the number of steps so far.
        """
        for request in requests:
            grammar = None if request.constraint is None else COMPILER.submit(request.constraint)
            self.scheduler.add(request, grammar, 1e9)
        self.compile()
        outcomes: dict[tuple[str, int], Outcome] = {}
        while self.scheduler.has_work or self.scheduler.is_awaiting:
            before_step(self.num_steps)
            for event in self.step():
                if isinstance(event, RequestFailed):
                    self.failures[event.request_id] = event.reason
                if isinstance(event, RequestStarted):
                    self.num_cached += event.num_cached_tokens
                if isinstance(event, SequenceOutput):
                    outcome = outcomes.setdefault((event.request_id, event.index), Outcome())
                    outcome.add(event)
                    if event.request_id in cancelled and len(outcome.token_ids) > 3:
                        self.scheduler.abort(event.request_id)
        assert self.pool.num_owned == 0
        return outcomes


def serve(model, requests, speculator=None, *, draft_model=None, num_blocks=90, cancelled=()):
    """Outcomes by (request, index), the number of steps, and the drafts that were computed and that were right."""
    engine = Engine(model, speculator, draft_model=draft_model, num_blocks=num_blocks)
    outcomes = engine.serve(requests, cancelled)
    return outcomes, engine.num_steps, engine.num_drafted, engine.num_right


def random_requests(count, seed, constraints=(None,)):
    """Prompts that repeat themselves, and parameters of every kind. constraints: of which each has one."""
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
            max_reasoning_tokens=chance.choice([None, None, 0, 1, 5, 12]),
        )
        eos = frozenset(chance.choice([[], [2]]))
        priority, constraint = chance.choice([0, 0, 1]), constraints[i % len(constraints)]
        requests.append(Request(f"{i}", prompt, params, eos, priority, constraint=constraint))
    return requests


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for key, outcome in want.items():
        assert got[key].token_ids == outcome.token_ids, key
        assert got[key].end == outcome.end, key
        assert got[key].satisfies == outcome.satisfies, key
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(got[key], name), getattr(outcome, name)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
                assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


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

    def choose(self, places, num_tokens, model, guide):  # noqa: ARG002
        return {row: self._next(row)[:room] for row, room in places.items() if room}

    def learn(self, row, num_tried, num_right):  # noqa: ARG002
        return DraftSource.NGRAM

    def add_step(self, num_tokens, num_drafted, seconds):
        pass


def right_drafts(plain, requests, count=9):
    """What will come: at most so many tokens."""
    texts = {
        (request.params.seed + index) % 2**64: request.prompt_token_ids + plain[request.id, index].token_ids
        for request in requests
        for index in range(request.params.n)
        if (request.id, index) in plain
    }
    return lambda admission, text: texts.get(admission.seed, [])[len(text) : len(text) + count]
