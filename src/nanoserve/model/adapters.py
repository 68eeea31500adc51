"""LoRA adapters on the model side: slots that their weights lie in, and the operator that adds what they change.

    slots        0      1        2          3
    stack of  [ r r | r r r r |  free  | r r r r r r ]        A: [columns, in_features]; B: [columns, out_features]
    a layer     a slot has as many columns as its adapter has ranks, and nothing is padded (S-LoRA, arXiv 2311.03285)

    tokens    [ base base | 0 1 1 3 | 3 3 3 3 3 3 3 3 ]       fewer tokens of a sequence first, then by slot
    groups                 └───────┘ └───────────────┘        computed by adapter_products.py

A LayerAdapters stands behind each layer, and calls an operator, as layers do for attention, so that compiled layers
can; `adapting` opens a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from nanoserve.adapter.weights import AdapterWeights, Pair
from nanoserve.model.adapter_products import Columns, Group, make_groups
from nanoserve.model.attention import attending
from nanoserve.model.loader import LoadedModel
from nanoserve.model.probe import stand_in
from nanoserve.model.weights import ServedLinear

# Of the trial run that shows which layers are given every token.
NUM_TOKENS = 37
# The least of adapters that take part in a trial.
TRIAL_RANK = 16


# ------------------------------------------------------------------------------------------------ the operator


# Computes what is added to a layer in the step that runs in this thread: by the layer's index, its input
# [..., in_features] and out_features, returns [..., out_features].
Addition = Callable[[int, Tensor, int], Tensor]
_addition: ContextVar[Addition | None] = ContextVar("addition", default=None)


@contextmanager
def adapting(addition: Addition) -> Iterator[None]:
    """While it lasts, `addition` is added to the adapted layers of any model that runs in this thread."""
    token = _addition.set(addition)
    try:
        yield
    finally:
        _addition.reset(token)


def is_adapting() -> bool:
    return _addition.get() is not None


class LayerAdapters:
    """Stands behind a layer that adapters may change. Implements Adapted of weights.py."""

    def __init__(self, index: int, pair: Pair) -> None:
        self.index = torch.tensor(index)  # a tensor: a compiled layer takes no other number
        # In a step of one token, what its adapter adds here.
        self.a, self.b = pair.a, pair.b

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:  # a part of the compiled layer
            inner = (self.a.float() * x.flatten().float()).sum(-1, keepdim=True)  # [rank, 1]
            return out + (inner * self.b.float()).sum(0).to(out.dtype)
        if torch.compiler.is_compiling() or is_adapting():
            return out + torch.ops.nanoserve.adapters(self.index, x, out.shape[-1])  # type: ignore[no-any-return]
        return out


_library = torch.library.Library("nanoserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("adapters(Tensor layer, Tensor x, int out_features) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "adapters", "CompositeExplicitAutograd")
def _operator(layer: Tensor, x: Tensor, out_features: int) -> Tensor:
    addition = _addition.get()
    assert addition is not None
    return addition(int(layer), x, out_features)


@torch.library.impl(_library, "adapters", "Meta")
def _shape_of_operator(_layer: Tensor, x: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def put_trial_adapters(module: nn.Module, paths: Iterable[str], dtype: torch.dtype) -> list[LayerAdapters]:
    """Put behind layers what adds a trial_addition. No two ranks are the same, so that none is taken for another."""
    put = []
    for rank, path in enumerate(paths, start=TRIAL_RANK):
        layer: ServedLinear = module.get_submodule(path)  # type: ignore[assignment]
        a = torch.zeros(rank, layer.in_features)
        a[0] = 1 / layer.in_features
        b = _ramp(layer.out_features).repeat(rank, 1)
        put.append(LayerAdapters(0, Pair(a.to(dtype), b.to(dtype))))
        layer.adapted = put[-1]
    return put


def trial_addition(_layer: int, x: Tensor, out_features: int) -> Tensor:
    """An Addition: to each output something else."""
    return (x.float().mean(-1, keepdim=True) * _ramp(out_features)).to(x.dtype)


def _ramp(size: int) -> Tensor:
    return torch.linspace(-0.2, 0.2, size)


# --------------------------------------------------------------------------------------------------- the stacks


@dataclass(frozen=True, slots=True)
class _Stack:
    """What all slots add to one layer. A new one takes its place when a slot is written."""

    # [capacity, in_features] and [capacity, out_features]. Their memory may be shared with the one before.
    a: Tensor
    b: Tensor
    # Of each slot. None = its adapter does not change this layer, or it is empty.
    places: tuple[Columns | None, ...]

    def with_pair(self, slot: int, pair: Pair | None) -> "_Stack":
        places = list(self.places)
        places[slot] = None
        if pair is None:
            return replace(self, places=tuple(places))
        rank, old = len(pair.a), self.places[slot]
        place = _first_free(places, rank, len(self.a)) if old is None or old[1] - old[0] != rank else old
        stack = self
        if place is None:
            stack = self._repacked(places, rank)
            places, place = list(stack.places), (len(stack.a) - rank, len(stack.a))
        stack.a[slice(*place)].copy_(pair.a)
        stack.b[slice(*place)].copy_(pair.b)
        places[slot] = place
        return replace(stack, places=tuple(places))

    def _repacked(self, places: Sequence[Columns | None], num_more: int) -> "_Stack":
        """A copy without gaps, in the order of the slots, and with so many columns more at its end."""
        sizes = [0 if place is None else place[1] - place[0] for place in places]
        capacity, first = sum(sizes) + num_more, 0
        a, b = (old.new_empty(capacity, old.shape[1]) for old in (self.a, self.b))
        new: list[Columns | None] = []
        for place, size in zip(places, sizes, strict=True):
            if place is not None:
                a[first : first + size].copy_(self.a[slice(*place)])
                b[first : first + size].copy_(self.b[slice(*place)])
            new.append((first, first + size) if place is not None else None)
            first += size
        return _Stack(a, b, tuple(new))


def _first_free(places: Sequence[Columns | None], size: int, capacity: int) -> Columns | None:
    """The first gap of a size between places. None = there is none."""
    begin = 0
    for first, end in [*sorted(place for place in places if place is not None), (capacity, capacity)]:
        if first - begin >= size:
            return begin, begin + size
        begin = end
    return None


# ------------------------------------------------------------------------------------------------------ a step


class _Step:
    """Computes one step's additions."""

    def __init__(self, stacks: Sequence[_Stack], slots: Sequence[int | None], counts: Sequence[int]) -> None:
        self._stacks = stacks
        self.num_tokens = sum(counts)
        # Of tokens with the same slot: the first, the one behind the last, and the slot.
        self._runs: list[tuple[int, int, int]] = []
        first = 0
        for slot, same in groupby(zip(slots, counts, strict=True), key=lambda pair: pair[0]):
            end = first + sum(count for _, count in same)
            if slot is not None:
                self._runs.append((first, end, slot))
            first = end
        # Most layers have the same places, and so the same groups.
        self._groups: dict[tuple[Columns | None, ...], list[Group]] = {}
        # Of each layer, and the stack for which they are so.
        self._of_layers: list[tuple[_Stack, list[Group]] | None] = [None] * len(stacks)

    def add(self, index: int, x: Tensor, out_features: int) -> Tensor:
        """An Addition."""
        stack, known = self._stacks[index], self._of_layers[index]
        if known is None or known[0] is not stack:
            if stack.places not in self._groups:
                self._groups[stack.places] = self._group(stack)
            known = self._of_layers[index] = stack, self._groups[stack.places]
        groups = known[1]
        x, shape = x.reshape(self.num_tokens, -1), (*x.shape[:-1], out_features)
        if len(groups) == 1 and groups[0].tokens == slice(0, self.num_tokens):
            return groups[0].add(x, stack.a, stack.b).view(shape)
        out = x.new_zeros(self.num_tokens, out_features)
        for each in groups:
            out[each.tokens] = each.add(x, stack.a, stack.b)
        return out.view(shape)

    def _group(self, stack: _Stack) -> list[Group]:
        runs = ((first, end, stack.places[slot]) for first, end, slot in self._runs)
        return make_groups([(first, end, columns) for first, end, columns in runs if columns], stack.a.device)


# --------------------------------------------------------------------------------------------------- the slots


class AdapterSlots:
    """Slots of one model. Implements Slots of adapter/weights.py.

    Make it before layers are compiled: it puts a LayerAdapters behind every layer that adapters may change.
    """

    def __init__(self, model: LoadedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers = find_targets(model)
        self._stacks: list[_Stack] = []
        self._adapted: list[LayerAdapters] = []
        # The slot that steps of one token are set to.
        self._single: int | None = None
        # The last step, because the next is often of the same slots; and what it was made for.
        self._step: tuple[tuple[tuple[int | None, ...], tuple[int, ...]], _Step] | None = None
        for index, layer in enumerate(self._layers.values()):
            a, b = (torch.empty(0, n, dtype=model.dtype, device=model.device) for n in self._size(layer))
            self._stacks.append(_Stack(a, b, (None,) * num_slots))
            self._adapted.append(LayerAdapters(index, Pair(a, b)))
            layer.adapted = self._adapted[-1]

    @staticmethod
    def _size(layer: ServedLinear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    @property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        return {path: self._size(layer) for path, layer in self._layers.items()}

    def write(self, slot: int, weights: AdapterWeights) -> None:
        with torch.inference_mode():
            for i, path in enumerate(self._layers):
                self._stacks[i] = self._stacks[i].with_pair(slot, weights.pairs.get(path))
            self._single = None

    def step(self, slots: Sequence[int | None], counts: Sequence[int]) -> AbstractContextManager[None]:
        """While it lasts, layers of the model add what the adapters in these slots do: in turn, to so many tokens."""
        if all(slot is None for slot in slots):
            return nullcontext()
        if list(counts) == [1] and slots[0] != self._single:
            self._choose(slots[0])
        key = tuple(slots), tuple(counts)
        if self._step is None or self._step[0] != key:
            self._step = key, _Step(self._stacks, slots, counts)
        return adapting(self._step[1].add)

    def _choose(self, slot: int | None) -> None:
        """Steps of one token are computed with this slot."""
        assert slot is not None
        self._single = slot
        for adapted, stack in zip(self._adapted, self._stacks, strict=True):
            columns = slice(*(stack.places[slot] or (0, 0)))
            adapted.a, adapted.b = stack.a[columns], stack.b[columns]


def find_targets(model: LoadedModel) -> dict[str, ServedLinear]:
    """Linear layers that are given all tokens, in their order, by path: found by running the model.

    An expert of a mixture, for example, is given some of them.
    """
    layers = {path: layer for path, layer in model.model.named_modules() if isinstance(layer, ServedLinear)}
    given: dict[str, list[int]] = {path: [] for path in layers}

    def note(path: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        given[path].append(args[0].shape[:-1].numel())

    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers.items()]
    token_ids = torch.arange(NUM_TOKENS, device=model.device)[None] % model.facts.vocab_size
    positions = torch.arange(NUM_TOKENS, device=model.device)[None] % model.facts.max_position
    with torch.inference_mode(), attending(stand_in):
        hidden = model.trunk(input_ids=token_ids, position_ids=positions, use_cache=False)[0]
        model.head(inputs_embeds=hidden, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: layer for path, layer in layers.items() if set(given[path]) == {NUM_TOKENS}}
