"""The composition root: closes every "auto", makes the parts and ties them together.

Read this to see what the server is made of. It is the only module that knows both the engine and the model side.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanoserve.config import BUILTIN_MODEL, BUILTIN_MODEL_NAME, ConfigError, Options, format_size
from nanoserve.engine.core import EngineCore
from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.engine.scheduler import Scheduler
from nanoserve.engine.text import TextCodec
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import KVPlan, PagedKVCache, available_memory, plan_kv
from nanoserve.model.compiled import BackgroundCompiler
from nanoserve.model.facts import ModelFacts
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.model.threads import ComputeThreads, one_thread, release_threads, usable_cpus
from nanoserve.model.torch_internals import watching_bars
from nanoserve.request import Fact, Report, Stage
from nanoserve.speculation.speculator import Speculator

logger = logging.getLogger(__name__)


def log_facts(said: Stage | Fact) -> None:
    """The Report of whoever has no other."""
    if isinstance(said, Fact):
        logger.info("%s: %s", said.name, said.value)


@dataclass(frozen=True, slots=True)
class Built:
    """A step loop that is warm but not started, and what the rest of the server must have of its model."""

    core: EngineCore
    codec: TextCodec
    model: ServedModel


def build_engine(options: Options, *, wait_until_fast: bool = False, report: Report = log_facts) -> Engine:
    """An engine in this process, warm but not started. Raises ConfigError; see build_core."""
    built = build_core(options, wait_until_fast=wait_until_fast, report=report)
    return Engine(
        built.core,
        built.codec,
        built.model,
        max_waiting=options.scheduler.max_waiting,
        step_timeout_s=options.server.step_timeout_s,
    )


def build_core(options: Options, *, wait_until_fast: bool = False, report: Report = log_facts) -> Built:
    """Load the model and build what runs its steps. Takes as long as the model does.

    On a CPU, parts of the model are compiled and memory is claimed behind the back of the running engine, or first,
    which takes up to a minute the first time. Raises ConfigError, whose one line says what to do.
    """

    def say(share: float) -> None:
        report(Stage("reading the weights", share) if share < 1 else Stage("preparing the layers"))

    report(Stage("reading the model"))
    try:
        with watching_bars(say), one_thread():
            model = load_model(options.model)
        codec = TextCodec.load(model.facts.folder, trust_remote_code=options.model.trust_remote_code)
        return assemble(model, codec, options, wait_until_fast=wait_until_fast, report=report)
    except SafetensorError as error:
        raise ConfigError(f"a checkpoint file in {options.model.path} cannot be read: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the device has too little memory: {error}; lower --kv-memory, or serve less") from error


def assemble(
    model: LoadedModel,
    codec: TextCodec,
    options: Options,
    *,
    wait_until_fast: bool = False,
    report: Report = log_facts,
) -> Built:
    """Build what runs the steps of a loaded model. Raises ConfigError if the KV cache does not fit."""
    runner, plan = build_runner(model, options, wait_until_fast=wait_until_fast, report=report)
    scheduler = build_scheduler(options, model.facts, plan)
    eos_token_ids = _eos_token_ids(model.facts, codec)
    report(Fact("ends with", ", ".join(f"{codec.token(i)!r} ({i})" for i in eos_token_ids) or "nothing: it has no EOS"))
    served = ServedModel(
        name=served_name(options),
        create_time_s=time.time(),
        max_context_tokens=plan.max_context_tokens,
        vocab_size=model.facts.vocab_size,
        eos_token_ids=eos_token_ids,
        default_params=model.facts.default_params,
        block_names=scheduler.block_names,
    )
    return Built(EngineCore(scheduler, runner), codec, served)


def build_runner(
    model: LoadedModel, options: Options, *, wait_until_fast: bool, report: Report
) -> tuple[ModelRunner, KVPlan]:
    """The model side: KV cache, sampler and runner, warm. Of the engine it knows nothing."""
    plan = _plan_cache(model, options, report)
    report(Stage("warming up"))
    cache = PagedKVCache(plan.specs, plan.num_blocks, plan.block_size, model.device)
    sampler = Sampler(model.facts.vocab_size, model.device)
    threads = None
    if model.device.type == "cpu":
        num_threads, why = usable_cpus()
        threads = ComputeThreads(num_threads)
        report(Fact("threads", f"at most {num_threads}: {why}"))
    runner = ModelRunner(
        model,
        cache,
        sampler,
        options.scheduler.max_num_seqs,
        options.scheduler.max_num_batched_tokens,
        plan.max_context_tokens,
        threads=threads,
        speculator=Speculator.of(options.scheduler.speculate),
    )
    runner.warm_up()
    if model.is_compiled:
        compiler = BackgroundCompiler(
            model,
            runner.attention.compiled,
            block_size=plan.block_size,
            trust_remote_code=options.model.trust_remote_code,
        )
        compiler.start()
        if wait_until_fast:
            compiler.wait()
    if model.device.type == "cpu":
        release_threads()
        claiming = threading.Thread(target=cache.claim_memory, name="nanoserve-memory", daemon=True)
        claiming.start()
        if wait_until_fast:
            claiming.join()
    return runner, plan


def _plan_cache(model: LoadedModel, options: Options, report: Report) -> KVPlan:
    """How large the KV cache is made; says so, and what the model is. Raises ConfigError."""
    facts = model.facts
    plan = plan_kv(
        model.kv_specs,
        options.cache.block_size,
        options.cache.kv_memory_bytes,
        options.model.max_context_tokens,
        facts.max_position,
        options.scheduler.max_num_seqs,
        model.device,
    )
    free = available_memory()
    if model.device.type == "cpu" and plan.num_bytes > free:
        # Main memory is given out before it is there; without this the system would end the process, later.
        raise ConfigError(
            f"a KV cache of {format_size(plan.num_bytes)} was asked for, and {format_size(free)} of memory are free;"
            " lower --kv-memory"
        )
    size = f"{facts.num_parameters / 1e6:.1f} M parameters"
    report(Fact("model", f"{served_name(options)}: {facts.architecture}, {size}, {facts.dtype} on {model.device}"))
    if facts.left_out:
        report(Fact("plain weights", f"{', '.join(facts.left_out)}: no faster form is known for these"))
    report(Fact("KV cache", plan.describe()))
    if options.model.max_context_tokens is None and plan.max_context_tokens < facts.max_position:
        logger.warning(
            "the KV cache holds %d tokens, so that contexts end there and not at the model's %d; more need --kv-memory",
            plan.num_tokens,
            facts.max_position,
        )
    limits = options.scheduler
    report(Fact("step", f"at most {limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens"))
    return plan


def build_scheduler(options: Options, facts: ModelFacts, plan: KVPlan) -> Scheduler:
    """The engine's side, which has no tensors."""
    return Scheduler(
        options.scheduler,
        BlockPool(plan.num_blocks, keep_cached=options.cache.enable_prefix_cache),
        block_size=plan.block_size,
        max_context_tokens=plan.max_context_tokens,
        cache_identity=f"{facts.fingerprint} {facts.dtype}",
    )


def _eos_token_ids(model: ModelFacts, codec: TextCodec) -> tuple[int, ...]:
    """The checkpoint's, and its tokenizer's: fine-tunes often change only one of the two."""
    ids = {*model.eos_token_ids, *(() if codec.eos_token_id is None else (codec.eos_token_id,))}
    return tuple(sorted(token_id for token_id in ids if 0 <= token_id < model.vocab_size))


def served_name(options: Options) -> str:
    """The name that callers use."""
    path = options.model.path
    if options.model.served_name is not None:
        return options.model.served_name
    return BUILTIN_MODEL_NAME if path == str(BUILTIN_MODEL) else Path(path).name
