"""Mishaps, from outside: signals under load, steps that fail, full disks and spoiled checkpoints.

A server that can go on goes on, and only the requests concerned fail; one that cannot start says why in one line.
"""

import asyncio
import math
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from caller import OPTIONS, Caller, chat, code_of, endless, is_idle, num_live, port_of, short, until
from failure import Failure
from families import save_tiny_model
from nanoserve_client.v1 import generation_pb2 as pb
from safetensors.torch import load_file, save_file
from serve_process import ServeProcess, is_gone, serving

from nanoserve.cli import main
from nanoserve.config import BUILTIN_MODEL

VOCAB_SIZE = 2560  # of the built-in tokenizer


# ----------------------------------------------------------------------------------------------------- signals


async def test_a_server_is_killed_under_load_starts_again_on_its_port_and_is_stopped_under_load():
    with serving("--no-compile") as killed:
        async with grpc.aio.insecure_channel(killed.address, OPTIONS) as channel:
            caller = Caller(channel)
            calls = [asyncio.create_task(caller.run(endless())) for _ in range(20)]
            await until(lambda: num_live(killed) == 20)
            engine_pid = killed.engine_pid
            killed.end(signal.SIGKILL)
            assert {code_of(await call) for call in calls} == {"UNAVAILABLE"}
            await until(lambda: is_gone(engine_pid))

            port = str(port_of(killed))
            with serving("--no-compile", "--grpc-port", port, "--max-num-seqs", "8", "--drain-timeout", "1") as again:
                assert await caller.is_served()
                calls = [asyncio.create_task(caller.run(endless())) for _ in range(4)]
                calls += [asyncio.create_task(caller.run(short())) for _ in range(200)]
                await until(lambda: num_live(again) > 100)
                second_engine_pid = again.engine_pid
                again.process.send_signal(signal.SIGTERM)
                outcomes = [await call for call in calls]
                assert set(map(code_of, outcomes)) == {"OK", "UNAVAILABLE"}
                assert {o.reason for o in outcomes if isinstance(o, Failure)} == {"NOT_READY"}
                assert again.process.wait(30) == 0
                await until(lambda: is_gone(second_engine_pid))


# --------------------------------------------------------------------------------------------------- bad luck

NAN_TOKEN, RAISING_TOKEN = 7, 13
# With the model's K/V written already.
RAISING = f"""
from nanoserve.model import loader
loader._refuse_damaged = lambda *_: None  # so that one token computes NaN

from transformers import LlamaModel
forward = LlamaModel.forward

def fail_at_a_token(self, input_ids, **rest):
    out = forward(self, input_ids=input_ids, **rest)
    if (input_ids == {RAISING_TOKEN}).any():
        raise RuntimeError("sabotage")
    return out

LlamaModel.forward = fail_at_a_token
"""
# What a full disk does: no file grows, at once, and from SIGUSR1 on the log neither.
FULL_DISK = """
import os, resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
os.environ["CXX"] = "ls"  # any program: what it fails to make could not be written either
from nanoserve.model import cpu
cpu.MIN_COMPILED = 0
signal.signal(signal.SIGUSR1, lambda *_: os.dup2(os.open("/dev/full", os.O_WRONLY), 2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model; its tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", folder, vocab_size=VOCAB_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BUILTIN_MODEL) / name, folder)
    return folder


def poison(folder: Path) -> None:
    """One of its tokens is NaN."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN_TOKEN] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sabotaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    poisoned = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(folder, poisoned)
    poison(poisoned)
    # So few blocks that those of failed requests are soon used again.
    with serving(str(poisoned), "--no-compile", "--kv-memory", "64KiB", sabotage=RAISING) as server:
        yield server


@pytest.fixture
async def victim(sabotaged: ServeProcess) -> Any:
    async with grpc.aio.insecure_channel(sabotaged.address, OPTIONS) as channel:
        yield Caller(channel)
        assert code_of(await Caller(channel).run(tokens(5))) == "OK"
    await until(lambda: is_idle(sabotaged))


def tokens(*ids: int, max_tokens: int = 4) -> pb.GenerateRequest:
    """A prompt of these tokens, which the model does not answer with the ones that fail."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(temperature=0, logit_bias={NAN_TOKEN: -100, RAISING_TOKEN: -100}),
        stopping=pb.Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


async def test_a_chat_without_a_chat_template_is_refused_and_a_text_is_not(victim):
    refusal = await victim.run(short(text=None, chat=chat(pb.ROLE_USER)))
    assert (refusal.code.name, list(refusal.violations)) == ("INVALID_ARGUMENT", ["chat"])
    assert "no chat template" in refusal.message
    assert await victim.is_served()


async def test_a_token_with_nan_weights_fails_its_requests_and_not_those_beside_them(victim):
    alone = await victim.run(tokens(5, 6, max_tokens=80))
    beside = asyncio.create_task(victim.run(tokens(5, 6, max_tokens=80)))
    failures = [await victim.run(tokens(*range(20, 60), NAN_TOKEN)) for _ in range(5)]
    assert {(f.code.name, f.reason) for f in failures} == {("INTERNAL", "ENGINE_FAILURE")}
    assert {f.message for f in failures} == {"the model computed NaN or infinity for this request"}
    assert answer(await beside) == answer(alone)


def answer(events: list[pb.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


async def test_a_step_that_raises_fails_its_requests_and_the_next_are_served(sabotaged, victim):
    prompt = range(20, 60)
    alone = answer(await victim.run(tokens(*prompt)))
    for _ in range(5):
        failure = await victim.run(tokens(*prompt, RAISING_TOKEN))
        assert (failure.code.name, failure.reason) == ("INTERNAL", "ENGINE_FAILURE")
        assert "sabotage" not in failure.message
    assert answer(await victim.run(tokens(*prompt))) == alone
    sabotaged.wait_for("RuntimeError: sabotage")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
async def test_a_full_disk_costs_the_compiled_code_and_the_log_but_no_request():
    with serving("--kv-memory", "16MiB", sabotage=FULL_DISK) as server:
        server.wait_for("the process that compiles has failed")
        async with grpc.aio.insecure_channel(server.address, OPTIONS) as channel:
            caller = Caller(channel)
            server.process.send_signal(signal.SIGUSR1)
            # Each refusal is a line of the log.
            for _ in range(200):
                assert code_of(await caller.run(short(text=""))) == "INVALID_ARGUMENT"
            assert await caller.is_served()
        assert server.end() == 0


# ------------------------------------------------------------------------------------------- bad checkpoints


class Pickled:
    """Would be heard of if it were unpickled."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))


def disguise_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Pickled()))


def spoil_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (corrupt, "cannot be read"),
        (truncate, "cannot be read"),
        (pickle_weights, "found only pytorch_model.bin, which are not loaded"),
        (disguise_a_pickle, "cannot be read"),
        (spoil_the_tokenizer, "the tokenizer in"),
        (poison, "model.embed_tokens.weight has NaN or infinity"),
    ],
)
def test_a_spoiled_checkpoint_is_not_served(folder, tmp_path, capfd, spoil, words):
    spoiled = tmp_path / "model"
    shutil.copytree(folder, spoiled)
    spoil(spoiled)
    # In this process, where torch is imported already: the engine's process of a server does the same.
    assert main(["generate", "Hello!", "--model", str(spoiled), "--no-compile"]) == 2
    error = capfd.readouterr().err
    [line] = [line for line in error.splitlines() if line.startswith("nanoserve: ")]
    assert str(spoiled) in line
    assert words in line
    assert "Traceback" not in error
