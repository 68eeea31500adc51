"""On a CUDA device: every family in bfloat16, and what a user meets. In float32, test_equivalence tries it too."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, LONGEST, VOCAB_SIZE, save_tiny_model
from feeder import Feeder
from nanoserve_client import Client
from serve_process import serving

from nanoserve import LLM, SamplingParams
from nanoserve.config import ConfigError, ModelOptions
from nanoserve.kv_cache.paged_kv_cache import GIB, KVSpec, PagedKVCache, plan_kv
from nanoserve.model.loader import load_model

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu

# Of the largest logit, at the median position: a rounding may send a token to another expert.
TOLERANCE = 0.05
QUESTIONS = ["What is paged attention?", "What is TTFT?", "Hello!"]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_float32_but_for_rounding(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = save_tiny_model(family, tmp_path)
    ours = load_model(ModelOptions(path=str(tmp_path), dtype="bfloat16", device="cuda"))
    prompts = [[3 + (5 + row) * i % (VOCAB_SIZE - 3) for i in range(LONGEST)] for row in range(3)]
    feeder = Feeder(ours, LONGEST, monkeypatch)
    feeder.step(prompts, {0: LONGEST - 1})
    feeder.step(prompts, {0: 1, 1: 1, 2: 30})
    feeder.step(prompts, {1: 1, 2: LONGEST - 30})
    with torch.inference_mode():
        want = theirs(torch.tensor(prompts)).logits
    for row in range(3):
        num_fed = feeder.num_fed[row]
        error = (feeder.all_logits(row, 0, num_fed).float().cpu() - want[row, :num_fed]).abs().amax(-1)
        assert float(error.median() / want.abs().max()) < TOLERANCE


def test_greedy_answers_are_those_of_the_cpu() -> None:
    answers = []
    for device in ("cpu", "cuda"):
        with LLM(device=device, dtype="float32", kv_memory_bytes=64 << 20) as llm:
            outputs = llm.chat(QUESTIONS, SamplingParams(temperature=0, max_tokens=48))
            answers.append([output.text for output in outputs])
    assert answers[0] == answers[1]


def test_a_seed_draws_the_same_again_beside_others() -> None:
    params = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=7, max_tokens=24, logprobs=3
    )
    with LLM(device="cuda", dtype="float32", kv_memory_bytes=64 << 20) as llm:
        (alone,) = llm.chat(QUESTIONS[0], params)
        together = llm.chat(QUESTIONS, params)
    assert together[0].text == alone.text
    assert len({output.text for output in together}) == len(QUESTIONS)


def test_without_a_size_the_cache_takes_most_of_the_device_and_fits() -> None:
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info(device)
    specs = [KVSpec(8, 128, 128, torch.bfloat16)] * 28
    plan = plan_kv(specs, 16, None, None, 1 << 20, 4096, device)
    assert 0.8 * free < plan.num_bytes < free - GIB
    cache = PagedKVCache(plan.specs, plan.num_blocks, plan.block_size, device)
    assert not cache.layers[-1].values[-1].any()
    del cache
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:64"}, "there is no device cuda:64: this machine has [0-9]+ CUDA device"),
        ({"device": "cuda", "kv_memory_bytes": 1 << 40}, "the device has too little memory: [^\n]*; lower --kv-memory"),
    ],
)
def test_what_the_device_does_not_have_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**options)


def test_it_is_served() -> None:
    with serving("--device", "cuda", "--kv-memory", "256MiB") as server:
        server.wait_for(" on cuda")
        with Client(server.address) as client:
            reply = client.chat("What is TTFT?", temperature=0, max_tokens=16, ignore_eos=True)
            assert reply.result().usage.completion_tokens == 16
