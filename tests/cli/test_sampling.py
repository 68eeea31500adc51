"""Sampling parameters as flags: the same as the engine's and the client's."""

import dataclasses

import pytest
from nanoserve_client import GenerateOptions
from nanoserve_client.requests import generate_request

from nanoserve.cli.flags import Parser
from nanoserve.cli.sampling import WITHOUT_FLAG, add_sampling, read_sampling, sampling_flags
from nanoserve.request import CALLERS_NAMES, SamplingParams

SAMPLES = {"logit_bias": "7=-1.5", "seed": "3"}


def parse(*argv, **options):
    parser = Parser("nanoserve test")
    add_sampling(parser, **options)
    return read_sampling(parser.parse_args(argv))


def test_every_parameter_of_the_engine_has_a_flag_that_the_client_explains():
    expected = [CALLERS_NAMES.get(f.name, f.name) for f in dataclasses.fields(SamplingParams)]
    flags = sampling_flags()
    assert [told["dest"] for told in flags.values()] == [name for name in expected if name != WITHOUT_FLAG]
    for flag, told in flags.items():
        assert told["dest"] in GenerateOptions.__optional_keys__
        assert told["help"].endswith("."), flag
        assert "`" not in told["help"], flag
        assert "Default False" not in told["help"], flag


@pytest.mark.parametrize(("flag", "told"), sampling_flags().items())
def test_every_flag_reaches_the_request(flag, told):
    argv = [flag] if told.get("action") == "store_true" else [flag, SAMPLES.get(told["dest"], "1")]
    assert generate_request("x", parse(*argv)) != generate_request("x", {})


def test_what_is_not_given_is_not_sent():
    assert parse() == {}


def test_lists_are_given_one_by_one():
    options = parse(
        "--stop", "a", "--stop", "\n", "--stop-token-ids", "5", "--logit-bias", "1=2", "--logit-bias", "3=-4"
    )
    assert options == {"stop": ["a", "\n"], "stop_token_ids": [5], "logit_bias": {1: 2.0, 3: -4.0}}


def test_flags_may_be_left_out():
    assert parse(leave_out=("n",)) == {}
    with pytest.raises(SystemExit):
        parse("--n", "2", leave_out=("n",))


@pytest.mark.parametrize("argv", [["--top-k", "many"], ["--logit-bias", "7"], ["--temperature", "hot"]])
def test_what_is_no_number_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "_bias" not in error
