"""The composition root: closes every "auto", makes the parts and ties them together.

Read this to see what the server is made of. It is the only module that knows both the engine and the model side.
"""

import logging
import time
from pathlib import Path

from nanoserve.config import BUILTIN_MODEL, BUILTIN_MODEL_NAME, Options
from nanoserve.engine.core import EngineCore
from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.engine.scheduler import Scheduler
from nanoserve.engine.text import TextCodec
from nanoserve.kv_cache.block_pool import BlockPool
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache, plan_kv
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler

logger = logging.getLogger(__name__)


def build_engine(options: Options) -> Engine:
    """Load the model and build an engine that is warm but not started. Takes as long as the model does.

    Raises ConfigError, whose one line says what to do.
    """
    model = load_model(options.model)
    codec = TextCodec.load(str(model.folder), trust_remote_code=options.model.trust_remote_code)
    return assemble(model, codec, options)


def assemble(model: LoadedModel, codec: TextCodec, options: Options) -> Engine:
    """Build an engine around a loaded model. Raises ConfigError if the KV cache does not fit."""
    plan = plan_kv(
        model.kv_specs,
        options.cache.block_size,
        options.cache.kv_memory_bytes,
        options.model.max_context_tokens,
        model.max_position,
        options.scheduler.max_num_seqs,
        model.device,
    )
    logger.info(
        "%s, %.1f M parameters, %s on %s\n%s",
        model.architecture,
        model.num_parameters / 1e6,
        str(model.dtype).removeprefix("torch."),
        model.device,
        plan.describe(),
    )

    cache = PagedKVCache(plan.specs, plan.num_blocks, plan.block_size, model.device)
    sampler = Sampler(options.scheduler.max_num_seqs, model.vocab_size, model.device)
    runner = ModelRunner(model, cache, sampler, options.scheduler.max_num_seqs, plan.max_context_tokens)
    runner.warm_up()

    scheduler = Scheduler(
        options.scheduler,
        BlockPool(plan.num_blocks, keep_cached=options.cache.enable_prefix_cache),
        block_size=plan.block_size,
        max_context_tokens=plan.max_context_tokens,
        cache_identity=f"{model.fingerprint} {model.dtype}",
        enable_prefix_cache=options.cache.enable_prefix_cache,
    )
    served = ServedModel(
        name=served_name(options),
        create_time_s=time.time(),
        max_context_tokens=plan.max_context_tokens,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(sorted(model.eos_token_ids)),
        default_params=model.default_params,
    )
    return Engine(
        EngineCore(scheduler, runner),
        codec,
        served,
        max_waiting=options.scheduler.max_waiting,
        step_timeout_s=options.server.step_timeout_s,
    )


def served_name(options: Options) -> str:
    """The name that callers use."""
    path = options.model.path
    if options.model.served_name is not None:
        return options.model.served_name
    return BUILTIN_MODEL_NAME if path == str(BUILTIN_MODEL) else Path(path).name
