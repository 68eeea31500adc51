"""Whatever the gateway's own OpenAPI schema allows, and more, is answered without an error of the gateway's."""

import asyncio
import json

import httpx
import pytest
import schemathesis
from caller import is_idle, until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nanoserve_gateway import pages
from nanoserve_gateway.app import Gateway, GatewayConfig
from schemathesis import GenerationMode

SCHEMA = schemathesis.openapi.from_dict(pages.openapi())


def strategy():
    """Good and bad requests of every operation."""
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    operations = [result.ok() for result in SCHEMA.get_all_operations()]
    return st.one_of([op.as_strategy(generation_mode=mode) for op in operations for mode in modes])


def check(served, num_requests, *, is_random):
    statuses = []

    @given(strategy())
    @settings(
        max_examples=num_requests,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        derandomize=not is_random,
        suppress_health_check=list(HealthCheck),
    )
    def run(case):
        answer = case.call(base_url=served.url, headers={"x-request-timeout": "0.5"})
        statuses.append(answer.status_code)
        assert answer.status_code < 500 or answer.status_code in (503, 504), (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert json.loads(answer.content)["error"]["message"]

    run()
    assert len(statuses) >= num_requests
    assert statuses.count(200) > num_requests / 20
    assert statuses.count(400) > num_requests / 20
    asyncio.run(until(lambda: is_idle(served)))


def test_no_generated_request_is_answered_with_500(served):
    check(served, 400, is_random=False)  # of so few, chance alone may draw too few good ones


@pytest.mark.soak
def test_no_generated_request_of_many_is_answered_with_500(served):
    check(served, 2000, is_random=True)


def test_the_schema_has_every_path_that_is_served():
    routes = Gateway(GatewayConfig(target="unused")).routes()
    served = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods - {"HEAD"}}
    assert served == pages.ENDPOINTS.keys()


def test_docs_need_nothing_from_elsewhere(served):
    page = httpx.get(f"{served.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!doctype", "")
    assert "top_logprobs" in page.text
    assert httpx.get(f"{served.url}/openapi.json").json() == pages.openapi()
