"""Compiled parts compute what the plain ones do, and nothing that goes wrong with them is seen by a request."""

import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import BLOCK_SIZE, Feeder
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoserve.config import ModelOptions
from nanoserve.model import compiled, cpu, narrow, packing
from nanoserve.model.compiled import BackgroundCompiler, LayerCall, watch_calls
from nanoserve.model.formulas import Formula
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.packing import PackedWeight

# Of the largest logit.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(LONGEST)] for _ in range(3)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(narrow, "kernels", {})
    monkeypatch.setattr(packing, "kernels", {})


def tiny(
    family: str, folder: Path, dtype: str = "float32", stored: str = "float32", **config_changes: object
) -> tuple[LoadedModel, Tensor]:
    """A model as we load it, and transformers' logits in float32: [3, LONGEST, vocab_size]."""
    theirs = save_tiny_model(family, folder, **config_changes)
    if stored != "float32":
        theirs.to(getattr(torch, stored)).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_model(ModelOptions(path=str(folder), dtype=dtype, device="cpu"))  # type: ignore[arg-type]
    with torch.inference_mode():
        return ours, theirs(torch.tensor(PROMPTS)).logits


def compiler(model: LoadedModel, feeder: Feeder) -> BackgroundCompiler:
    return BackgroundCompiler(
        model, feeder.runner.model.attention.compiled, block_size=BLOCK_SIZE, trust_remote_code=False
    )


def compile_and_wait(model: LoadedModel, feeder: Feeder) -> None:
    background = compiler(model, feeder)
    background.start()
    background.wait()


def num_compiled(model: LoadedModel) -> int:
    return sum("forward" in vars(layer) for _, layer in compiled.decoder_layers(model.model))


def largest_error(feeder: Feeder, want: Tensor) -> float:
    """After feeding one prompt and two of its tokens alone, and two prompts in a chunk and then token by token."""
    for count in (LONGEST - 2, 1, 1):
        feeder.step(PROMPTS, {0: count})
    feeder.step(PROMPTS, {1: 5, 2: 17})
    while feeder.num_fed[2] < LONGEST:
        feeder.step(PROMPTS, {1: 1, 2: 1})
    errors = [(feeder.all_logits(r, 0, feeder.num_fed[r]) - want[r][: feeder.num_fed[r]]).abs().max() for r in range(3)]
    return float(max(errors) / want.abs().max())


def check(
    family: str,
    folder: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    stored: str = "float32",
    **config_changes: object,
) -> LoadedModel:
    model, want = tiny(family, folder, dtype, stored, **config_changes)
    feeder = Feeder(model, LONGEST, monkeypatch)
    compile_and_wait(model, feeder)
    assert largest_error(feeder, want) < TOLERANCES[dtype]
    assert feeder.runner.model.attention.compiled, "attention was not compiled"
    return model


@pytest.mark.parametrize(
    ("family", "dtype", "stored"),
    [
        ("qwen3", "float32", "bfloat16"),
        pytest.param("qwen3", "float32", "float16", marks=pytest.mark.soak),
        pytest.param("qwen3", "float32", "float32", marks=pytest.mark.soak),
        pytest.param("qwen3", "bfloat16", "bfloat16", marks=pytest.mark.soak),
        pytest.param("gemma2", "float32", "float32", marks=pytest.mark.soak),
    ],
)
def test_all_parts_are_compiled_and_compute_the_same(
    family: str, dtype: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)
    monkeypatch.setattr(narrow, "BLOCK_SIZES", (1, 6))  # others would take time, and are no different
    for_one_token = []

    def forward(run_layer: Any, layer: Any, call: LayerCall) -> Any:
        for_one_token.append(call.args[0].shape[1] == 1)
        return made_forward(run_layer, layer, call)

    made_forward = compiled._forward
    monkeypatch.setattr(compiled, "_forward", forward)
    # Wide enough for the tiles of weights.
    model = check(family, tmp_path, dtype, monkeypatch, stored, hidden_size=64, intermediate_size=128)
    is_narrow = dtype == "float32" and stored != dtype
    has_pairs = any(isinstance(m, PackedWeight) and m.pairs is not None for m in model.model.modules())
    assert set(packing.kernels) == ({1, 2} if has_pairs else set())
    num_layers = len(list(compiled.decoder_layers(model.model)))
    assert for_one_token.count(False) == num_layers
    assert for_one_token.count(True) == (num_layers if is_narrow or has_pairs else 0)
    assert set(narrow.kernels) == ({(getattr(torch, stored), size) for size in (1, 6)} if is_narrow else set())
    assert num_compiled(model) == num_layers

    # The next start finds them made.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("the worker was started again"))
    again = load_model(ModelOptions(path=str(tmp_path), dtype=dtype, device="cpu"))  # type: ignore[arg-type]
    background = compiler(again, Feeder(again, LONGEST, monkeypatch))
    background.start()
    assert num_compiled(again) == num_compiled(model), "requests would wait while parts are loaded"
    background.wait()


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_compiled(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, tmp_path, "float32", monkeypatch)


def made_by(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LoadedModel, Feeder, Tensor]:
    """A model whose compiled parts are made by `make`, which gets the job, their names and the folder."""
    monkeypatch.setattr(compiled, "make", make)
    model, want = tiny("qwen3", tmp_path)
    feeder = Feeder(model, LONGEST, monkeypatch)
    compile_and_wait(model, feeder)
    return model, feeder, want


def broken_files(_job: compiled.Job, names: Sequence[str], folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.compiled").write_bytes(b"no pickle")
        yield name


def error_files(_job: compiled.Job, names: Sequence[str], folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.error").write_text("a reason")
        yield name


def no_files(_job: compiled.Job, names: Sequence[str], _: Path) -> Iterator[str]:
    yield from names


def disk_full(*_: object) -> Iterator[str]:
    yield from ()
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken_files, "cannot be loaded"),
        (error_files, "a reason"),
        (no_files, "cannot be loaded"),
        (disk_full, "No space left"),
    ],
)
def test_what_cannot_be_compiled_or_loaded_is_served_plain(
    make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, feeder, want = made_by(make, tmp_path, monkeypatch)
    assert num_compiled(model) == 0
    assert largest_error(feeder, want) < TOLERANCES["float32"]
    assert message in caplog.text


def test_a_layer_whose_compiled_form_computes_otherwise_is_served_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_folder: Path, name: str) -> Any:
        return None if name.startswith("attention") else lambda _, args, __: args[0] * 1.01

    monkeypatch.setattr(compiled, "_load", load)
    model, _, _ = made_by(no_files, tmp_path, monkeypatch)
    assert num_compiled(model) == 0


def test_a_compiled_layer_that_fails_is_replaced_by_the_plain_one_within_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, want = tiny("qwen3", tmp_path)
    feeder = Feeder(model, LONGEST, monkeypatch)
    calls = []

    def fails(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("unexpected stride")

    for path, layer in compiled.decoder_layers(model.model):
        layer.forward = compiled._forward(fails, layer, LayerCall(path, (torch.zeros(1, 2, 3),), {}))
    assert largest_error(feeder, want) < TOLERANCES["float32"]
    assert len(calls) == len(list(compiled.decoder_layers(model.model)))


def test_layers_that_differ_in_a_constant_are_not_of_one_make(tmp_path: Path) -> None:
    model, _ = tiny("qwen3", tmp_path)
    (first, second), _ = watch_calls(model)
    assert first.make == second.make
    second.layer.get_submodule("self_attn").scaling = 0.5  # type: ignore[assignment]
    assert first.make != second.make


def test_a_formula_that_computes_otherwise_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_folder: Path, name: str) -> Any:
        if name == "narrow-bfloat16-4":
            return lambda x, w: narrow.multiply_blocks(x, w) * 1.01
        return (lambda q, *_: (q * 0, q[:, :, 0])) if name == "attention-0" else None

    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)
    monkeypatch.setattr(compiled, "_load", load)
    monkeypatch.setattr(compiled, "make", no_files)
    model, want = tiny("qwen3", tmp_path, stored="bfloat16")
    feeder = Feeder(model, LONGEST, monkeypatch)
    compile_and_wait(model, feeder)
    assert not narrow.kernels
    assert not feeder.runner.model.attention.compiled
    assert largest_error(feeder, want) < TOLERANCES["float32"]


def test_a_part_is_used_before_the_next_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def make(_job: compiled.Job, names: Sequence[str], _: Path) -> Iterator[str]:
        for number, name in enumerate(names):
            assert len(used) == number
            yield name

    monkeypatch.setattr(compiled, "_load", lambda _folder, name: name)
    monkeypatch.setattr(compiled, "_use_formula", lambda _formula, _place, name: not used.append(name))
    monkeypatch.setattr(compiled, "_use_layer", lambda _trials, name: not used.append(name))
    made_by(make, tmp_path, monkeypatch)
    assert len(used) > 1


def quick_job(folder: Path) -> compiled.Job:
    """One part, quick to make."""
    return compiled.Job(
        folder=folder,
        trust_remote_code=False,
        dtype=torch.float32,
        layout={},
        block_size=BLOCK_SIZE,
        parts={"part": Formula(torch.mul, (torch.ones(3), torch.ones(3)), ((0,), (0,)))},
    )


def test_a_failing_compiler_is_said_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    assert list(compiled.make(quick_job(tmp_path), ["part"], tmp_path / "made")) == ["part"]
    assert "part: " in (tmp_path / "made/part.error").read_text()


def test_a_process_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nhead -c 100 > /dev/null\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert list(compiled.make(quick_job(tmp_path), ["part"], tmp_path / "made")) == []
    assert "exit code 1" in caplog.text


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanoserve.model.compile_worker", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        pickle.dump((quick_job(tmp_path), ["part"]), worker.stdin)
        worker.stdin.close()
        assert worker.wait(60) == 1
    assert not list(tmp_path.glob("*.compiled"))
