"""A real Prometheus reads a real server: what it counts is what the clients saw, and the files in deploy/ work."""

import asyncio
import json
import re
import urllib.request
from collections import Counter

import pytest
import yaml
from nanoserve_client import AsyncClient, NanoserveError
from prometheus_process import DEPLOY, program, promtool, scraping
from serve_process import free_port, serving, starting

GENERATE = 'rpc_method="nanoserve.v1.GenerationService/Generate"'
NUM_ROWS = 8
# Kinds of the 200 requests.
NUM_GOOD, NUM_SEVERAL, NUM_CANCELLED, NUM_LATE, NUM_WRONG = 120, 10, 40, 10, 20


@pytest.fixture(scope="module")
def server():
    program("prometheus")  # or there is no use in it
    port = free_port()
    with serving("--http-port", f"{port}", "--max-num-seqs", f"{NUM_ROWS}", "--log-format", "json") as server:
        yield server, f"127.0.0.1:{port}"


class Tally:
    """What the callers saw."""

    def __init__(self):
        self.codes, self.finish_reasons = Counter(), Counter()
        self.completion_tokens = 0

    async def note(self, result):
        """How one request went."""
        try:
            result = await result
        except NanoserveError as error:
            self.codes[error.code.name] += 1
            return
        self.codes["OK"] += 1
        self.completion_tokens += result.usage.completion_tokens
        for completion in result.completions:
            self.finish_reasons[completion.finish_reason.name.lower()] += 1


async def begun(stream):
    await stream.start()
    return stream


async def cancelled(stream):
    stream.cancel()
    return await stream.result()


async def ask(address, tally):
    async with AsyncClient(address) as client:

        def endless(**options):
            # Without guesses, with which what is so monotonous ends soon.
            return client.chat("Hello!", ignore_eos=True, max_draft_tokens=0, **options)

        # While these have all rows, the late ones wait, and their deadline passes. It leaves time enough to reach the
        # server: a call whose time is up on the way is counted by nobody there.
        hogs = [await begun(endless()) for _ in range(NUM_ROWS)]
        await asyncio.gather(*(tally.note(endless(timeout=8).result()) for _ in range(NUM_LATE)))
        ended = [cancelled(stream) for stream in hogs]

        async def begun_and_cancelled():
            return await cancelled(await begun(endless()))

        ended += [begun_and_cancelled() for _ in range(NUM_CANCELLED - NUM_ROWS)]
        good = [client.chat(f"Hello {i % 5}!", max_tokens=1 + i % 30).result() for i in range(NUM_GOOD)]
        several = [client.chat("Hello!", n=3, max_tokens=5, ignore_eos=True).result() for _ in range(NUM_SEVERAL)]
        wrong = [client.chat("Hello!", temperature=-1).result() for _ in range(NUM_WRONG)]
        await asyncio.gather(*map(tally.note, [*ended, *good, *several, *wrong]))


def test_counts_are_what_the_callers_saw(server, tmp_path):
    served, target = server
    tally = Tally()
    with scraping(target, tmp_path) as prometheus:
        asyncio.run(ask(served.address, tally))
        assert tally.codes == {
            "OK": NUM_GOOD + NUM_SEVERAL,
            "CANCELLED": NUM_CANCELLED,
            "DEADLINE_EXCEEDED": NUM_LATE,
            "INVALID_ARGUMENT": NUM_WRONG,
        }
        expect = prometheus.wait_for_value
        by_code = f"sum by (rpc_response_status_code) (rpc_server_call_duration_seconds_count{{{GENERATE}}})"
        expect(by_code, {(code,): count for code, count in tally.codes.items()})
        # The rest came at the same scrape.
        good = 'gen_ai_server_request_duration_seconds_count{error_type=""}'
        expect(f"sum({good})", {(): tally.codes["OK"]})
        expect("sum(gen_ai_server_time_to_first_token_seconds_count)", {(): tally.codes["OK"]})
        expect("sum(nanoserve_requests_cancelled_total)", {(): NUM_CANCELLED})
        expect("sum(nanoserve_requests_deadline_missed_total)", {(): NUM_LATE})
        rejected = "sum by (nanoserve_error_reason) (nanoserve_calls_rejected_total)"
        expect(rejected, {("INVALID_REQUEST",): NUM_WRONG})
        finished = "sum by (nanoserve_finish_reason) (nanoserve_sequences_finished_total)"
        expect(finished, {(reason,): count for reason, count in tally.finish_reasons.items()})
        [completion_tokens] = prometheus.query("sum(nanoserve_completion_tokens_total)").values()
        assert completion_tokens >= tally.completion_tokens
        # And nothing is left.
        expect("sum(nanoserve_sequences_running + nanoserve_queue_length)", {(): 0})
        expect('sum(nanoserve_kv_blocks{nanoserve_kv_block_state="owned"})', {(): 0})
        assert not prometheus.query("ALERTS{alertstate='firing'}")
        # And the dashboard has something to draw, but for what did not happen.
        empty = [expression for expression in asked_by_the_dashboard() if not prometheus.query(expression)]
        assert [re.findall(r"\w+_total", expression) for expression in empty] == [["nanoserve_preemptions_total"]]
    # The log says the same.
    lines = [json.loads(line) for line in served.log if '"rpc": "Generate"' in line]
    assert Counter(line["code"] for line in lines) == tally.codes
    assert len({line["request_id"] for line in lines}) == sum(tally.codes.values())


def asked_by_the_dashboard():
    """The queries of all panels and variables, as Grafana sends them."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$instance", ".*").replace("$__rate_interval", "5m")
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            yield f"count by ({label}) ({metric})"


def test_every_series_keeps_to_labels_that_no_caller_chooses(server):
    _, target = server
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
        text = response.read().decode()
    names = set(re.findall(r'([a-z_]+)="', text))
    assert names <= {
        "le",
        "error_type",
        "gen_ai_operation_name",
        "gen_ai_provider_name",
        "gen_ai_request_model",
        "gen_ai_token_type",
        "nanoserve_draft_source",
        "nanoserve_error_reason",
        "nanoserve_finish_reason",
        "nanoserve_kv_block_state",
        "nanoserve_phase",
        "nanoserve_spec_decode_position",
        "rpc_method",
        "rpc_response_status_code",
        "rpc_system_name",
        "service_instance_id",
        "service_name",
        "telemetry_sdk_language",
        "telemetry_sdk_name",
        "telemetry_sdk_version",
    }


def test_metrics_can_be_turned_off():
    port = free_port()
    with starting("--http-port", f"{port}", "--no-metrics") as server:
        server.wait_for("listening on")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
        with refusal.value:
            assert refusal.value.code == 404


def test_the_rules_and_the_configuration_are_valid():
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", DEPLOY / "alerts.yml")


RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
# Alert -> series that make it fire within an hour, in promtool's notation, a sample a minute.
CAUSES = {
    "NanoserveDown": {'up{job="nanoserve"}': "0x60"},
    "NanoserveEngineFailures": {'gen_ai_server_request_duration_seconds_count{error_type="ENGINE_FAILURE"}': "0+1x60"},
    "NanoserveQueueSlow": {
        'nanoserve_queue_wait_seconds_bucket{le="5"}': "0+1x60",
        'nanoserve_queue_wait_seconds_bucket{le="10"}': "0+9x60",
        'nanoserve_queue_wait_seconds_bucket{le="+Inf"}': "0+10x60",
    },
    "NanoserveOverloaded": {'nanoserve_calls_rejected_total{nanoserve_error_reason="OVERLOADED"}': "0+2x60"},
    "NanoserveDeadlinesMissed": {
        'nanoserve_requests_deadline_missed_total{nanoserve_phase="waiting"}': "0+1x60",
        "gen_ai_server_request_duration_seconds_count": "0+10x60",
    },
    "NanoservePreempting": {"nanoserve_preemptions_total": "0+60x60"},
}


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_every_alert_fires_for_its_cause_and_not_without(alert, tmp_path):
    series = [{"series": name, "values": values} for name, values in CAUSES[alert].items()]
    quiet = [{"series": name, "values": "1x60" if alert == "NanoserveDown" else "0x60"} for name in CAUSES[alert]]
    # promtool compares labels and annotations too, so it is asked for the alert's own series.
    query = {"expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})', "eval_time": "50m"}
    tests = [
        {"interval": "1m", "input_series": each, "promql_expr_test": [{**query, "exp_samples": expected}]}
        for each, expected in ((series, [{"labels": "{}", "value": 1}]), (quiet, []))
    ]
    rules = tmp_path / "test.yml"
    rules.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": tests}))
    promtool("test", "rules", rules)


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(server):
    _, target = server
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
        text = response.read().decode()
    exposed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    # These have no series before they first happen.
    exposed |= {"nanoserve_preemptions_total", "nanoserve_calls_rejected_total"}
    exposed |= {"nanoserve_requests_cancelled_total", "nanoserve_requests_deadline_missed_total"}
    asked = [*asked_by_the_dashboard(), (DEPLOY / "alerts.yml").read_text()]
    # Not those of labels, which stand in lists and braces.
    plain = [re.sub(r"by \([^)]*\)|{{[^}]*}}|{[^}]*}|action:.*", "", each) for each in asked]
    names = {name for each in plain for name in re.findall(r"\b(?:nanoserve|gen_ai|rpc)_[a-z_]+\b", each)}
    assert len(names) > 12
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} <= exposed
    # Written by hand, so at least no two panels share a place.
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_compose_file_and_dockerfile_name_files_that_there_are():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"nanoserve", "envoy", "jaeger", "prometheus", "grafana"}
    for service in services.values():
        for volume in service.get("volumes", []):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
    [script] = services["envoy"]["command"]
    before = re.search(r"s/(.*?)/", script)[1]
    assert before in (DEPLOY.parent / "gateway" / "envoy" / "envoy.yaml").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    for path in " ".join(copied).split():
        assert (DEPLOY.parent / path).exists(), path
