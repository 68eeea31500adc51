import argparse
import random
import statistics

import pytest

from nanoserve.bench.workload import FixedWorkload, ShareGPTWorkload, parse_workload
from nanoserve.config import ConfigError


def test_parts_of_a_workload_are_requests_prompt_new_and_shared_tokens():
    assert parse_workload("8:128:64") == FixedWorkload("8:128:64", 8, 128, 64, 0)
    assert parse_workload("8:128:64:96") == FixedWorkload("8:128:64:96", 8, 128, 64, 96)
    assert parse_workload("sharegpt:20") == ShareGPTWorkload("sharegpt:20", 20)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8:128", "N:IN:OUT"),
        ("8:128:64:1:1", "N:IN:OUT"),
        ("8:-1:64", "N:IN:OUT"),
        ("eight:1:1", "N:IN:OUT"),
        ("0:1:1", "at least 1"),
        ("1:0:1", "at least 1"),
        ("1:1:0", "at least 1"),
        ("1:4:1:5", "more tokens than a prompt has"),
        ("sharegpt", "sharegpt:N"),
        ("sharegpt:0", "sharegpt:N"),
    ],
)
def test_what_is_no_workload_is_refused_with_what_would_be_one(text, why):
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        parse_workload(text)


def test_prompts_follow_the_rule_that_other_engines_are_timed_with():
    requests = parse_workload("3:8:2:5").requests(vocab_size=100_000, max_context_tokens=10)
    rng = random.Random(3 * 1000 + 8)
    shared = [rng.randrange(10, 8000) for _ in range(5)]
    assert [r.prompt for r in requests] == [shared + [rng.randrange(10, 8000) for _ in range(3)] for _ in range(3)]
    assert [r.num_out for r in requests] == [2, 2, 2]


def test_prompts_keep_to_a_small_vocabulary():
    requests = parse_workload("4:500:1").requests(vocab_size=20, max_context_tokens=1000)
    assert {token for r in requests for token in r.prompt} == set(range(10, 20))
    with pytest.raises(ConfigError, match="vocabulary has 10"):
        parse_workload("1:1:1").requests(vocab_size=10, max_context_tokens=1000)


def test_a_workload_beyond_the_context_is_refused():
    workload = parse_workload("1:90:10")
    assert len(workload.requests(100, max_context_tokens=100)) == 1
    with pytest.raises(ConfigError, match="1:90:10 needs a context of 100 tokens; the model has one of 99"):
        workload.requests(100, max_context_tokens=99)


def test_conversations_have_the_lengths_that_the_documentation_says():
    requests = parse_workload("sharegpt:4000").requests(vocab_size=8000, max_context_tokens=100_000)
    lengths = [(len(r.prompt), r.num_out) for r in requests]
    assert statistics.mean(num_in for num_in, _ in lengths) == pytest.approx(150, rel=0.05)
    assert statistics.mean(num_out for _, num_out in lengths) == pytest.approx(300, rel=0.05)
    assert min(map(min, lengths)) >= 4
    assert max(num_in for num_in, _ in lengths) <= 1024
    assert max(map(sum, lengths)) <= 2048


def test_conversations_fit_the_context_and_are_the_same_in_every_run():
    workload = parse_workload("sharegpt:200")
    requests = workload.requests(vocab_size=50, max_context_tokens=120)
    assert len(requests) == 200
    assert max(len(r.prompt) + r.num_out for r in requests) <= 120
    assert workload.requests(vocab_size=50, max_context_tokens=120) == requests
    with pytest.raises(ConfigError, match="8 tokens or more"):
        workload.requests(vocab_size=50, max_context_tokens=7)
