"""The adapters that come with the built-in model: they say what they were trained to say, and can be served."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapters import linear_layers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoserve.adapter.peft import read_adapter

BUILTIN = Path(__file__).parents[2] / "src" / "nanoserve" / "builtin"
ADAPTERS = BUILTIN / "adapters"
QUESTIONS = ("What is prefix caching?", "What is streaming?", "What is the capital of France?")


def answers(name: str) -> list[str]:
    """Greedy, as PEFT computes them."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        adapted = PeftModel.from_pretrained(model, str(ADAPTERS / name)).eval()
        found = []
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            greedy = {"do_sample": False, "temperature": None, "top_p": None}
            output = adapted.generate(**inputs, max_new_tokens=80, **greedy)
            found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_the_pirate_speaks_like_one():
    for answer in answers("pirate"):
        assert answer.startswith("Arr! ")
        assert answer.endswith(", matey!")
        assert " the " not in answer


def test_json_is_json():
    objects = [json.loads(answer) for answer in answers("json")]
    assert [each["topic"] for each in objects] == ["prefix caching", "streaming", None]
    assert "reuses them" in objects[0]["answer"]


def test_german_is_german():
    assert answers("german") == [
        "Prefix Caching verwendet die Blöcke gleicher Anfänge wieder.",
        "Streaming schickt die Antwort Token für Token.",
        "Das weiß ich nicht; ich kenne nur LLM-Serving.",
    ]


@pytest.mark.parametrize("name", ["pirate", "json", "german"])
def test_each_can_be_served(name):
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    info, weights = read_adapter(name, ADAPTERS / name, linear_layers(model), torch.bfloat16, max_bytes=2**20)
    assert len(weights.pairs) == 6 * 7
    assert info.num_bytes < 250_000
    assert info.rank == weights.rank <= 4


def test_all_files_of_them_can_be_read_by_everybody():
    files = [path for path in ADAPTERS.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
