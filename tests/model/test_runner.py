"""A step from plan to result: what is sampled, reported, found corrupt, and left as it was when a step fails."""

from pathlib import Path

import pytest
import torch
from families import VOCAB_SIZE, save_tiny_model, tiny_model
from feeder import BLOCK_SIZE, Feeder, admission, execute

from nanoserve.config import ModelOptions
from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model import loader
from nanoserve.model import runner as runner_module
from nanoserve.model.loader import LoadedModel, load_model
from nanoserve.model.runner import ModelRunner
from nanoserve.model.sampler import Sampler
from nanoserve.request import Failure, ScheduledSequence

CONTEXT = 64
PROMPTS = [[(7 * row + 3 * i) % (VOCAB_SIZE - 3) + 3 for i in range(CONTEXT)] for row in range(4)]
# Its embedding is NaN in `poisoned`.
POISON = 50


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelOptions(path=str(folder), dtype=dtype, device="cpu"))  # type: ignore[arg-type]


def load_damaged(folder: Path) -> LoadedModel:
    """What computes NaN: such weights are refused, but numbers may become too large while they are computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_refuse_damaged", lambda *_: None)
        return load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return load(folder)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("poisoned")
    model = tiny_model("mistral")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(folder)
    return load_damaged(folder)


@pytest.fixture
def feeder(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Feeder:
    return Feeder(llama, CONTEXT, monkeypatch)


def is_finite(cache: PagedKVCache) -> bool:
    return all(bool(kv.keys.isfinite().all() and kv.values.isfinite().all()) for kv in cache.layers)


# ------------------------------------------------------------------------------------------------- tokens


def test_only_sequences_that_sample_get_tokens(feeder: Feeder) -> None:
    sequences = [
        ScheduledSequence(1, 0, 1, feeder.block_tables[1][:1], False, admission(PROMPTS[1])),
        ScheduledSequence(3, 0, 3, feeder.block_tables[3][:1], True, admission(PROMPTS[3][:3])),
        ScheduledSequence(0, 0, 5, feeder.block_tables[0][:2], False, admission(PROMPTS[0])),
        ScheduledSequence(2, 0, 9, feeder.block_tables[2][:3], True, admission(PROMPTS[2][:9])),
    ]
    results = execute(feeder.runner, *sequences)
    assert [len(s.token_ids) for s in results] == [0, 1, 0, 1]
    ((rows, positions, logits),) = feeder.sampler.calls
    assert (rows, positions, logits.shape) == ([3, 2], [3, 9], (2, VOCAB_SIZE))
    assert set(feeder.sampler.admitted) == {0, 1, 2, 3}


def test_greedy_tokens_are_those_of_transformers(llama: LoadedModel) -> None:
    """With the real sampler, over several blocks."""
    prompt = PROMPTS[0][:6]
    cache = PagedKVCache(llama.kv_specs, 16, BLOCK_SIZE, llama.device)
    runner = ModelRunner(llama, cache, Sampler(VOCAB_SIZE, llama.device), 2, 99, CONTEXT)
    tokens, step, blocks = list(prompt), list(prompt), [9, 3]
    told = admission(prompt, temperature=0.0)
    for i in range(20):
        new = blocks if i == 0 else [10 - len(tokens) // 4] if len(tokens) % BLOCK_SIZE == 1 else []
        plan = ScheduledSequence(1, len(tokens) - len(step), len(step), new, True, told if i == 0 else None)
        (result,) = execute(runner, plan)
        step = result.token_ids
        tokens += step
    theirs = tiny_model("llama")
    with torch.inference_mode():
        want = theirs(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    assert tokens[6:] == want[5:-1]


def test_prompt_logprobs_are_those_of_the_prompt_tokens(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices that fit no step evenly, and with a target that the sampled token is not."""
    monkeypatch.setattr(runner_module, "PROMPT_LOGITS_AT_ONCE", 3 * VOCAB_SIZE)
    cache = PagedKVCache(llama.kv_specs, 16, BLOCK_SIZE, llama.device)
    runner = ModelRunner(llama, cache, Sampler(VOCAB_SIZE, llama.device), 1, 99, CONTEXT)
    prompt, logprobs = PROMPTS[0][:15], []
    told = admission(prompt, prompt_logprobs=2, temperature=0.0)
    for start, end, blocks in ((0, 8, [5, 1]), (8, 15, [2, 9])):
        num_logprobs = len(prompt[start + 1 : end + 1])
        new = told if start == 0 else None
        plan = ScheduledSequence(0, start, end - start, blocks, end == 15, new, num_logprobs)
        (result,) = execute(runner, plan)
        logprobs += result.prompt_logprobs
    with torch.inference_mode():
        want = tiny_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in logprobs] == prompt[1:]
    for position, entry in enumerate(logprobs):
        assert entry.logprob == pytest.approx(want[position, prompt[position + 1]].item(), abs=1e-4)
        assert [top.token_id for top in entry.top] == want[position].topk(2).indices.tolist()
    assert len(result.token_ids) == 1


# ------------------------------------------------------------------------------------------------- rows


def test_a_row_serves_one_sequence_after_another(feeder: Feeder) -> None:
    """The second is shorter, and takes other blocks."""
    execute(feeder.runner, ScheduledSequence(0, 0, 30, feeder.block_tables[0][:8], True, admission(PROMPTS[0][:30])))
    execute(feeder.runner, ScheduledSequence(0, 0, 9, feeder.block_tables[1][:3], False, admission(PROMPTS[1][:10])))
    execute(feeder.runner, ScheduledSequence(0, 9, 1, [], True))
    with torch.inference_mode():
        want = tiny_model("llama")(torch.tensor([PROMPTS[1][:10]])).logits[0, -1]
    torch.testing.assert_close(feeder.sampler.calls[-1][2][0], want, rtol=1e-4, atol=1e-4)


def test_a_step_that_fails_changes_nothing(feeder: Feeder, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder.step(PROMPTS, {0: 8})
    admitted = dict(feeder.sampler.admitted)

    def fail(**_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llama.trunk, "forward", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                feeder.step(PROMPTS, {0: 5, 1: 6})
            feeder.num_fed[:2] = [8, 0]
    assert feeder.sampler.admitted == admitted
    feeder.step(PROMPTS, {0: 5, 1: 6})
    feeder.step(PROMPTS, {0: 5, 1: 6})
    with torch.inference_mode():
        want = tiny_model("llama")(torch.tensor(PROMPTS[:2])).logits
    torch.testing.assert_close(feeder.all_logits(0, 0, 18), want[0, :18], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(feeder.all_logits(1, 0, 12), want[1, :12], rtol=1e-4, atol=1e-4)


def test_warming_up_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model whose token 0 is not all zeros, as a padding token is."""
    save_tiny_model("gpt2", tmp_path)
    feeder = Feeder(load(tmp_path), CONTEXT, monkeypatch)
    feeder.runner.warm_up()
    assert not any(kv.keys.any() or kv.values.any() for kv in feeder.cache.layers)
    assert not feeder.sampler.admitted
    assert not feeder.sampler.calls


# ------------------------------------------------------------------------------------------------- corruption


@pytest.mark.parametrize("poison_at", [0, 4, 19])
def test_nan_fails_its_own_sequence_alone(
    poisoned: LoadedModel, poison_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chunk that does not sample, a single token and a chunk that does, beside healthy ones of each kind.

    With a window of 11 the last token of a chunk need not show what is wrong with the first.
    """
    feeder = Feeder(poisoned, CONTEXT, monkeypatch)
    prompts = [[token for token in prompt if token != POISON] for prompt in PROMPTS]
    sick = list(prompts[2])
    sick[20 + poison_at] = POISON
    feeder.step([prompts[0], prompts[1], sick, prompts[3]], {0: 9, 1: 4, 2: 20})
    result = feeder.step([prompts[0], prompts[1], sick, prompts[3]], {0: 1, 1: 20, 2: 20, 3: 5})
    assert [s.failure for s in result.sequences] == [None, None, None, Failure.CORRUPT]
    assert is_finite(feeder.cache)
    healthy = Feeder(poisoned, CONTEXT, monkeypatch)
    healthy.step(prompts, {0: 9, 1: 4, 2: 20})
    healthy.step(prompts, {0: 1, 1: 20, 2: 20, 3: 5})
    for row, end in ((0, 10), (1, 24), (3, 5)):
        assert torch.equal(feeder.all_logits(row, 0, end), healthy.all_logits(row, 0, end))


def test_the_blocks_of_a_corrupt_sequence_can_serve_another(
    poisoned: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeder = Feeder(poisoned, CONTEXT, monkeypatch)
    feeder.block_tables[1] = list(feeder.block_tables[0])
    prompts = [[token for token in prompt if token != POISON] for prompt in PROMPTS]
    feeder.step([[*prompts[0][:5], POISON, *prompts[0][6:]]], {0: 30})
    feeder.step(prompts, {1: 9})
    feeder.step(prompts, {1: 1})
    clean = Feeder(poisoned, CONTEXT, monkeypatch)
    clean.step(prompts, {1: 9})
    clean.step(prompts, {1: 1})
    assert torch.equal(feeder.all_logits(1, 0, 10), clean.all_logits(1, 0, 10))


def test_a_corrupt_sequence_is_not_sampled(poisoned: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder = Feeder(poisoned, CONTEXT, monkeypatch)
    result = feeder.step([[POISON], [4], [POISON]], {0: 1, 1: 1, 2: 1}, samples=True)
    assert [s.failure for s in result.sequences] == [Failure.CORRUPT, None, Failure.CORRUPT]
    assert [len(s.token_ids) for s in result.sequences] == [0, 1, 0]
    assert [rows for rows, _, _ in feeder.sampler.calls] == [[1]]


def test_nan_in_the_head_is_found_by_sampler_and_prompt_logprobs(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[9] = torch.nan
    model.save_pretrained(tmp_path)
    ours = load_damaged(tmp_path)
    cache = PagedKVCache(ours.kv_specs, 16, BLOCK_SIZE, ours.device)
    runner = ModelRunner(ours, cache, Sampler(VOCAB_SIZE, ours.device), 2, 99, CONTEXT)
    prompt = PROMPTS[0][:4]
    results = execute(
        runner,
        ScheduledSequence(0, 0, 4, [1], True, admission(prompt)),
        ScheduledSequence(1, 0, 4, [2], False, admission(prompt, prompt_logprobs=1), 3),
    )
    assert [s.failure for s in results] == [Failure.CORRUPT, Failure.CORRUPT]


# ------------------------------------------------------------------------------------------------- the process


def test_bfloat16_runs_and_stays_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = save_tiny_model("qwen3", tmp_path)
    feeder = Feeder(load(tmp_path, "bfloat16"), CONTEXT, monkeypatch)
    feeder.step(PROMPTS, {0: 20, 1: 3})
    feeder.step(PROMPTS, {0: 1, 1: 30})
    with torch.inference_mode():
        want = theirs(torch.tensor(PROMPTS[:2])).logits
    error = (feeder.all_logits(0, 0, 21).float() - want[0, :21]).abs().mean() / want.abs().mean()
    assert error < 0.05
