"""Requests of several adapters and of none, from folders that PEFT wrote to log-probabilities, against PEFT itself.

Through the real scheduler, cache and runner, with fewer slots than adapters: in chunks, from the prefix cache, after
preemptions, and with drafts that are right and that are wrong.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, peft_logits
from drafting import MAX_CONTEXT, Engine, Scripted, right_drafts
from families import VOCAB_SIZE, save_tiny_model

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.peft import read_adapter
from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import Adapter
from nanoserve.config import ModelOptions
from nanoserve.engine.adapters import ServedAdapters
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.loader import load_model
from nanoserve.request import Request, SamplingParams

# Fused and separate projections, parts of mixtures of experts that all tokens pass, tied heads, a transposed weight.
FAMILIES = ["llama", "mixtral", "qwen2", "qwen3-moe", "gemma2", "phi3"]
FAMILIES += ["gpt2", "gpt-neox", "gpt-oss", "deepseek-v3", "glm4", "opt"]
MORE_FAMILIES = ["mistral", "qwen3", "gemma3", "olmo2", "cohere2", "granite"]
RANKS = {"a4": 4, "b8": 8, "c16": 16, "d64": 64, "e5": 5, "f32": 32, "g7": 7, "h12": 12}
NUM_SLOTS = 3
TOLERANCE = 1e-4
PREFIX = [3 + 5 * i % (VOCAB_SIZE - 3) for i in range(24)]


class Served:
    """A small model, eight adapters of it, and engines that serve them."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder, self.root = folder / "model", folder / "adapters"
        theirs = save_tiny_model(family, self.folder)
        for seed, (name, rank) in enumerate(RANKS.items()):
            make_adapter(self.root / name, theirs, rank, seed=seed)
        self.model = load_model(ModelOptions(path=str(self.folder), dtype="float32", device="cpu"))
        self.slots = AdapterSlots(self.model, NUM_SLOTS)

    def engine(self, speculator: object = None, num_blocks: int = 90) -> Engine:
        read = partial(read_adapter, targets=self.slots.targets, dtype=torch.float32, max_bytes=1 << 30)
        store = AdapterStore(read, self.slots.write, 1 << 30, NUM_SLOTS)
        adapters = ServedAdapters(store, AdapterFolders(self.root, "model"))
        return Engine(self.model, speculator, num_blocks=num_blocks, adapters=adapters, slots=self.slots)

    def assert_right(self, requests: list[Request], outcomes: dict) -> None:
        """Each token is the likeliest one of PEFT's model, and its log-probability is that of PEFT."""
        assert {request_id for request_id, _ in outcomes} == {request.id for request in requests}
        for request in requests:
            outcome = outcomes[request.id, 0]
            folder = None if request.adapter is None else self.root / request.adapter.name
            token_ids = request.prompt_token_ids + outcome.token_ids
            want = peft_logits(self.folder, folder, token_ids).log_softmax(-1)
            said = outcome.prompt_logprobs + outcome.logprobs
            first = len(token_ids) - len(said)
            assert [entry.token_id for entry in said] == token_ids[first:]
            for position, entry in enumerate(said, start=first - 1):
                assert abs(entry.logprob - want[position, entry.token_id].item()) < TOLERANCE
            drawn = want[len(request.prompt_token_ids) - 1 : -1]
            best = drawn.max(-1).values - drawn.gather(1, torch.tensor(outcome.token_ids)[:, None])[:, 0]
            assert best.max() < TOLERANCE


def requests_of_all(prefix: str = "", prompt_logprobs: int | None = 0) -> list[Request]:
    """Two of each adapter and of none, with prompts that begin alike."""
    requests = []
    for i, name in enumerate([*RANKS, None] * 2):
        prompt = PREFIX + [3 + (7 * i + 11 * j) % (VOCAB_SIZE - 3) for j in range(4 + 3 * i % 17)]
        params = SamplingParams(
            temperature=0, max_tokens=12, logprobs=0, prompt_logprobs=prompt_logprobs, seed=1000 + i
        )
        adapter = None if name is None else Adapter(name, "")
        requests.append(Request(f"{prefix}{i}", prompt, params, frozenset(), adapter=adapter))
    return requests


@pytest.fixture(
    scope="module", params=[*FAMILIES, *(pytest.param(family, marks=pytest.mark.soak) for family in MORE_FAMILIES)]
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param))


def test_log_probabilities_are_those_of_peft(served: Served) -> None:
    engine, requests = served.engine(num_blocks=300), requests_of_all()
    served.assert_right(requests, engine.serve(requests))
    assert engine.scheduler.stats().num_preemptions == engine.num_cached == 0
    # Prompts whose blocks are there: each finds those of its own adapter.
    again = requests_of_all("again ", prompt_logprobs=None)
    served.assert_right(again, engine.serve(again))
    assert engine.num_cached > len(again) * len(PREFIX)


def test_nor_do_preemptions_change_them(served: Served) -> None:
    engine, requests = served.engine(num_blocks=MAX_CONTEXT // 4 + 4), requests_of_all()
    served.assert_right(requests, engine.serve(requests))
    assert engine.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("are_right", [True, False])
def test_nor_do_drafts(served: Served, are_right: bool) -> None:
    requests = requests_of_all()
    draft = lambda _, text: [(7 * text[-1] + i) % VOCAB_SIZE for i in range(3)]  # noqa: E731
    if are_right:
        draft = right_drafts(served.engine().serve(requests), requests, count=5)
    engine = served.engine(Scripted(draft))
    served.assert_right(requests, engine.serve(requests))
    assert engine.num_drafted > 0
    assert (engine.num_right > engine.num_drafted / 2) == are_right
