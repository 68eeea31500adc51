"""The test that matters most: under every kind of schedule the logits are those of transformers' own forward.

Scheduler, block pool, runner and paged attention run together, for each architecture, with small random models in
float32. Tokens are drawn, not greedy: the greedy text of a random model soon repeats itself, and would hide a stale
cache. The sampler is watched, and each row of logits that it got is compared with transformers' forward over the whole
sequence, so a wrong key or value of any earlier position shows. Where there is a CUDA device, it is tried too.
"""

import random

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, tiny_model

from nanoserve.config import ModelOptions, SchedulerConfig
from nanoserve.engine.scheduler import Scheduler
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.loader import fix_rope, load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.request import Request, RequestStarted, SamplingParams, SequenceOutput

BLOCK = 4
NUM_NEW = 14
MAX_CONTEXT = LONGEST + 2 * NUM_NEW
# Of the largest logit. Rounding gives about 1e-6; a wrong position or a missing token gives 1e-2 and more.
TOLERANCE = 3e-5


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


class WatchedSampler(Sampler):
    """Keeps the logits that each draw was made from, by (seed of the sequence, position)."""

    def __init__(self, device):
        super().__init__(VOCAB_SIZE, device)
        self.seeds = {}
        self.logits = {}

    def admit(self, row, admission):
        self.seeds[row] = admission.seed
        super().admit(row, admission)

    def sample(self, places, logits):
        for place, values in zip(places, logits, strict=True):
            self.logits[self.seeds[place.row], place.position] = values.cpu()
        return super().sample(places, logits)


class Serving:
    """A scheduler and a real model, stepped by hand."""

    def __init__(self, loaded, *, num_blocks=100, budget=256, cache=True):
        self.pool = BlockPool(num_blocks, keep_cached=cache)
        config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=budget)
        self.scheduler = Scheduler(
            config,
            self.pool,
            block_size=BLOCK,
            max_context_tokens=MAX_CONTEXT,
            cache_identity=loaded.facts.fingerprint,
        )
        self.sampler = WatchedSampler(loaded.device)
        kv = PagedKVCache(loaded.kv_specs, num_blocks, BLOCK, loaded.device)
        self.runner = ModelRunner(loaded, kv, self.sampler, 6, budget, MAX_CONTEXT)
        self.events = []
        self.requests = {}

    def add(self, prompt, **params):
        request_id = str(len(self.requests))
        # Seeds far apart: each sequence of a request takes the next one.
        sampling = SamplingParams(temperature=1.0, max_tokens=NUM_NEW, seed=100 * (len(self.requests) + 1), **params)
        self.requests[request_id] = Request(request_id, prompt, sampling)
        self.scheduler.add(self.requests[request_id])
        return request_id

    def step(self):
        self.runner.submit(self.scheduler.schedule(0.0))
        self.events += self.scheduler.commit(self.runner.collect(), 0.0)
        self.scheduler.check_invariants()

    def run(self):
        while self.scheduler.has_work:
            self.step()
        return self

    def outputs(self, request_id, index=0):
        return [
            e for e in self.events if isinstance(e, SequenceOutput) and (e.request_id, e.index) == (request_id, index)
        ]

    def cached_tokens(self, request_id):
        [started] = [e for e in self.events if isinstance(e, RequestStarted) and e.request_id == request_id]
        return started.num_cached_tokens

    def check(self, reference):
        """Compare every draw's logits, and every prompt log-probability, with the reference model."""
        for request_id, request in self.requests.items():
            for index in range(request.params.n):
                outputs = self.outputs(request_id, index)
                completion = [t for o in outputs for t in o.token_ids]
                assert len(completion) == NUM_NEW
                sequence = request.prompt_token_ids + completion
                expected = reference_logits(reference, sequence)
                seed, start = request.params.seed + index, len(request.prompt_token_ids)
                ours = torch.stack([self.sampler.logits[seed, p] for p in range(start, len(sequence))])
                assert_close(ours, expected[start - 1 : -1])
                self.check_prompt(outputs, request, expected)

    def check_prompt(self, outputs, request, expected):
        reported = [p for o in outputs for p in o.prompt_logprobs]
        wants = request.params.prompt_logprobs is not None and outputs[0].index == 0
        assert len(reported) == (len(request.prompt_token_ids) - 1 if wants else 0)
        logprobs = expected.log_softmax(-1)
        for position, entry in enumerate(reported):
            assert entry.token_id == request.prompt_token_ids[position + 1]
            for each in (entry, *entry.top):
                assert each.logprob == pytest.approx(float(logprobs[position, each.token_id]), abs=2e-3)


def reference_logits(model, sequence):
    """[len(sequence), vocab]"""
    with torch.inference_mode():
        return model(torch.tensor([sequence]), use_cache=False).logits[0]


def assert_close(ours, expected):
    error = (ours - expected).abs().amax(-1) / expected.abs().max()
    assert float(error.max()) < TOLERANCE, f"largest error at each position: {error.tolist()}"


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, device, tmp_path_factory):
    """(transformers' model on the CPU, the same weights as they are served)"""
    folder = tmp_path_factory.mktemp(request.param)
    reference = tiny_model(request.param)
    reference.save_pretrained(folder)
    loaded = load_model(ModelOptions(path=str(folder), dtype="float32", device=device))
    # Where the frequencies depend on length, the server uses those of the longest context for every sequence.
    fix_rope(reference, MAX_CONTEXT)
    return reference, loaded


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def test_one_shot_prompts_of_mixed_lengths(family):
    reference, loaded = family
    serving = Serving(loaded)
    for prompt in prompts_of(LONGEST, 3, 1, 24):
        serving.add(prompt, prompt_logprobs=3)
    serving.run().check(reference)


def test_chunked_prompts_beside_sequences_that_generate(family):
    reference, loaded = family
    serving = Serving(loaded, budget=7)
    first, *others = prompts_of(5, LONGEST, 18, seed=1)
    serving.add(first, prompt_logprobs=0)
    serving.step()
    for prompt in others:
        serving.add(prompt, prompt_logprobs=2)
    serving.run().check(reference)


def test_prefixes_from_the_cache_and_shared_by_the_sequences_of_a_request(family):
    reference, loaded = family
    serving = Serving(loaded, budget=20)
    long, short, other = prompts_of(LONGEST, 9, 6, seed=2)
    serving.add(long)
    serving.add(short)
    serving.run()
    hit = serving.add(long[:40] + other, n=2)
    follow_up = serving.add(short + [t for o in serving.outputs("1") for t in o.token_ids] + other)
    serving.run().check(reference)
    assert serving.cached_tokens(hit) == 40
    assert serving.cached_tokens(follow_up) == (9 + NUM_NEW - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("cache", [True, False])
def test_preempted_sequences_resume(family, cache):
    reference, loaded = family
    # One sequence of the longest context fits; three together do not.
    serving = Serving(loaded, num_blocks=-(-MAX_CONTEXT // BLOCK) + 4, budget=16, cache=cache)
    for prompt in prompts_of(30, 26, 28, seed=3):
        serving.add(prompt, prompt_logprobs=1)
    serving.run().check(reference)
    assert serving.scheduler.stats().num_preemptions > 0
