"""`nanoserve bench serve --api openai`: the same work, through the gateway."""

import json

import pytest
from nanoserve_client.v1 import model_pb2
from scripted_server import overloaded
from serve_process import free_port

from nanoserve.bench import serve
from nanoserve.bench.load import CallFailed
from nanoserve.bench.openai_api import over_openai
from nanoserve.bench.workload import BenchRequest
from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import CommandError
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


async def test_a_failure_is_told_by_its_code(scripted):
    scripted.script.unary = lambda _request, _context: model_pb2.ListModelsResponse()
    scripted.script.generate = lambda _request, context: context.abort_with_status(overloaded(1000))
    request = BenchRequest(prompt=[1], num_out=1)
    async with over_openai(f"{scripted.url}/v1", "none", "tiny") as send:
        with pytest.raises(CallFailed, match="rate_limit_exceeded"):
            await anext(send(request, "salt"))


@pytest.mark.parametrize(
    ("path", "hint"),
    [("", "; add /v1: {url}/v1"), ("/", "; add /v1: {url}/v1"), ("/nothing/v1", ""), ("/v1/v1/", "")],
)
def test_an_url_without_the_api_is_told_before_any_request(served, path, hint):
    arguments = ("--target", served.address, "--workload", "1:8:4", "--api", "openai", "--openai-url")
    with pytest.raises(CommandError) as caught:
        bench(*arguments, served.url + path)
    message = str(caught.value)
    assert message == (
        f"OpenAI's API is not at {served.url}{path}: there is no {served.url}{path.rstrip('/')}/models"
        + hint.format(url=served.url)
    )


@pytest.mark.parametrize(
    ("url", "why"),
    [("http://127.0.0.1:{port}/v1", "connection attempts failed"), ("127.0.0.1:8000/v1", "protocol")],
)
def test_an_url_that_nobody_listens_at_is_told_before_any_request(served, url, why):
    arguments = ("--target", served.address, "--workload", "1:8:4", "--api", "openai", "--openai-url")
    with pytest.raises(CommandError, match=f"cannot be reached at .*{why}"):
        bench(*arguments, url.format(port=free_port()))


def test_an_url_that_no_request_goes_to_is_refused():
    with pytest.raises(ConfigError, match="--openai-url is 'http://x/v1'; it is for --api openai"):
        bench("--target", "x", "--workload", "1:8:4", "--openai-url", "http://x/v1")
