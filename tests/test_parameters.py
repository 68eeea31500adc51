"""A parameter of a request is named in few hand-written files: what carries it from one to the next loops over names.

The contract says what it means (generation.proto), request.py holds its default and its range, sampler.py does it, and
the client's requests.py shows it to people and type checkers. All that lies between needs no line for a new one.
"""

import dataclasses
import re
from pathlib import Path

import pytest
from nanoserve_client import GenerateOptions, Sampling
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.request import SAMPLING_RANGES, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("protos", "src", "clients/python/src", "gateway/openai/src")
MOST = 4

# What names a parameter for another reason than to carry it, by the begin of the path.
ENGINE, GATEWAY = "src/nanoserve/", "gateway/openai/src/nanoserve_gateway/"
CLIENT = "clients/python/src/nanoserve_client/"
TRACES = {ENGINE + "observability/": "OpenTelemetry has a name of its own for it"}
BENCH = {ENGINE + "bench/": "the benchmarks' requests have a fixed one"}
RULE = {ENGINE + "rpc/validate.py": "the contract has a rule for it that is no range"}
EXCEPTIONS: dict[str, dict[str, str]] = {
    "temperature": {
        **TRACES,
        **BENCH,
        ENGINE + "model/facts.py": "a checkpoint asks for greedy decoding by another field",
        ENGINE + "model/attention.py": "another temperature, that of Llama 4's attention",
        ENGINE + "model/probe.py": "the same",
        ENGINE + "llm.py": "an example for people",
        ENGINE + "cli/": "an example for people",
        GATEWAY + "responses.py": "OpenAI's response repeats it",
        GATEWAY + "fields.py": "log-probabilities are those before it",
        CLIENT + "results.py": "log-probabilities are those before it",
    },
    "top_p": {**TRACES, GATEWAY + "responses.py": "OpenAI's response repeats it"},
    "top_k": {
        **TRACES,
        ENGINE + "model/facts.py": "some checkpoints write -1 for off",
        GATEWAY: "vLLM's callers write -1 for off",
    },
    "frequency_penalty": TRACES,
    "presence_penalty": TRACES,
    "seed": {
        **TRACES,
        ENGINE + "engine/": "each sequence has its own: the engine draws the first, and adds the sequence's number",
        ENGINE + "model/facts.py": "no checkpoint chooses it",
        GATEWAY: "OpenAI's is signed",
        "protos/nanoserve/v1/model.proto": "a model's defaults have none",
        CLIENT + "results.py": "a comment on what can be repeated",
        ENGINE + "dialect/formats.py": "a family of models is called so",
    },
    "logit_bias": RULE,
    "min_tokens": {
        **RULE,
        ENGINE + "engine/": "stop strings and the context's room are the engine's",
    },
    "ignore_eos": {**RULE, **BENCH, ENGINE + "engine/": "what ends a sequence is the engine's"},
}


def hand_written() -> dict[str, set[str]]:
    """Path -> its words."""
    files = [path for folder in FOLDERS for kind in ("py", "proto") for path in (ROOT / folder).rglob(f"*.{kind}")]
    return {
        str(path.relative_to(ROOT)): set(re.findall(r"\w+", path.read_text()))
        for path in files
        if not re.search(r"_pb2(_grpc)?\.py$", path.name)
    }


WORDS = hand_written()
SAMPLING = [field.name for field in pb.Sampling.DESCRIPTOR.fields]
# Of Stopping, those that REST, the client and the engine call the same. The others have names of their own in places.
STOPPING = ["min_tokens", "ignore_eos"]


@pytest.mark.parametrize("name", SAMPLING + STOPPING)
def test_a_parameter_is_named_in_few_files(name: str) -> None:
    naming = {path for path, words in WORDS.items() if name in words}
    excused = tuple(EXCEPTIONS.get(name, ()))
    counted = sorted(path for path in naming if not path.startswith(excused))
    assert len(counted) <= MOST, counted


def test_what_is_excused_is_needed() -> None:
    for name, reasons in EXCEPTIONS.items():
        for begin in reasons:
            assert any(path.startswith(begin) and name in words for path, words in WORDS.items()), (name, begin)


def test_a_parameter_is_called_the_same_everywhere() -> None:
    """Contract, engine, client and what the client reports."""
    for kind in (SamplingParams, Sampling):
        assert set(SAMPLING) <= {field.name for field in dataclasses.fields(kind)}
    assert set(SAMPLING) <= GenerateOptions.__optional_keys__
    assert set(SAMPLING) - {"logit_bias"} == SAMPLING_RANGES.keys()
