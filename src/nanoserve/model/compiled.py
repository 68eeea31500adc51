"""Parts of a step, compiled for a CPU: decoder layers, and formulas of attention and of products (formulas.py).

    serving starts ──────▶ plain PyTorch ───────────────────────────────────▶ compiled, part by part
          └▶ in the cache folder? ─no─▶ child process (compile_worker.py) ─▶ load ─▶ try ─▶ use

Compiling takes a process of its own, because in this one it would hold the interpreter lock against the engine for
seconds. A part is used as soon as it is made, and kept in the user's cache folder for the next start. torch.compile's
guards are left out, which would cost more than a small layer; instead a compiled layer is used only for layers of the
same make, and any part only if, on a trial call, it computes what the plain one does. Nothing here can fail a request:
what cannot be compiled is served as it is.
"""

import copy
import hashlib
import logging
import os
import pickle
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nanoserve.model import adapter_products, attend
from nanoserve.model.adapters import adapting, is_adapting, put_trial_adapters, trial_addition
from nanoserve.model.attention import AttentionForm, CompiledAttention, attending
from nanoserve.model.cpu import compiled_folder
from nanoserve.model.formulas import Formula, Place, attention_formula
from nanoserve.model.loader import LoadedModel
from nanoserve.model.probe import stand_in
from nanoserve.model.threads import TORCH_THREADS, one_thread
from nanoserve.model.torch_internals import load_compiled
from nanoserve.model.weights import Layout, ServedLinear, Weight

# Of a trial call. Unlike any width in a model, so that a dimension of this size is known to count tokens.
NUM_TOKENS = 37
# How far the compiled and the plain layer may be apart: of what the layer adds to its input, or, where rounding of the
# input is more than that, so many steps of its precision.
TOLERANCE = 0.02
TOLERATED_STEPS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A decoder layer, by its path in the model, and what it was called with in the trial run."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # Paths in the layer of what adapters change. Empty = it is called without any.
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What compile_worker.py is told. Each part becomes a file NAME.compiled, or NAME.error that says why not."""

    folder: Path
    trust_remote_code: bool
    dtype: torch.dtype
    layout: Layout
    block_size: int
    parts: dict[str, Formula | LayerCall]


@dataclass(slots=True)
class _Trial:
    """A layer, a call of it, and what it returned."""

    layer: nn.Module
    call: LayerCall
    result: Any

    @property
    def make(self) -> str:
        """Equal for layers whose forward does the same: their classes, shapes and constants."""
        facts: list[Any] = [sorted(self.call.kwargs)]
        for name, module in self.layer.named_modules():
            constants = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
            constants.pop("layer_idx", None)
            constants.pop("adapted", None)  # None, where no adapter may change it
            facts.append((name, type(module).__name__, sorted(constants.items(), key=repr)))
        facts += [(name, tuple(p.shape)) for name, p in self.layer.named_parameters()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def with_one_token(self) -> "_Trial":
        """The same for the first token alone, whose result is its own."""

        def first(tensor: Tensor) -> Tensor:
            for dimension, size in enumerate(tensor.shape):
                tensor = tensor.narrow(dimension, 0, 1) if size == NUM_TOKENS else tensor
            return tensor

        args, kwargs, result = map_tensors(first, (self.call.args, self.call.kwargs, self.result))
        return _Trial(self.layer, replace(self.call, args=args, kwargs=kwargs), result)

    @property
    def with_adapters(self) -> "_Trial | None":
        """The same with adapters. None = they change nothing in it."""
        modules = self.layer.named_modules()
        adapted = tuple(path for path, inner in modules if isinstance(inner, ServedLinear) and inner.adapted)
        if not adapted:
            return None
        call = replace(self.call, adapted=adapted)
        with torch.inference_mode(), _standing_in(call):
            return _Trial(self.layer, call, self.layer(*call.args, **call.kwargs))

    @property
    def parts(self) -> dict[str, "_Trial"]:
        """What is compiled of it, and as what call: for any number of tokens, and, where products can become a part of
        it, for one token; each without adapters, and with them if there may be some.
        """
        parts = {f"layer-{self.make}": self}
        if (with_adapters := self.with_adapters) is not None:
            parts[f"layer-{self.make}-adapters"] = with_adapters
        if any(weight.form for weight in _weights(self.layer)):
            parts |= {f"{name}-1": trial.with_one_token for name, trial in parts.items()}
        return parts


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """tree: tensors in tuples, lists and dicts."""
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, each) for each in tree)
    return function(tree) if isinstance(tree, Tensor) else tree


class BackgroundCompiler:
    """Compiles what a runner spends its time on, and puts it to use while it serves.

    Make and start it before the first request: it runs the model once, and takes up what an earlier start has made.
    Then a thread of its own does the rest. Replacing a layer's forward, or adding a form of attention, is one
    assignment, and both ways compute the same, so it may happen in the middle of a step.
    """

    def __init__(
        self,
        model: LoadedModel,
        compiled_attention: CompiledAttention,
        *,
        block_size: int,
        trust_remote_code: bool,
    ) -> None:
        trials, forms = watch_calls(model)
        # Of each part: what tries its compiled form, and puts it to use, or gives False if it computes something else.
        self._uses: dict[str, Callable[[Callable[..., Any]], bool]] = {}
        parts: dict[str, Formula | LayerCall] = {}
        for name, formula, place in _formulas(model, forms, compiled_attention, block_size):
            parts[name], self._uses[name] = formula, partial(_use_formula, formula, place)
        of_layers: dict[str, list[_Trial]] = {}
        for trial in trials:
            for name, part in trial.parts.items():
                of_layers.setdefault(name, []).append(part)
        for name, same in of_layers.items():
            parts[name], self._uses[name] = same[0].call, partial(_use_layer, same)
        self._job = Job(model.facts.folder, trust_remote_code, model.dtype, model.layout, block_size, parts)
        self._folder = cache_folder(self._job)
        self._num_used = 0
        self._started_s = 0.0
        self._thread = threading.Thread(target=self._make_missing, name="nanoserve-compile", daemon=True)

    def start(self) -> None:
        """Use what is made, at once: loading it later would hold up requests. The rest begins in the background."""
        self._started_s = time.monotonic()
        with one_thread():
            self._use_parts(name for name in self._job.parts if _is_made(self._folder, name))
        self._thread.start()

    def wait(self) -> None:
        """Return when all that can be compiled is in use."""
        self._thread.join()

    def _make_missing(self) -> None:
        missing = [name for name in self._job.parts if not _is_made(self._folder, name)]
        if missing:
            logger.info("compiling for speed in the background; requests are served meanwhile")
            with one_thread():
                self._use_parts(make(self._job, missing, self._folder))
        seconds, num_parts = time.monotonic() - self._started_s, len(self._job.parts)
        logger.info("compiled parts are in use after %.1f s: %d of %d", seconds, self._num_used, num_parts)

    def _use_parts(self, names: Iterable[str]) -> None:
        try:
            with torch.inference_mode():
                for name in names:
                    part = _load(self._folder, name)
                    if part is not None and self._uses[name](part):
                        self._num_used += 1
        except Exception:
            logger.exception("compiling failed; serving goes on without")


def _use_formula(formula: Formula, place: Place, function: Callable[..., Any]) -> bool:
    if not formula.is_computed_by(function):
        return False
    table, key = place
    table[key] = function
    return True


def _use_layer(trials: Sequence[_Trial], run_layer: Callable[..., Any]) -> bool:
    good = [trial for trial in trials if _computes_the_same(trial, run_layer)]
    for trial in good:
        trial.layer.forward = _forward(run_layer, trial.layer, trial.call)
    return len(good) > 0


# ------------------------------------------------------------------------------------------- watching the model


def watch_calls(model: LoadedModel) -> tuple[list[_Trial], set[AttentionForm]]:
    """Run the model on a few tokens: the calls of its decoder layers, and the forms of attention."""
    trials: list[_Trial] = []
    forms = set()

    def note(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        trials.append(_Trial(layer, LayerCall(path, args, kwargs), result))

    def run_layer(_: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, sinks: Any) -> Tensor:
        forms.add(AttentionForm(q.shape[0], k.shape[0], k.shape[2], v.shape[2], scaling, softcap, sinks is not None))
        return stand_in(0, q, k, v, scaling, softcap, sinks)

    layers = decoder_layers(model.model)
    hooks = [layer.register_forward_hook(partial(note, path), with_kwargs=True) for path, layer in layers]
    token_ids = torch.arange(NUM_TOKENS)[None] % model.facts.vocab_size
    positions = torch.arange(NUM_TOKENS)[None] % model.facts.max_position
    with torch.inference_mode(), attending(run_layer):
        model.trunk(input_ids=token_ids, position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    return trials, forms


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of each item of a list of modules that has attention in it, outermost lists only."""
    inside: set[nn.Module] = set()
    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and modules not in inside:
            for index, layer in enumerate(modules):
                if any(hasattr(inner, "paged_index") for inner in layer.modules()):
                    inside.update(layer.modules())
                    yield f"{path}.{index}", layer


def _weights(module: nn.Module) -> Iterator[Weight]:
    return (inner for inner in module.modules() if isinstance(inner, Weight))


def _formulas(
    model: LoadedModel, forms: Iterable[AttentionForm], compiled_attention: CompiledAttention, block_size: int
) -> Iterator[tuple[str, Formula, Place]]:
    """What a model's steps can use, each with its name. forms: of its attention."""
    for weight in {weight.form: weight for weight in _weights(model.model) if weight.form}.values():
        yield from weight.formulas()
    if any(isinstance(module, ServedLinear) and module.adapted for module in model.model.modules()):
        yield from adapter_products.formulas(model.dtype)
    for i, form in enumerate(sorted(forms, key=repr)):
        yield f"attention-{i}", attention_formula(form, model.dtype, block_size), (compiled_attention, form)


# -------------------------------------------------------------------------------------------- making and loading


def cache_folder(job: Job) -> Path:
    """Where what a job makes is kept: one folder for each machine, each version of what compiles, and each model."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    facts: list[Any] = [platform.machine(), sorted(torch.cpu.get_capabilities().items()), sys.version]
    facts += [torch.__version__, transformers.__version__, job.dtype, job.layout, job.block_size]
    facts += [os.cpu_count(), TORCH_THREADS]
    facts += [(job.folder / "config.json").read_bytes(), *(source.read_bytes() for source in sources)]
    return compiled_folder() / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def make(job: Job, names: Sequence[str], folder: Path) -> Iterator[str]:
    """Have the worker make these parts. Yields each name as soon as its file is there.

    If this process dies, so does the worker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nanoserve.model.compile_worker", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        pickle.dump((job, names), worker.stdin)
        worker.stdin.flush()
        for line in worker.stdout:
            name = line.decode().strip()
            if name in names:  # a compiler may print too
                yield name
        if worker.wait() != 0:
            logger.warning("the process that compiles has failed: exit code %d", worker.returncode)


def _is_made(folder: Path, name: str) -> bool:
    return any((folder / f"{name}.{suffix}").exists() for suffix in ("compiled", "error"))


def _load(folder: Path, name: str) -> Callable[..., Any] | None:
    """None, and a line in the log, if it could not be compiled."""
    error = folder / f"{name}.error"
    if error.exists():
        logger.info("not compiled: %s", error.read_text())
        return None
    try:
        return load_compiled(folder / f"{name}.compiled", {"torch": torch, **vars(attend)})
    except Exception as exception:
        logger.warning("not compiled: %s cannot be loaded: %r", name, exception)
        return None


def _forward(run_layer: Callable[..., Any], layer: nn.Module, call: LayerCall) -> Callable[..., Any]:
    """The layer's forward, compiled, for steps like the call: with adapters or without, of one token or of any number.

    For others, and for good if it fails, as it was before.
    """
    before = layer.forward
    only_one_token, has_adapters = call.args[0].shape[1] == 1, bool(call.adapted)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_adapting() != has_adapters or (only_one_token and args[0].shape[1] != 1):
            return before(*args, **kwargs)
        try:
            return run_layer(layer, args, kwargs)
        except Exception:
            logger.exception("a compiled layer failed; it is served uncompiled from now on")
            layer.forward = before
            return before(*args, **kwargs)

    return forward


def _computes_the_same(trial: _Trial, run_layer: Callable[..., Any]) -> bool:
    """Whether a compiled layer gives what the layer gave."""
    with _standing_in(trial.call):
        layer = _with_trial_adapters(trial.layer, trial.call) if trial.call.adapted else trial.layer
        got = _first(run_layer(layer, trial.call.args, trial.call.kwargs)).float()
    hidden, want = trial.call.args[0], _first(trial.result).float()
    added = (want - hidden.float()).norm()
    rounding = TOLERATED_STEPS * torch.finfo(hidden.dtype).eps * hidden.float().norm()
    return bool((got - want).norm() <= TOLERANCE * added + rounding)


def _with_trial_adapters(layer: nn.Module, call: LayerCall) -> nn.Module:
    """A copy with the same weights: the adapters of the layer itself are in use."""

    def copied(module: nn.Module) -> nn.Module:
        new = copy.copy(module)
        new._modules = {name: child if child is None else copied(child) for name, child in module._modules.items()}
        return new

    layer = copied(layer)
    put_trial_adapters(layer, call.adapted, call.args[0].dtype)
    return layer


@contextmanager
def _standing_in(call: LayerCall) -> Iterator[None]:
    """Something takes the place of attention, and of adapters where the call is with them."""
    with attending(stand_in), adapting(trial_addition) if call.adapted else nullcontext():
        yield


def _first(out: Any) -> Tensor:
    """Some layers return a tuple."""
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first
