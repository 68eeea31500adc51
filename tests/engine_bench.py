"""An engine over simulated KV memory, whose tokens are bytes."""

import asyncio
import contextlib
import threading

from fake_executor import FakeExecutor, right_drafts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanoserve.config import SchedulerConfig
from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.dialect.formats import Dialect, call_format, reasoning_format
from nanoserve.engine.core import EngineCore
from nanoserve.engine.detokenizer import _ByteLevel
from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.engine.scheduler import Scheduler
from nanoserve.engine.text import TextCodec
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.request import SamplingParams

BLOCK = 4
VOCAB = 256
PROMPT = list(b"once upon")
SECONDS = 20


def two_right_drafts(token_ids, seed):
    """Three, of which the first two are right. Of six tokens the first step gives one, the second three of three
    guesses, the third two of the one guess that has a place: four guesses, and three of them right."""
    return [*right_drafts(token_ids, seed, 2, VOCAB), VOCAB]


class GatedExecutor(FakeExecutor):
    """Waits before each step while the gate is shut; raises on demand."""

    def __init__(self, slots=None):
        super().__init__(BLOCK, VOCAB, slots=slots)
        self.gate = threading.Event()
        self.gate.set()
        self.is_broken = False
        self._permits = None
        self.num_begun = 0

    def count_steps(self):
        """From now on each step waits for a release of this semaphore."""
        self._permits = threading.Semaphore(0)
        return self._permits

    def execute(self, plan):
        self.num_begun += 1
        assert self.gate.wait(SECONDS)
        assert self._permits is None or self._permits.acquire(timeout=SECONDS)
        if self.is_broken:
            raise RuntimeError("broken")
        return super().execute(plan)


def byte_codec():
    """Token i is byte i; no chat template."""
    tokenizer = Tokenizer(models.BPE(dict(_ByteLevel.BYTES), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


class Bench:
    def __init__(
        self,
        *,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        batching="continuous",
        max_waiting=8,
        num_blocks=64,
        eos=(),
        step_timeout_s=60.0,
        observers=None,
        adapters=None,
        slots=None,
        adapter_folders=None,
    ):
        """adapters: a ServedAdapters that writes into slots, and reads from adapter_folders."""
        self.executor = GatedExecutor(slots)
        self.pool = BlockPool(num_blocks)
        max_context_tokens = min(128, num_blocks * BLOCK)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, batching=batching
            ),
            self.pool,
            block_size=BLOCK,
            max_context_tokens=max_context_tokens,
            cache_identity="model",
            adapters=adapters,
        )
        self.codec = byte_codec()
        self.compiler = ConstraintCompiler(lambda: self.codec.vocabulary(VOCAB, eos))
        self.core = EngineCore(self.scheduler, self.executor, self.compiler)
        model = ServedModel(
            "fake",
            0.0,
            max_context_tokens,
            VOCAB,
            tuple(eos),
            SamplingParams(),
            self.scheduler.block_names,
            max_draft_tokens=16,
            draft_sources=(),
            draft_model="",
            dialect=Dialect(reasoning_format("qwen3"), call_format("hermes")),
            adapter_folders=adapter_folders,
        )
        limits = {"max_waiting": max_waiting, "step_timeout_s": step_timeout_s}
        self.engine = Engine(self.core, self.codec, model, **limits, observers=observers)
        self.engine.start()

    async def collect(self, prompt=PROMPT, *, request=None, **params):
        options = {"seed": 7, "max_tokens": 6, **params}
        return [e async for e in self.engine.generate(prompt, SamplingParams(**options), **(request or {}))]

    async def until_free(self):
        async with asyncio.timeout(SECONDS):
            while self.engine.stats().scheduler.num_owned_blocks or self.scheduler.has_work:
                await asyncio.sleep(0.005)
        self.scheduler.check_invariants()


@contextlib.asynccontextmanager
async def running(**options):
    bench = Bench(**options)
    try:
        yield bench
    finally:
        bench.executor.gate.set()
        await bench.engine.close()
