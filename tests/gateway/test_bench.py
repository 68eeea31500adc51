"""`nanoserve bench serve --api openai`: the same work, through the gateway."""

import json

import pytest

from nanoserve.bench import serve
from nanoserve.cli.flags import Parser
from nanoserve.config import ConfigError


def bench(*argv):
    parser = Parser("nanoserve bench serve")
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(argv))


def test_both_apis_do_the_same_work(served, capsys):
    reports = []
    for api in (["--api", "grpc"], ["--api", "openai", "--openai-url", f"{served.url}/v1"]):
        assert bench("--target", served.address, "--workload", "4:40:6:32", "--json", "-", *api) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for name in ("n", "completed", "output_tokens", "prompt_tokens"):
        assert reports[0][name] == reports[1][name], name


def test_a_failure_is_told_by_its_code(served, capsys):
    arguments = ("--target", served.address, "--workload", "1:8:4", "--api", "openai")
    assert bench(*arguments, "--openai-url", f"{served.url}/nothing") == 1
    assert "http_404" in capsys.readouterr().out


def test_an_url_that_no_request_goes_to_is_refused():
    with pytest.raises(ConfigError, match="--openai-url is 'http://x/v1'; it is for --api openai"):
        bench("--target", "x", "--workload", "1:8:4", "--openai-url", "http://x/v1")
