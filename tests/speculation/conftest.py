import pytest
from families import VOCAB_SIZE, save_tiny_model

from nanoserve.config import ModelOptions
from nanoserve.model.loader import load_model
from nanoserve.speculation import speculator
from nanoserve.speculation.payoff import Prospect, StepTimes


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", folder)
    return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def draft_models(tmp_path_factory, model):
    """Models that draft: the same, another of as many tokens, one of fewer, and one whose context ends early."""

    def load(name, family, **changes):
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(family, folder, **changes)
        return load_model(ModelOptions(path=str(folder), dtype="float32", device="cpu"))

    return {
        "itself": model,
        "another model": load("other", "llama", num_hidden_layers=1),
        "a narrower model": load("narrow", "llama", vocab_size=VOCAB_SIZE - 10),
        "a wider model": load("wide", "llama", vocab_size=VOCAB_SIZE + 10),
        "a short model": load("short", "llama", max_position_embeddings=30),
    }


@pytest.fixture
def whatever_it_costs(monkeypatch):
    """With a model of this size no draft pays."""
    monkeypatch.setattr(speculator, "may_pay", lambda _times, _num, most: most > 0)
    monkeypatch.setattr(speculator, "choose_counts", lambda _times, _num, chances: list(map(len, chances)))
    monkeypatch.setattr(
        speculator, "may_guess_more", lambda *others, **_: any(prospect.room for prospect in others[-1])
    )
    monkeypatch.setattr(StepTimes, "expect", lambda *_: 1.0)
    monkeypatch.setattr(Prospect, "worth", lambda prospect, *_: prospect.room * 100)
