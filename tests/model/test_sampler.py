"""The sampler: distributions as in transformers, edits, log-probabilities, and rows that do not feel each other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from nanoserve.model import sampler as module
from nanoserve.model.sampler import Place, Sampler, draw, most_likely, token_logprobs, uniform
from nanoserve.request import Admission, Failure, SamplingParams, SequenceResult

CPU = torch.device("cpu")
VOCAB = 60
GRID = 1000
INF = math.inf
NAN = math.nan

GREEDY = SamplingParams(temperature=0)


def admission(
    params: SamplingParams, *, seed: int = 1, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), ends=()
) -> Admission:
    return Admission(params, seed, [*prompt, *output], len(prompt), frozenset(ends))


def sampler_of(*admissions: Admission, vocab: int = VOCAB) -> Sampler:
    """Row i has admission i."""
    sampler = Sampler(vocab, CPU)
    for row, entry in enumerate(admissions):
        sampler.admit(row, entry)
    return sampler


def sample(sampler: Sampler, rows: list[int], positions: list[int], logits: Tensor) -> list[SequenceResult]:
    """At one place of each row, and what is drawn there is kept."""
    places = [Place(row, position) for row, position in zip(rows, positions, strict=True)]
    results = sampler.sample(places, logits)
    sampler.keep({place.row: result.token_ids for place, result in zip(places, results, strict=True)})
    return results


def draw_once(params: SamplingParams, logits: list[float] | Tensor, position: int = 1, **more) -> SequenceResult:
    logits = torch.as_tensor(logits)
    sampler = sampler_of(admission(params, **more), vocab=len(logits))
    return sample(sampler, [0], [position], logits[None])[0]


def token_of(params: SamplingParams, logits: list[float] | Tensor, position: int = 1, **more) -> int:
    return draw_once(params, logits, position, **more).token_ids[0]


def some_logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def drawn_shares(monkeypatch: pytest.MonkeyPatch, entry: Admission, logits: Tensor) -> Tensor:
    """The distribution that `sample` draws from, to 1 / GRID: its noise goes evenly through [0, 1).

    Each token owns one interval of [0, 1), so its share of the grid is its probability to one grid point.
    """
    monkeypatch.setattr(module, "uniform", lambda _, position: (position - len(entry.token_ids) + 0.5) / GRID)
    sampler = sampler_of(*[entry] * GRID, vocab=len(logits))
    positions = [len(entry.token_ids) + i for i in range(GRID)]
    results = sample(sampler, list(range(GRID)), positions, logits.expand(GRID, -1))
    tokens = torch.tensor([result.token_ids[0] for result in results])
    return torch.bincount(tokens, minlength=len(logits)) / GRID


def reference(params: SamplingParams, logits: Tensor, entry: Admission) -> Tensor:
    """Probabilities by transformers' processors, in the order of the contract."""
    ids = torch.tensor([entry.token_ids])
    steps: list[object] = []
    if params.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.logit_bias:
        steps.append(hf.SequenceBiasLogitsProcessor([[[i], b] for i, b in params.logit_bias.items()]))
    if params.min_tokens:
        steps.append(
            hf.MinNewTokensLengthLogitsProcessor(
                entry.num_prompt_tokens, params.min_tokens, list(entry.end_token_ids), device="cpu"
            )
        )
    steps.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(hf.MinPLogitsWarper(params.min_p))
    return hf.LogitsProcessorList(steps)(ids, logits[None].clone())[0].softmax(-1)


# ------------------------------------------------------------------------------- distributions: transformers agrees


FILTERS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.4),
    "hot": SamplingParams(temperature=7.0),
    "top_k": SamplingParams(top_k=5),
    "top_k 1": SamplingParams(top_k=1),
    "top_k all": SamplingParams(top_k=VOCAB),
    "top_k more than all": SamplingParams(top_k=VOCAB + 9),
    "top_p": SamplingParams(top_p=0.8),
    "top_p tiny": SamplingParams(top_p=1e-6),
    "top_p almost one": SamplingParams(top_p=0.999, temperature=4.0),
    "top_p and top_k of all": SamplingParams(top_p=0.8, top_k=VOCAB),
    "min_p": SamplingParams(min_p=0.05),
    "min_p 1": SamplingParams(min_p=1.0),
    "top_k and top_p": SamplingParams(top_k=10, top_p=0.7),
    "top_p and min_p": SamplingParams(top_p=0.95, min_p=0.1, temperature=2.0),
    "everything": SamplingParams(temperature=1.7, top_k=20, top_p=0.9, min_p=0.02),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition below one": SamplingParams(repetition_penalty=0.6, top_p=0.9),
    "bias": SamplingParams(logit_bias={3: 4.0, 7: -2.5, 0: 1.0}),
    "min_tokens": SamplingParams(min_tokens=4, top_k=12),
    "all edits": SamplingParams(repetition_penalty=1.3, logit_bias={5: 3.0}, min_tokens=3, temperature=0.8, top_p=0.9),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("num_candidates", [4, 1024], ids=["few candidates", "many candidates"])
def test_distribution_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, name: str, num_candidates: int) -> None:
    monkeypatch.setattr(module, "NUM_CANDIDATES", num_candidates)
    monkeypatch.setattr(module, "CANDIDATE_GROWTH", 3)
    params = FILTERS[name]
    # The grid moves positions on, so what depends on the position must hold for all of them.
    params = replace(params, min_tokens=params.min_tokens and 2 * GRID)
    entry = admission(params, prompt=(1, 2, 2, 9), output=(3, 3, 1), ends=(5, 11))
    logits = some_logits(VOCAB, seed=len(name))
    expected = reference(params, logits, entry)

    shares = drawn_shares(monkeypatch, entry, logits)

    assert (shares - expected).abs().max() <= 1.5 / GRID
    assert not (shares > 0)[expected == 0].any()


def test_nucleus_may_be_wider_than_the_first_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = some_logits(3000, spread=0.1)
    entry = admission(SamplingParams(top_p=0.5))
    expected = reference(entry.params, logits, entry)
    assert (expected > 0).sum() > module.NUM_CANDIDATES

    shares = drawn_shares(monkeypatch, entry, logits)

    assert (shares - expected).abs().max() <= 1.5 / GRID
    assert not (shares > 0)[expected == 0].any()


@pytest.mark.parametrize("filters", [{"top_p": 0.0}, {"top_p": 1e-30}, {"top_p": 0.0, "top_k": 5}, {"min_p": 1.0}])
def test_the_most_likely_token_is_always_kept(monkeypatch: pytest.MonkeyPatch, filters: dict[str, float]) -> None:
    logits = some_logits(3000)
    shares = drawn_shares(monkeypatch, admission(SamplingParams(**filters)), logits)
    assert shares.argmax() == logits.argmax()
    assert shares.max() == 1


def test_a_large_top_k_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = some_logits(3000, spread=0.1)
    entry = admission(SamplingParams(top_k=2000, top_p=0.9))
    shares = drawn_shares(monkeypatch, entry, logits)
    assert not (shares > 0)[reference(entry.params, logits, entry) == 0].any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-INF, -3.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=12),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([1e-5, 0.3, 1.0, 100.0]),
        top_k=st.integers(0, 14),
        top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.2, 1.0]),
    ),
    st.integers(0, 2**64 - 1),
)
def test_a_draw_is_possible_and_kept_by_every_filter(logits: list[float], params: SamplingParams, seed: int) -> None:
    result = draw_once(params, logits, seed=seed)
    if max(logits) == -INF:
        assert result == SequenceResult(failure=Failure.CORRUPT)
        return
    token_id = result.token_ids[0]
    # The order of preference: the higher logit, then the lower id.
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    before = order[: order.index(token_id)]
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    assert weights[token_id] > 0
    assert params.top_k == 0 or len(before) < params.top_k
    assert weights[token_id] >= params.min_p * (1 - 1e-6)
    kept = order[: params.top_k or None]
    assert sum(weights[i] for i in before) <= params.top_p * sum(weights[i] for i in kept) * (1 + 1e-6)


# --------------------------------------------------------------------------------------- draws: noise and statistics


def critical_chi_square(degrees: int) -> float:
    """What 1 of 1000 samples exceeds, by the cube-root approximation of Wilson and Hilferty."""
    ninth = 2 / (9 * degrees)
    return degrees * (1 - ninth + 3.09 * math.sqrt(ninth)) ** 3


@pytest.mark.parametrize("name", ["plain", "temperature", "top_k", "top_p", "min_p"])
def test_drawn_frequencies_pass_a_chi_square_test(name: str) -> None:
    params = FILTERS[name]
    entry = admission(params, seed=2**63 + 12345)
    num_draws = 4000
    logits = some_logits(VOCAB, seed=7, spread=1.0)
    sampler = sampler_of(*[entry] * num_draws)
    results = sample(sampler, list(range(num_draws)), list(range(1, num_draws + 1)), logits.expand(num_draws, -1))
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in results]), minlength=VOCAB).double()
    expected = reference(params, logits, entry).double() * num_draws

    assert counts[expected == 0].sum() == 0
    # Tokens too rare for the test are taken together.
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert len(expected) > 3
    assert statistic < critical_chi_square(len(expected) - 1)


def test_noise_is_even_and_differs_with_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(2000)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
    expected = len(values) / 20
    assert ((counts - expected) ** 2 / expected).sum() < critical_chi_square(19)


def test_a_seed_repeats_its_draws_and_another_seed_does_not() -> None:
    logits = some_logits(30, VOCAB, spread=0.5)

    def run(seed: int) -> list[int]:
        sampler = sampler_of(admission(SamplingParams(), seed=seed))
        return [sample(sampler, [0], [i + 1], logits[i : i + 1])[0].token_ids[0] for i in range(30)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(5) == run(5 + 2**64)


def test_draw_never_picks_a_zero_weight_and_finds_the_last_place() -> None:
    weights = torch.zeros(4, 1000)
    weights[:, 999] = 1.0
    weights[1:, 300] = 1e-30
    uniforms = torch.tensor([0.0, 0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [999, 300, 999, 999]


def test_draw_stays_inside_where_two_ways_to_sum_differ() -> None:
    # In 4 of 10 such rows the sum of a block is above the last of its running sums.
    weights = torch.zeros(50, 256, dtype=torch.float64)
    weights[:, :100] = torch.rand(50, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (weights.sum(1) > weights.cumsum(1)[:, -1]).any()
    assert draw(weights, torch.full((50,), 1 - 2.0**-53, dtype=torch.float64)).tolist() == [99] * 50


def test_draw_is_exact_over_a_large_vocabulary() -> None:
    # Equal weights: place u * n, which running sums in float32 miss where u * n is just above the place.
    num_tokens = 150_001
    places = torch.tensor([0, 1, 127, 77_777, *range(128, num_tokens, 1280), num_tokens - 1])
    weights = torch.full((1, num_tokens), 0.1).expand(len(places), -1)
    assert torch.equal(draw(weights, (places.double() + 1e-3) / num_tokens), places)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-38, 1e-3, 0.1, 1.0]), min_size=1, max_size=400).filter(any),
    st.floats(0, 1, exclude_max=True),
)
@example([0.1] * 300, 1 - 2.0**-53)
def test_draw_always_picks_a_positive_weight(weights: list[float], value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        place = draw(torch.tensor([weights], dtype=dtype), torch.tensor([value], dtype=torch.float64))
        assert weights[place.item()] > 0


# --------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_the_most_likely_token_and_leaves_the_logits_alone(dtype: torch.dtype) -> None:
    logits = some_logits(5, VOCAB).to(dtype)
    copy = logits.clone()
    edited = replace(GREEDY, logit_bias={0: -1.0})
    drawn = SamplingParams(top_p=0.9)
    sampler = sampler_of(*[admission(p) for p in (GREEDY, GREEDY, edited, drawn, drawn)])
    results = sample(sampler, [0, 1, 2, 3, 4], [1] * 5, logits)
    assert [r.token_ids[0] for r in results[:2]] == logits[:2].argmax(-1).tolist()
    assert torch.equal(logits, copy)


def test_of_equal_logits_greedy_and_top_k_1_take_the_lowest_id() -> None:
    logits = torch.zeros(VOCAB, dtype=torch.bfloat16)
    logits[[50, 20, 40]] = 2.0
    for params in (GREEDY, replace(GREEDY, logit_bias={1: 0.5}), SamplingParams(top_k=1), SamplingParams(top_p=1e-9)):
        assert [token_of(params, logits, position) for position in range(1, 20)] == [20] * 19


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-46])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    logits = some_logits(VOCAB)
    assert token_of(SamplingParams(temperature=temperature), logits) == logits.argmax()
    assert token_of(SamplingParams(temperature=temperature, top_p=0.9), logits * 1e30) == logits.argmax()


def test_a_vocabulary_of_one() -> None:
    for params in (GREEDY, SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.1, min_p=1.0, logprobs=5)):
        assert token_of(params, [-4.0]) == 0


# ---------------------------------------------------------------------------------------------------- edits


def greedy_after(params: SamplingParams, logits: list[float], **more) -> int:
    return token_of(replace(params, temperature=0), logits, **more)


def test_frequency_penalty_counts_generated_tokens() -> None:
    # Token 0 was generated three times: 4 - 3 * 0.5 = 2.5.
    params = SamplingParams(frequency_penalty=0.5)
    assert greedy_after(params, [4.0, 2.4], output=(0, 0, 0)) == 0
    assert greedy_after(params, [4.0, 2.6], output=(0, 0, 0)) == 1
    assert greedy_after(params, [4.0, 3.9], prompt=(0, 0, 0)) == 0


def test_presence_penalty_counts_once() -> None:
    params = SamplingParams(presence_penalty=1.0)
    assert greedy_after(params, [4.0, 2.9], output=(0, 0, 0)) == 0
    assert greedy_after(params, [4.0, 3.1], output=(0, 0, 0)) == 1
    assert greedy_after(params, [4.0, 3.9], prompt=(0,)) == 0


def test_negative_penalties_encourage() -> None:
    params = SamplingParams(frequency_penalty=-0.5, presence_penalty=-1.0)
    assert greedy_after(params, [2.0, 3.9], output=(0, 0)) == 0
    assert greedy_after(params, [2.0, 4.1], output=(0, 0)) == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert greedy_after(params, [4.0, 2.1], prompt=(0,)) == 1
    assert greedy_after(params, [4.0, 1.9], prompt=(0,)) == 0
    assert greedy_after(params, [-1.0, -1.9], prompt=(0,)) == 1
    assert greedy_after(params, [-1.0, -2.1], prompt=(0,)) == 0


def test_penalties_come_together_before_bias() -> None:
    # (6 / 2) - 2 * 0.5 - 1 = 1, + 0.5 = 1.5
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=1.0, logit_bias={0: 0.5})
    assert greedy_after(params, [6.0, 1.45], output=(0, 0), prompt=(0,)) == 0
    assert greedy_after(params, [6.0, 1.55], output=(0, 0), prompt=(0,)) == 1


def test_penalties_follow_the_tokens_that_sample_draws() -> None:
    params = replace(GREEDY, frequency_penalty=1.0)
    sampler = sampler_of(admission(params, prompt=(2,)), vocab=3)
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    drawn = [sample(sampler, [0], [position], logits)[0].token_ids[0] for position in range(1, 8)]
    # Each draw costs its token 1: 3, 2.5, 2, 1.5, 1, 0.5 and then the first of 0 (twice) and 0.
    assert drawn == [0, 1, 0, 1, 0, 1, 0]
    # A sequence that was preempted comes back with its completion, and goes on the same.
    sampler.admit(0, admission(params, prompt=(2,), output=tuple(drawn[:4])))
    assert [sample(sampler, [0], [position], logits)[0].token_ids[0] for position in (5, 6, 7)] == drawn[4:]


def test_a_very_small_repetition_penalty_is_no_infinity() -> None:
    params = SamplingParams(repetition_penalty=1e-38)
    assert token_of(params, [40.0, 50.0], prompt=(0,)) == 0


def test_bias_100_forces_and_minus_100_forbids() -> None:
    logits = some_logits(VOCAB)
    best = int(logits.argmax())
    forced = SamplingParams(logit_bias={17: 100.0})
    forbidden = SamplingParams(logit_bias={best: -100.0}, temperature=0.5)
    assert {token_of(forced, logits, position) for position in range(1, 50)} == {17}
    assert best not in {token_of(forbidden, logits, position) for position in range(1, 50)}


def test_bias_does_not_raise_the_dead() -> None:
    assert token_of(SamplingParams(logit_bias={0: 100.0}), [-INF, 0.0]) == 1


def test_no_end_token_before_min_tokens() -> None:
    logits = [0.0, 9.0, 8.0, 1.0]
    params = replace(GREEDY, min_tokens=2)
    drawn = [token_of(params, logits, position, prompt=(0, 0), ends=(1, 2)) for position in (2, 3, 4)]
    assert drawn == [3, 3, 1]


def test_min_tokens_stands_above_bias() -> None:
    params = SamplingParams(min_tokens=1, logit_bias={0: 100.0})
    assert token_of(params, [0.0, 0.0], ends=(0,)) == 1


def test_ids_outside_the_vocabulary_touch_no_other_row() -> None:
    params = replace(GREEDY, logit_bias={2: 50.0, 3: -50.0}, repetition_penalty=1.5, min_tokens=5)
    sampler = sampler_of(admission(params, prompt=(0, 2, 3), output=(3,), ends=(2, 3)), admission(GREEDY), vocab=2)
    results = sample(sampler, [0, 1], [4, 1], torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert [r.token_ids for r in results] == [[1], [0]]


# ------------------------------------------------------------------------------------- independence and corruption


ASSORTED = [
    *(
        admission(params, seed=i, prompt=(1, 2, 3), output=(4, 4), ends=(5,))
        for i, params in enumerate(FILTERS.values())
    ),
    admission(GREEDY),
    admission(replace(GREEDY, presence_penalty=0.7, logprobs=2), output=(8,)),
    admission(SamplingParams(logprobs=0, frequency_penalty=1.0), output=(8, 8)),
    admission(SamplingParams(logprobs=20)),
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, len(ASSORTED) - 1), min_size=1, max_size=8, unique=True),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_draws_the_same_alone_and_among_others(rows: list[int], seed: int, dtype: torch.dtype) -> None:
    logits = some_logits(len(ASSORTED), VOCAB, seed=seed).to(dtype)
    logits[:, seed % VOCAB] = -INF
    together = sample(sampler_of(*ASSORTED), rows, [5] * len(rows), logits[rows])
    alone = [sample(sampler_of(*ASSORTED), [row], [5], logits[row][None])[0] for row in rows]
    assert together == alone


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_how_many_rows_are_worked_on_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    logits = some_logits(len(ASSORTED), VOCAB)
    rows = list(range(len(ASSORTED)))
    expected = sample(sampler_of(*ASSORTED), rows, [5] * len(rows), logits)
    monkeypatch.setattr(module, "CPU_LOGITS_AT_ONCE", rows_at_once * VOCAB)
    monkeypatch.setattr(module, "LOGPROB_CHUNK", rows_at_once * VOCAB)
    assert sample(sampler_of(*ASSORTED), rows, [5] * len(rows), logits) == expected


@pytest.mark.parametrize("bad", [[NAN, 0.0], [INF, 0.0], [0.0, INF], [NAN, NAN], [-INF, -INF], [INF, -INF]])
@pytest.mark.parametrize("name", ["greedy", *FILTERS])
def test_a_corrupt_row_has_no_token_and_harms_no_other(bad: list[float], name: str) -> None:
    params = replace({"greedy": GREEDY, **FILTERS}[name], logprobs=1)
    sampler = sampler_of(*[admission(params, seed=i, ends=(5,)) for i in range(3)])
    logits = some_logits(3, VOCAB)
    expected = sample(sampler, [0, 1, 2], [1, 1, 1], logits)
    logits[1] = torch.tensor(bad).repeat(VOCAB // 2) if bad == [-INF, -INF] else logits[1]
    logits[1, 10:12] = torch.tensor(bad)
    sampler = sampler_of(*[admission(params, seed=i, ends=(5,)) for i in range(3)])
    corrupt = SequenceResult(failure=Failure.CORRUPT)
    assert sample(sampler, [0, 1, 2], [1, 1, 1], logits) == [expected[0], corrupt, expected[2]]


def test_impossible_tokens_alone_do_not_corrupt() -> None:
    logits = torch.full((VOCAB,), -INF)
    logits[[3, 4]] = 1.0
    for params in [GREEDY, *FILTERS.values()]:
        assert token_of(params, logits) in {3, 4}


def test_a_row_with_nothing_left_to_draw_has_no_token_and_is_not_corrupt() -> None:
    params = SamplingParams(min_tokens=3)
    assert draw_once(params, [0.0, -INF], ends=(0,)) == SequenceResult(failure=Failure.NO_TOKEN)
    assert draw_once(params, [0.0, NAN], ends=(0,)) == SequenceResult(failure=Failure.CORRUPT)


@pytest.mark.parametrize("penalty", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_a_place_behind_drafts_is_sampled_as_if_they_were_drawn(penalty: str) -> None:
    params = replace(GREEDY, logprobs=0, **{penalty: 1.8})
    logits = some_logits(1, VOCAB, seed=3, spread=0.3).expand(4, -1)  # the same, so that a penalty changes the choice
    drafted = logits[0].topk(3).indices.tolist()
    sampler = sampler_of(admission(params, prompt=(4, 5)))
    places = [Place(0, 2 + i, tuple(drafted[:i])) for i in range(4)]
    ahead = sampler.sample(places, logits)
    assert [result.token_ids for result in ahead[:3]] == [[token] for token in drafted]
    # The drafts are nobody's yet.
    assert sampler.sample(places, logits) == ahead
    for i, draft in enumerate(drafted):
        assert sampler.sample([Place(0, 2 + i)], logits[i : i + 1]) == [ahead[i]]
        sampler.keep({0: [draft]})
    assert sampler.sample([Place(0, 5)], logits[3:]) == [ahead[3]]


def test_a_failed_step_leaves_the_rows_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(GREEDY, frequency_penalty=2.0, logprobs=1)
    sampler = sampler_of(admission(params), admission(params), vocab=3)
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    with monkeypatch.context() as patch:
        patch.setattr(module, "token_logprobs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(sampler, [0, 1], [1, 1], logits)
    with pytest.raises(IndexError):
        sample(sampler, [0, 1], [1, 1], logits[:1])
    assert [r.token_ids for r in sample(sampler, [0, 1], [1, 1], logits)] == [[0], [0]]


def test_a_row_forgets_the_sequence_before() -> None:
    sampler = sampler_of(admission(replace(GREEDY, logit_bias={1: 9.0})), vocab=2)
    sampler.admit(0, admission(GREEDY))
    assert sample(sampler, [0], [1], torch.tensor([[1.0, 0.0]]))[0].token_ids == [0]


def test_a_row_that_was_never_admitted_is_an_error() -> None:
    with pytest.raises(KeyError):
        sample(Sampler(2, CPU), [0], [1], torch.zeros(1, 2))


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_log_softmax_with_rank_and_alternatives(dtype: torch.dtype) -> None:
    # In bfloat16 many of 500 logits are equal.
    logits = some_logits(4, 500).to(dtype)
    expected = logits.float().log_softmax(-1)
    targets = [0, 17, 499, int(logits[3].argmax())]
    for row, entry in enumerate(token_logprobs(logits, targets, 20)):
        assert entry.token_id == targets[row]
        assert entry.logprob == pytest.approx(expected[row, targets[row]].item(), abs=1e-5)
        assert entry.rank == 1 + (expected[row] > expected[row, targets[row]]).sum()
        order = sorted(range(500), key=lambda i: (-logits[row, i].item(), i))[:20]
        assert [top.token_id for top in entry.top] == order
        assert [top.logprob for top in entry.top] == pytest.approx(expected[row, order].tolist(), abs=1e-5)
        assert [top.rank for top in entry.top] == [1 + int((expected[row] > expected[row, i]).sum()) for i in order]
        assert all(top.top == () for top in entry.top)


def test_equal_tokens_share_a_rank() -> None:
    entry = token_logprobs(torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0]]), [2], 5)[0]
    assert entry.rank == 3
    assert [(top.token_id, top.rank) for top in entry.top] == [(1, 1), (3, 1), (0, 3), (2, 3), (4, 5)]


def test_logprobs_are_finite_and_at_most_zero() -> None:
    logits = torch.tensor([[0.0, -INF, -1e38, 3e38], [NAN, 0.0, INF, 0.0], [-INF, 5.0, -INF, -INF]])
    for target in range(4):
        for entry in token_logprobs(logits, [target] * 3, 4):
            for part in (entry, *entry.top):
                assert part.logprob is not None
                assert math.isfinite(part.logprob)
                assert part.logprob <= 0


def test_more_alternatives_than_tokens_gives_them_all() -> None:
    assert len(token_logprobs(torch.zeros(1, 3), [0], 20)[0].top) == 3


def test_sampled_logprobs_are_of_the_raw_logits() -> None:
    logits = some_logits(VOCAB)
    params = SamplingParams(temperature=0.2, logit_bias={4: 50.0}, presence_penalty=2.0, top_k=3, logprobs=2)
    result = draw_once(params, logits, output=(4,))
    assert result.token_ids == [4]
    assert result.logprobs == token_logprobs(logits[None], [4], 2)
    assert len(result.logprobs[0].top) == 2


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    wanted = [None, 0, 3, 1]
    sampler = sampler_of(*[admission(replace(GREEDY, logprobs=n)) for n in wanted])
    results = sample(sampler, [0, 1, 2, 3], [1] * 4, some_logits(4, VOCAB))
    assert [[len(entry.top) for entry in r.logprobs] for r in results] == [[], [0], [3], [1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.data())
def test_most_likely_orders_by_score_then_id(scores: list[float], data: st.DataObject) -> None:
    scores = [x + 0.0 for x in scores]  # no -0.0, which is below 0.0 there
    count = data.draw(st.integers(0, len(scores)))
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert most_likely(torch.tensor([scores]), count).tolist() == [expected]


@pytest.mark.parametrize("vocab_size", [1, 7, 257, 512, 1536])
def test_the_largest_logit_is_found_at_its_first_place(vocab_size: int) -> None:
    logits = torch.randint(0, 5, (20, vocab_size)).to(torch.bfloat16)  # many are equal
    best, places = module._largest(logits)
    want, first = logits.float().numpy().max(1), logits.float().numpy().argmax(1)
    assert (best.tolist(), places.tolist()) == (want.tolist(), first.tolist())
    logits[3, vocab_size // 2] = NAN
    logits[4] = -INF
    best, _ = module._largest(logits)
    assert best[3].isnan()
    assert best[4] == -INF
