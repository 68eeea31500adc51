"""The composition root: closes every "auto", makes the parts and ties them together.

Read this to see what the server is made of. It is the only module that knows both the engine and the model side.
"""

import functools
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanoserve.adapter.folders import AdapterFolders, parse_choice
from nanoserve.adapter.peft import read_adapter
from nanoserve.adapter.store import AdapterStore
from nanoserve.checkpoint import of_draft_model
from nanoserve.config import BUILTIN_MODEL, BUILTIN_MODEL_NAME, ConfigError, ModelOptions, Options, format_size
from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.dialect.formats import Dialect, call_format, detect, reasoning_format
from nanoserve.engine.adapters import ServedAdapters
from nanoserve.engine.core import EngineCore
from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.engine.scheduler import Scheduler
from nanoserve.engine.text import TextCodec
from nanoserve.errors import Rejection
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import KVPlan, PagedKVCache, available_memory, plan_kv
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.compiled import BackgroundCompiler
from nanoserve.model.facts import ModelFacts
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.model.threads import ComputeThreads, one_thread, release_threads, usable_cpus
from nanoserve.model.torch_internals import watching_bars
from nanoserve.request import Fact, Report, Stage
from nanoserve.speculation.speculator import Speculator, read_choice

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
        draft = None
        if options.model.draft is not None:
            with of_draft_model(), one_thread():
                draft = _load_draft(options.model.draft, codec)
        return assemble(model, codec, options, draft=draft, wait_until_fast=wait_until_fast, report=report)
    except SafetensorError as error:
        raise ConfigError(f"a checkpoint file in {options.model.path} cannot be read: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the device has too little memory: {error}; lower --kv-memory, or serve less") from error


def _load_draft(options: ModelOptions, codec: TextCodec) -> LoadedModel:
    """The model that drafts. codec: of the served one. Raises ConfigError if their tokens are not the same."""
    model = load_model(options)
    own_codec = TextCodec.load(model.facts.folder, trust_remote_code=options.trust_remote_code)
    if (difference := own_codec.first_difference(codec)) is not None:
        token, there, here = difference
        told = f"{token!r} is {there} there and {here} in the model that is served"
        raise ConfigError(f"{options.path} has another vocabulary: {told}")
    return model


def assemble(
    model: LoadedModel,
    codec: TextCodec,
    options: Options,
    *,
    draft: LoadedModel | None = None,
    wait_until_fast: bool = False,
    report: Report = log_facts,
) -> Built:
    """Build what runs the steps of a loaded model. Raises ConfigError if the KV cache does not fit.

    draft: the model that drafts for it, if there is one.
    """
    eos_token_ids = _eos_token_ids(model.facts, codec)
    compiler = ConstraintCompiler(
        lambda: codec.vocabulary(model.facts.vocab_size, eos_token_ids),
        codec.encode_plain,
    )
    # While kernels warm up, which leave the interpreter to others.
    compiler.warm_up()
    # Before the layers are compiled, and before memory is given to the KV cache.
    slots = AdapterSlots(model, options.adapters.adapter_slots) if options.adapters.are_wanted else None
    folders, adapters = (None, None) if slots is None else build_adapters(options, model, slots, report)
    runner, plan = build_runner(model, draft, options, adapters=slots, wait_until_fast=wait_until_fast, report=report)
    scheduler = build_scheduler(options, model.facts, plan, adapters)
    report(Fact("ends with", ", ".join(f"{codec.token(i)!r} ({i})" for i in eos_token_ids) or "nothing: it has no EOS"))
    draft_sources, max_draft_tokens = read_choice(options.scheduler.speculate, has_draft_model=draft is not None)
    dialect = _dialect(options.model, codec)
    report(Fact("dialect", dialect.describe()))
    served = ServedModel(
        name=served_name(options),
        create_time_s=time.time(),
        max_context_tokens=plan.max_context_tokens,
        vocab_size=model.facts.vocab_size,
        eos_token_ids=eos_token_ids,
        default_params=model.facts.default_params,
        block_names=scheduler.block_names,
        max_draft_tokens=max_draft_tokens,
        draft_sources=draft_sources,
        draft_model=Path(options.model.draft_model or "").name,
        dialect=dialect,
        adapter_folders=folders,
        adapters=() if adapters is None else adapters.served.adapters,
    )
    return Built(EngineCore(scheduler, runner, compiler), codec, served)


def build_adapters(
    options: Options, model: LoadedModel, slots: AdapterSlots, report: Report
) -> tuple[AdapterFolders, ServedAdapters]:
    """The adapters, those of --adapter read. Raises ConfigError with all that is wrong with them."""
    wanted = options.adapters
    if wanted.root is not None and not wanted.root.is_dir():
        raise ConfigError(f"--adapters: there is no folder {str(wanted.root)!r}")
    folders = AdapterFolders(wanted.root, served_name(options))
    read = functools.partial(
        read_adapter,
        targets=slots.targets,
        dtype=model.dtype,
        max_bytes=wanted.adapter_memory_bytes,
        base_model=options.model.path,
    )
    store = AdapterStore(
        read,
        slots.write,
        wanted.adapter_memory_bytes,
        slots.num_slots,
        # More would be helpers that the step's threads are not to have beside them: see release_threads.
        prepare_thread=functools.partial(torch.set_num_threads, 1),
    )
    adapters = ServedAdapters(store, folders)
    problems = []
    try:
        chosen = parse_choice(wanted.adapter) if wanted.adapter else {}
    except ValueError as error:
        raise ConfigError(f"--adapter: {error}") from None
    for adapter_name, folder in chosen.items():
        report(Stage(f"reading adapter {adapter_name}"))
        try:
            adapters.load_first(adapter_name, folder)
        except Rejection as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"--adapter: {'; '.join(problems)}")
    report(Fact("adapters", _adapters_told(folders, adapters)))
    return folders, adapters


def _adapters_told(folders: AdapterFolders, adapters: ServedAdapters) -> str:
    """As the start says it."""
    store, infos = adapters.store, adapters.served.adapters
    read = ", ".join(f"{info.adapter.name} (rank {info.rank})" for info in infos)
    parts = [f"{store.num_slots} slots", f"at most {format_size(store.max_bytes)}"]
    if read:
        parts.append(f"read: {read}")
    if folders.root is not None:
        parts.append(f"{len(list(folders.names()))} in {folders.root}")
    return "; ".join(parts)


def build_runner(
    model: LoadedModel,
    draft: LoadedModel | None,
    options: Options,
    *,
    adapters: AdapterSlots | None = None,
    wait_until_fast: bool,
    report: Report,
) -> tuple[ModelRunner, KVPlan]:
    """The model side: KV cache, sampler and runner, warm. Of the engine it knows nothing."""
    models = [model] if draft is None else [model, draft]
    plan = _plan_cache(models, options, report)
    report(Stage("warming up"))
    caches = [PagedKVCache(each.kv_specs, plan.num_blocks, plan.block_size, each.device) for each in models]
    sampler = Sampler(model.facts.vocab_size, model.device)
    threads = None
    if model.device.type == "cpu":
        num_threads, why = usable_cpus()
        threads = ComputeThreads(num_threads)
        report(Fact("threads", f"at most {num_threads}: {why}"))
    runner = ModelRunner(
        model,
        caches[0],
        sampler,
        options.scheduler.max_num_seqs,
        options.scheduler.max_num_batched_tokens,
        plan.max_context_tokens,
        threads=threads,
        speculator=Speculator.of(options.scheduler.speculate, has_draft_model=draft is not None),
        draft=None if draft is None else (draft, caches[1]),
        adapters=adapters,
    )
    runner.warm_up()
    for loaded, paged in zip(models, runner.models, strict=True):
        if loaded.is_compiled:
            compiler = BackgroundCompiler(
                loaded,
                paged.attention.compiled,
                block_size=plan.block_size,
                trust_remote_code=options.model.trust_remote_code,
            )
            compiler.start()
            if wait_until_fast:
                compiler.wait()
    if model.device.type == "cpu":
        release_threads()
        claiming = threading.Thread(target=_claim_memory, args=(caches,), name="nanoserve-memory", daemon=True)
        claiming.start()
        if wait_until_fast:
            claiming.join()
    return runner, plan


def _claim_memory(caches: list[PagedKVCache]) -> None:
    for cache in caches:
        cache.claim_memory()


def _plan_cache(models: list[LoadedModel], options: Options, report: Report) -> KVPlan:
    """How large the KV cache is made; says so, and what the models are. Raises ConfigError.

    models: the one that is served, and the one that drafts, whose keys and values lie in the same blocks.
    """
    facts, device = models[0].facts, models[0].device
    plan = plan_kv(
        [spec for model in models for spec in model.kv_specs],
        options.cache.block_size,
        options.cache.kv_memory_bytes,
        options.model.max_context_tokens,
        facts.max_position,
        options.scheduler.max_num_seqs,
        device,
    )
    free = available_memory()
    if device.type == "cpu" and plan.num_bytes > free:
        # Main memory is given out before it is there; without this the system would end the process, later.
        raise ConfigError(
            f"a KV cache of {format_size(plan.num_bytes)} was asked for, and {format_size(free)} of memory are free;"
            " lower --kv-memory"
        )
    report(Fact("model", f"{served_name(options)}: {_description(models[0])}"))
    if len(models) > 1:
        report(Fact("draft model", f"{options.model.draft_model}: {_description(models[1])}"))
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


def _description(model: LoadedModel) -> str:
    facts = model.facts
    return f"{facts.architecture}, {facts.num_parameters / 1e6:.1f} M parameters, {facts.dtype} on {model.device}"


def build_scheduler(
    options: Options, facts: ModelFacts, plan: KVPlan, adapters: ServedAdapters | None = None
) -> Scheduler:
    """The engine's side, which has no tensors."""
    return Scheduler(
        options.scheduler,
        BlockPool(plan.num_blocks, keep_cached=options.cache.enable_prefix_cache),
        block_size=plan.block_size,
        max_context_tokens=plan.max_context_tokens,
        cache_identity=f"{facts.fingerprint} {facts.dtype}",
        adapters=adapters,
    )


def _eos_token_ids(model: ModelFacts, codec: TextCodec) -> tuple[int, ...]:
    """The checkpoint's, and its tokenizer's: fine-tunes often change only one of the two."""
    ids = {*model.eos_token_ids, *(() if codec.eos_token_id is None else (codec.eos_token_id,))}
    return tuple(sorted(token_id for token_id in ids if 0 <= token_id < model.vocab_size))


def _dialect(options: ModelOptions, codec: TextCodec) -> Dialect:
    """How the model writes reasoning and calls of tools. Raises ConfigError."""
    found = detect(codec.chat_template)
    reasoning, calls = found.reasoning, found.calls
    try:
        if options.reasoning_parser != "auto":
            reasoning = None if options.reasoning_parser == "none" else reasoning_format(options.reasoning_parser)
        if options.tool_call_parser != "auto":
            calls = None if options.tool_call_parser == "none" else call_format(options.tool_call_parser)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Dialect(reasoning, calls)


def served_name(options: Options) -> str:
    """The name that callers use."""
    path = options.model.path
    if options.model.served_name is not None:
        return options.model.served_name
    return BUILTIN_MODEL_NAME if path == str(BUILTIN_MODEL) else Path(path).name
