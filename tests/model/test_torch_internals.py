"""With each thing that is private in torch or transformers gone or changed, a model is still served, the slower way."""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import BLOCK_SIZE, Feeder
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from nanoserve.config import ModelOptions, Options
from nanoserve.model import compile_worker, compiled, cpu, narrow, packing, torch_internals
from nanoserve.model.compiled import BackgroundCompiler
from nanoserve.model.formulas import Formula
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.packing import PackedWeight

PROMPT = [3 + 7 * i % (VOCAB_SIZE - 3) for i in range(LONGEST)]
CPU = torch.device("cpu")


class _Gone:
    """Stands for a namespace without the names that are used of it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no {name}")


def raises(*_: object, **__: object) -> Any:
    raise RuntimeError("it takes other arguments now")


def largest_error(ours: LoadedModel, theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> float:
    feeder = Feeder(ours, LONGEST, monkeypatch)
    feeder.step([PROMPT], {0: LONGEST - 1})
    feeder.step([PROMPT], {0: 1})
    with torch.inference_mode():
        want = theirs(torch.tensor([PROMPT])).logits[0]
    return float((feeder.all_logits(0, 0, LONGEST) - want).abs().max() / want.abs().max())


@pytest.mark.skipif(not torch_internals.can_pack(CPU, torch.float32), reason="this CPU does not pack")
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("pack_weight", raises),
        ("multiply_packed", raises),
        ("multiply_packed", lambda x, packed, _: x.new_zeros(len(x), packed.shape[0])),
    ],
)
def test_without_packed_weights_a_model_is_served_with_plain_ones(
    name: str,
    broken: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = save_tiny_model("qwen3", tmp_path)
    monkeypatch.setattr(torch_internals, name, broken)
    ours = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu"))
    assert not any(isinstance(module, PackedWeight) for module in ours.model.modules())
    assert "oneDNN's packed weights cannot be used" in caplog.text
    assert "weights are served unpacked" in caplog.text
    assert largest_error(ours, theirs, monkeypatch) < 1e-5


def test_names_that_torch_no_longer_has_are_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_internals.torch.ops, "mkldnn", _Gone())
    assert not torch_internals.can_pack(CPU, torch.bfloat16)
    assert "no _is_mkldnn_bf16_supported" in caplog.text


@pytest.mark.parametrize("broken", [raises, lambda _: torch.zeros(7, dtype=torch.int32)])
def test_without_the_memory_of_packed_weights_they_are_multiplied_by_onednn_alone(
    broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_internals, "pack_weight", lambda weight, _: weight)
    monkeypatch.setattr(torch_internals, "packed_memory", broken)
    monkeypatch.setattr(packing, "_can_read_packed", torch_internals.can_read_packed)
    assert packing._as_pairs(torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.bfloat16)) is None
    assert "memory of packed weights cannot be used" in caplog.text


def test_where_compiled_parts_cannot_be_loaded_nothing_is_compiled_and_weights_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "MIN_COMPILED", 0)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delattr(torch.compiler, "load_compiled_function")
    save_tiny_model("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu"))
    assert not model.is_compiled
    assert {kind.dtype for kind in model.layout.values()} == {torch.float32}
    assert "nothing is compiled" in caplog.text


@pytest.mark.parametrize("name", ["compile_ahead", "mark_any_size"])
def test_what_compiles_may_fail_part_by_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_worker, name, raises)
    formula = Formula(torch.mul, (torch.ones(3), torch.ones(3)), ((0,), (0,)))
    job = compiled.Job(tmp_path, False, torch.float32, {}, BLOCK_SIZE, {"part": formula})
    compile_worker._make(tmp_path, "part", job)
    assert "it takes other arguments now" in (tmp_path / "part.error").read_text()


def test_what_cannot_be_loaded_is_served_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(narrow, "kernels", {})
    monkeypatch.setattr(compiled, "load_compiled", raises)
    monkeypatch.setattr(compiled, "make", lambda _job, names, _folder: iter(names))
    theirs = save_tiny_model("qwen3", tmp_path)
    ours = load_model(ModelOptions(path=str(tmp_path), dtype="float32", device="cpu"))
    feeder = Feeder(ours, LONGEST, monkeypatch)
    background = BackgroundCompiler(
        ours, feeder.runner.model.attention.compiled, block_size=BLOCK_SIZE, trust_remote_code=False
    )
    background.start()
    background.wait()
    assert "cannot be loaded: RuntimeError('it takes other arguments now')" in caplog.text
    assert largest_error(ours, theirs, monkeypatch) < 1e-5


def test_without_the_compilers_own_names_a_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = str(tmp_path / "chosen")  # a whole path: torch makes one of any other
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
    for name in ("torch._inductor.cpu_vec_isa", "torch._inductor.runtime.cache_dir_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    cpu.compiled_folder().mkdir(parents=True)
    cpu.keep_compiled()
    cpu.prepare_to_load_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == chosen


def test_without_transformers_hook_a_model_is_loaded_and_no_progress_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = importlib.import_module("nanoserve.build")
    monkeypatch.delattr(transformers_logging, "set_tqdm_hook")
    said: list[object] = []
    with caplog.at_level(logging.WARNING):
        built = build.build_core(Options(), report=said.append)
    assert built.model.vocab_size > 0
    assert "loading shows no progress" in caplog.text
