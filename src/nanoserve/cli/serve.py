"""`nanoserve serve`: listen at once, load the model, serve until a signal."""

import argparse
import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.http import openai_api
from nanoserve.cli.loading import Loading
from nanoserve.cli.sources import Choices
from nanoserve.cli.terminal import FILE_FORMAT, TERMINAL_FORMAT, start_logging
from nanoserve.config import BUILTIN_MODEL, BUILTIN_MODEL_NAME, Options, ServerConfig
from nanoserve.observability import logs
from nanoserve.observer import Observers
from nanoserve.request import Fact, Stage

if TYPE_CHECKING:
    from nanoserve.engine.engine import Engine
    from nanoserve.rpc.server import Server

DESCRIPTION = """
    Serve a model over gRPC, and over OpenAI's API. Without MODEL, the small one that is built in.
"""
EXAMPLES = """
    nanoserve serve
    nanoserve serve Qwen/Qwen3-0.6B --kv-memory 4GiB
    nanoserve serve ./my-model --served-model-name assistant --host 0.0.0.0 --api-keys keys.txt
    nanoserve serve ./my-model --adapters ./adapters --adapter tenant-a=./elsewhere/a --admin-keys admin.txt
    NANOSERVE_MAX_NUM_SEQS=16 nanoserve serve --config server.toml
"""

logger = logging.getLogger(__name__)


def add_arguments(parser: Parser) -> None:
    parser.describe("[MODEL] [OPTIONS]", DESCRIPTION, EXAMPLES)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    status_line = start_logging(logging.INFO)
    choices = Choices.of(arguments)
    options = choices.options()
    for handler in logging.getLogger().handlers:
        people = FILE_FORMAT if status_line is None else TERMINAL_FORMAT
        logs.dress(handler, options.observability.log_format, people)
    loading = Loading(status_line)
    with choices.origins_in_errors():
        return asyncio.run(serve(options, loading))


async def serve(options: Options, loading: Loading) -> int:
    """Serve until a signal, or until the engine is gone. Returns the exit code. Raises ConfigError."""
    # Imported here, because gRPC takes a moment, and --help should not.
    from nanoserve.engine_process import EngineProcess, start_engine

    async with contextlib.AsyncExitStack() as leaving:
        # First, because it takes longest: to import torch alone takes seconds.
        process = EngineProcess(options)
        leaving.callback(process.kill)
        from nanoserve.flight_recorder.recorder import FlightRecorder
        from nanoserve.observability.telemetry import Telemetry
        from nanoserve.rpc.server import Server

        telemetry = Telemetry(options.observability)
        leaving.push_async_callback(telemetry.close)
        recorder = FlightRecorder()
        observers = Observers(
            recorder,
            *telemetry.observers,
        )
        server = Server(
            options.server,
            recorder=recorder,
            observers=observers,
        )
        http_facts = await leaving.enter_async_context(openai_api(options.server, server, telemetry))

        load = partial(start_engine, process, options, loading.report, observers)
        return await _serve(options, loading, server, observers, load, http_facts)


async def _serve(
    options: Options,
    loading: Loading,
    server: "Server",
    observers: Observers,
    load: Callable[[], "Engine"],
    http_facts: list[Fact],
) -> int:
    started_s = time.monotonic()
    try:
        address = server.address(await server.start())
        serving = asyncio.create_task(server.run_until_signal())
        await asyncio.sleep(0)  # lets it take over the signals
        name = BUILTIN_MODEL_NAME if options.model.path == str(BUILTIN_MODEL) else options.model.path
        logger.info("listening on %s, not ready yet: loading %s", address, name)
        loading.report(Stage("importing torch and transformers"))
        with loading:
            loaded = asyncio.create_task(asyncio.to_thread(load))
            await asyncio.wait([serving, loaded], return_when=asyncio.FIRST_COMPLETED)
        if not loaded.done():
            # A signal came. Nothing can stop a thread that loads a model; the engine's process ends with this one.
            server.end_process(0)
        engine = loaded.result()
    except Exception:
        await server.stop()
        raise
    engine.start()
    server.set_engine(engine)
    loading.report(Fact("gRPC", f"{address}, {_protection(options.server)}"))
    for fact in http_facts:
        loading.report(fact)
    ready_after_s = time.monotonic() - started_s
    observers.server_ready(engine.model.name, ready_after_s)
    logger.info("ready after %.1f s: %s on %s\n%s", ready_after_s, engine.model.name, address, loading.summary())
    ended = asyncio.create_task(engine.wait_until_ended())
    await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        # Nothing mends it in this process; whoever watches over it starts another.
        logger.critical("the engine is gone; stopping")
        await server.stop()
        return 1
    await engine.close()
    logger.info("stopped")
    return 0


def _protection(config: ServerConfig) -> str:
    """Who may connect and call, in a few words."""
    if config.tls_cert is None:
        transport = "in the clear"
    else:
        transport = "TLS" if config.tls_client_ca is None else "TLS with client certificates"
    return f"{transport}, {'without keys' if config.api_keys is None else 'with API keys'}"
