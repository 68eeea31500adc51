"""Coverage-guided fuzzing of the request path, in one process: python tests/fuzz_request.py -max_total_time=600

    bytes ─▶ parse ─▶ validate ─▶ engine, with a tiny random model ─▶ messages, and a status

Whatever a caller sends, it must not end as INTERNAL, keep a block, or go on after its deadline. The fuzzer is atheris,
on libFuzzer, whose flags these are; what it finds it writes to a file, which can be given as an argument to run again.
"""

import os

# One thread is faster for a model so small; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import contextlib
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import atheris
import grpc
from families import save_tiny_model
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from nanoserve_client.v1 import generation_pb2 as pb

with atheris.instrument_imports(include=["nanoserve"]):
    from nanoserve.build import build_engine
    from nanoserve.config import BUILTIN_MODEL, CacheOptions, ModelOptions, Options, SchedulerConfig
    from nanoserve.engine.engine import Engine
    from nanoserve.observer import Observers
    from nanoserve.rpc.call import Calls
    from nanoserve.rpc.generation import GenerationService

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
# So few blocks, rows and tokens a step that requests with several sequences preempt each other and prompts are chunked.
CACHE = CacheOptions(kv_memory_bytes=48 << 10)
SCHEDULER = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24)
VOCAB_SIZE, MAX_CONTEXT_TOKENS = 2560, 96
DEADLINE_S = 0.5
# What a call may compute, its deadline included, until its blocks are free.
MAX_CPU_S = 20.0
OK_OR_CALLERS_FAULT = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
MAX_MUTATED_BYTES = 64

USER = pb.ChatMessage(role=pb.ROLE_USER, content="Hello!")
SEEDS = [
    pb.GenerateRequest(text="Hello!", stopping=pb.Stopping(max_tokens=4), sampling=pb.Sampling(temperature=0)),
    pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(30)), n=3, stopping=pb.Stopping(max_tokens=9, strings=["a"])),
    pb.GenerateRequest(
        chat=pb.Chat(messages=[USER], tools=[pb.Tool(name="f", parameters_json="{}")], template_kwargs_json='{"a": 1}'),
        sampling=pb.Sampling(top_p=0.9, top_k=5, min_p=0.1, seed=1, repetition_penalty=1.1, logit_bias={3: 1.0}),
        output=pb.OutputOptions(logprobs=2, prompt_logprobs=1, min_delta_tokens=2),
        stopping=pb.Stopping(max_tokens=5, min_tokens=2, token_ids=[7]),
        cache=pb.CacheOptions(salt="x", skip_read=True),
        priority=1,
    ),
]


class Context:
    """What a servicer sees of a gRPC call; keeps how it ended."""

    def __init__(self) -> None:
        self.code = "OK"
        self._end_s = time.monotonic() + DEADLINE_S

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float:
        return self._end_s - time.monotonic()

    async def send_initial_metadata(self, _metadata: Any) -> None:
        pass

    async def write(self, message: Message) -> None:
        message.SerializeToString()

    async def abort(self, code: grpc.StatusCode, _message: str, _trailers: Any) -> NoReturn:
        self.code = code.name
        raise grpc.aio.AbortError


class Target:
    """The servicer with its engine, without a network. Main thread, whose event loop it runs."""

    def __init__(self, folder: Path) -> None:
        """`folder`: empty; the model is written there."""
        save_tiny_model("llama", folder, vocab_size=VOCAB_SIZE)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(Path(BUILTIN_MODEL) / name, folder)
        model = ModelOptions(path=str(folder), device="cpu", max_context_tokens=MAX_CONTEXT_TOKENS, compile=False)
        self._engine = build_engine(Options(model, CACHE, scheduler=SCHEDULER))
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start(self._engine))
        call_details: Any = SimpleNamespace(method=f"/{SERVICE.full_name}/Generate")
        service = GenerationService(lambda: self._engine)
        handler: Any = Calls(Observers()).handler(SERVICE, service).service(call_details)
        self._parse: Callable[[bytes], Any] = handler.request_deserializer
        self._serve = handler.unary_stream

    def call(self, data: bytes) -> None:
        """Serve a request. Raises if it ends as no request may."""
        context = Context()
        self._loop.run_until_complete(self._run(self._parse(data), context))
        if context.code not in OK_OR_CALLERS_FAULT:
            raise AssertionError(f"the call ended as {context.code}")

    async def _start(self, engine: Engine) -> None:
        engine.start()

    async def _run(self, request: Any, context: Context) -> None:
        call = asyncio.create_task(self._serve_until_free(request, context))
        begin_s = time.process_time()
        while not call.done():
            await asyncio.wait([call], timeout=1)
            # Not by the clock: this process may have to wait for others. One that stands still libFuzzer finds.
            assert time.process_time() - begin_s < MAX_CPU_S, "the call goes on after its deadline"
        call.result()

    async def _serve_until_free(self, request: Any, context: Context) -> None:
        with contextlib.suppress(grpc.aio.AbortError):
            await self._serve(request, context)
        while self._engine.stats().scheduler.num_owned_blocks:
            await asyncio.sleep(0.001)


# --------------------------------------------------------------------------------------------- how requests change


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Mostly another request, with a few fields changed; else other bytes, as libFuzzer makes them."""
    rng, request = random.Random(seed), pb.GenerateRequest()
    try:
        request.ParseFromString(data)
    except DecodeError:
        return atheris.Mutate(data, max_size)
    for _ in range(rng.randrange(1, 5)):
        change(request, rng)
    changed = request.SerializeToString()
    return changed if len(changed) <= max_size and rng.random() < 0.8 else atheris.Mutate(data, max_size)


def change(message: Message, rng: random.Random) -> None:
    """Set, alter or clear a field of the message, or of one inside it."""
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is None and field.is_repeated:
        value.append(scalar(field, None, rng))
    elif field.message_type is None:
        setattr(message, field.name, scalar(field, value, rng))
    elif field.message_type.GetOptions().map_entry:
        key, entry = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        value[scalar(key, None, rng)] = scalar(entry, None, rng)
    elif field.is_repeated:
        change(rng.choice(value) if value and rng.random() < 0.5 else value.add(), rng)
    else:
        value.SetInParent()
        change(value, rng)


def scalar(field: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    """A value for the field, often near a limit; a text is made of the old one."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return atheris.Mutate((old or "a").encode(), MAX_MUTATED_BYTES).decode(errors="replace")
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([0.0, 1.0, -1.0, 2.0, 100.0, 1e-38, math.inf, math.nan, rng.uniform(0, 2)])
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.randrange(7)
    number = rng.choice(
        [
            0,
            1,
            2,
            20,
            21,
            MAX_CONTEXT_TOKENS,
            128,
            129,
            VOCAB_SIZE - 1,
            VOCAB_SIZE,
            2**31 - 1,
            rng.randrange(VOCAB_SIZE),
        ]
    )
    is_signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    return -number if is_signed and rng.random() < 0.3 else number


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-request-"))
    target = Target(folder)
    arguments = sys.argv
    if all(argument.startswith("-") for argument in arguments[1:]):
        # Neither a folder to begin with nor a file to run again.
        corpus = folder / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(SEEDS):
            (corpus / f"seed-{i}").write_bytes(seed.SerializeToString())
        arguments = [*arguments, str(corpus), "-max_len=2000"]
    atheris.Setup(arguments, target.call, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
