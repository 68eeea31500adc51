import argparse
import json

import pytest

from nanoserve.bench import offline
from nanoserve.bench.offline import fit, time_workloads
from nanoserve.bench.workload import FixedWorkload
from nanoserve.cli.flags import Parser
from nanoserve.config import CacheOptions, ConfigError, Options, SchedulerConfig

ENGINE = ["--no-compile", "--dtype", "float32", "--kv-memory", "32MiB"]


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser("nanoserve bench offline")
    offline.add_arguments(parser)
    return parser.parse_args(argv)


def test_the_engine_is_timed_on_each_workload(capsys):
    assert offline.run(parse(*ENGINE, "--workload", "3:8:2", "2:40:3:32", "--json")) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert list(first) == ["engine", "n", "in", "out", "shared", "seconds", "out_tok_s", "ready_s"]
    assert (first["engine"], first["n"], first["in"], first["out"], first["shared"]) == ("nanoserve", 3, 8, 2, 0)
    assert (second["n"], second["in"], second["out"], second["shared"]) == (2, 40, 3, 32)
    assert first["ready_s"] == second["ready_s"] > 0


def test_without_json_there_is_a_table(capsys):
    assert offline.run(parse(*ENGINE, "--workload", "1:8:2")) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["workload", "seconds", "output", "tokens/s"]
    assert row.startswith("1:8:2 ")


def test_a_workload_beyond_the_context_is_refused_before_any_is_timed(capsys):
    with pytest.raises(ConfigError, match="1:100:1 needs a context of 101 tokens; the model has one of 100"):
        offline.run(parse(*ENGINE, "--max-context-tokens", "100", "--workload", "1:8:2", "1:100:1"))
    assert capsys.readouterr().out == ""


def test_conversations_are_not_for_offline():
    with pytest.raises(SystemExit):
        parse("--workload", "sharegpt:3")


def test_time_does_not_include_the_first_tiny_batch():
    batches = []

    def execute(requests):
        batches.append((len(requests), len(requests[0].prompt), requests[0].num_out))
        return sum(r.num_out for r in requests)

    workloads = [FixedWorkload.parse("3:8:2"), FixedWorkload.parse("4:9:1")]
    timings = list(time_workloads("mine", execute, workloads, 0.0, vocab_size=100, max_context_tokens=100))
    assert batches == [(2, 16, 4), (3, 8, 2), (4, 9, 1)]
    assert [t.workload for t in timings] == workloads
    assert timings[0].ready_s == timings[1].ready_s > max(t.seconds for t in timings)
    assert timings[0].tokens_per_s == pytest.approx(6 / timings[0].seconds)


def test_an_engine_that_makes_too_few_tokens_is_not_timed():
    with pytest.raises(AssertionError, match="5 tokens"):
        list(time_workloads("mine", lambda _: 5, [FixedWorkload.parse("3:8:2")], 0.0, 100, 100))


def test_all_requests_of_a_workload_run_at_once():
    workloads = [FixedWorkload.parse("3:8:2"), FixedWorkload.parse("2000:8:2")]
    fitted = fit(Options(), workloads, keep_max_num_seqs=False).scheduler
    assert (fitted.max_num_seqs, fitted.max_num_batched_tokens, fitted.max_waiting) == (2000, 2000, 2000)
    # The first tiny batch has two.
    assert fit(Options(), [FixedWorkload.parse("1:8:2")], keep_max_num_seqs=False).scheduler.max_num_seqs == 2


@pytest.mark.parametrize(("chosen", "is_asked"), [(64, True), (48, False)])
def test_a_number_of_sequences_that_was_chosen_is_kept(chosen, is_asked):
    options = Options(scheduler=SchedulerConfig(max_num_seqs=chosen))
    fitted = fit(options, [FixedWorkload.parse("2000:8:2")], keep_max_num_seqs=is_asked).scheduler
    assert fitted.max_num_seqs == chosen
    assert fitted.max_waiting == 2000


def test_the_prefix_cache_is_on_only_for_shared_prompts():
    own, shared = [FixedWorkload.parse("3:8:2")], [FixedWorkload.parse("3:8:2"), FixedWorkload.parse("3:8:2:4")]
    off = Options(cache=CacheOptions(enable_prefix_cache=False))
    assert not fit(Options(), own, keep_max_num_seqs=False).cache.enable_prefix_cache
    assert fit(Options(), shared, keep_max_num_seqs=False).cache.enable_prefix_cache
    assert not fit(off, shared, keep_max_num_seqs=False).cache.enable_prefix_cache
