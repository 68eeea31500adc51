"""Metrics as any exporter reads them: what moves them; a collector gets what Prometheus reads; the page in docs/ tells
of each."""

import asyncio
import itertools
import math
import re
import urllib.request
from pathlib import Path

import pytest
from engine_bench import PROMPT, VOCAB, two_right_drafts
from fake_executor import right_drafts
from metrics_reader import Read
from nanoserve_client import Client, NanoserveError
from nanoserve_gateway.errors import bad_request
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE
from otlp_collector import attributes, collecting
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString
from serve_process import free_port, serving
from watched_server import miss_deadline, until, watched

from nanoserve.observability import conventions as names
from nanoserve.observability.metrics import REJECTIONS
from nanoserve.observer import RequestRecord
from nanoserve.rpc.errors import _TABLE
from nanoserve.step_record import AdapterCounts, AdapterUse, StepRecord

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"


async def test_what_a_good_request_moves():
    read = Read()
    async with watched(read.metrics) as (_, client):
        await client.generate(PROMPT, max_tokens=4).result()
        await client.generate(PROMPT, max_tokens=4).result()
        await until(lambda: read.value("gen_ai.server.request.duration") == 2)
    labels = {names.OPERATION: "text_completion", names.PROVIDER: "nanoserve", names.REQUEST_MODEL: ""}
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        assert read.points(f"gen_ai.server.{name}") == [(labels, 2)]
    assert read.value("nanoserve.completion.tokens") == 8
    assert read.value("nanoserve.prompt.tokens") == 2 * len(PROMPT)
    assert read.value("nanoserve.prompt.cached_tokens") == 8
    assert read.value("nanoserve.sequences.finished", nanoserve__finish_reason="length") == 2
    assert read.value("nanoserve.queue.wait") == 2
    assert read.value("nanoserve.step.duration") == 8
    steps = {p.attributes["gen_ai.token.type"]: p.sum for p in read.all()["nanoserve.step.tokens"].data.data_points}
    assert steps == {"input": 9 + 1, "output": 3 + 3}
    buckets = read.all()["gen_ai.server.time_to_first_token"].data.data_points[0].explicit_bounds
    assert tuple(buckets) == names.FIRST_TOKEN_BUCKETS


async def test_gauges_are_right_after_aborts():
    read = Read()
    async with watched(read.metrics, max_num_seqs=2) as (bench, client):
        await until(lambda: read.blocks() == {"free": 64, "cached": 0, "owned": 0})
        steps = bench.executor.count_steps()
        streams = [client.generate([i] * 20, max_tokens=100, ignore_eos=True) for i in range(1, 4)]
        await until(lambda: len(bench.engine._streams) == 3)
        # The first may have begun alone; the second has all that fit, and the third waits for ever.
        steps.release(2)
        await until(lambda: read.value("nanoserve.queue.length") == 1)
        assert read.value("nanoserve.sequences.running") == 2
        assert sum(read.blocks().values()) == 64
        for stream in streams:
            stream.cancel()
        await until(lambda: not bench.engine._streams)
        steps.release()  # the third, and no other follows
        await until(lambda: read.value("nanoserve.queue.length") + read.value("nanoserve.sequences.running") == 0)
        await until(lambda: read.blocks()["owned"] == 0)
        await until(lambda: read.value("nanoserve.requests.cancelled") == 3)
        assert sum(read.blocks().values()) == 64
        assert not bench.scheduler.has_work


async def test_what_goes_wrong_is_counted_by_reason():
    read = Read()
    async with watched(read.metrics, max_waiting=1) as (bench, client):

        async def fails(**options):
            with pytest.raises(NanoserveError):
                await client.generate(PROMPT, **options).result()

        await fails(temperature=-1)
        await fails(model="other")
        bench.executor.gate.clear()
        stream = client.generate(PROMPT)
        await until(lambda: bench.engine._streams)
        await fails()
        stream.cancel()
        await until(lambda: not bench.engine._streams)
        await miss_deadline(
            lambda timeout_s: client.generate(PROMPT, timeout=timeout_s),
            lambda: read.points("nanoserve.requests.deadline_missed"),
        )
        bench.executor.gate.set()
        bench.executor.is_broken = True
        await fails()
        await until(lambda: read.value("gen_ai.server.request.duration", error__type="ENGINE_FAILURE"))
    rejected = {found[names.ERROR_REASON]: count for found, count in read.points("nanoserve.calls.rejected")}
    assert rejected == {"INVALID_REQUEST": 1, "MODEL_NOT_FOUND": 1, "OVERLOADED": 1}
    assert read.points("nanoserve.requests.deadline_missed") == [({names.PHASE: "waiting"}, 1)]
    assert read.value("gen_ai.server.request.duration", error__type="ENGINE_FAILURE") == 1
    assert read.value("gen_ai.server.request.duration", error__type="OVERLOADED") == 1
    assert not read.points("gen_ai.server.time_to_first_token")


async def test_preemptions_are_counted():
    read = Read()
    async with watched(read.metrics, num_blocks=32) as (bench, client):
        bench.executor.gate.clear()
        streams = [client.generate([i] * 40, max_tokens=50, ignore_eos=True) for i in (1, 2)]
        await until(lambda: len(bench.engine._streams) == 2)
        bench.executor.gate.set()
        results = await asyncio.gather(*(stream.result() for stream in streams))
        await until(lambda: read.value("nanoserve.preemptions") == sum(r.timing.preemptions for r in results))
    assert read.value("nanoserve.preemptions") > 0


async def test_guesses_are_counted_by_source_and_place():
    read = Read()
    async with watched(read.metrics) as (bench, client):
        bench.executor._draft = two_right_drafts
        await client.generate(PROMPT, max_tokens=6).result()
        await until(lambda: read.points("nanoserve.spec_decode.num_drafts"))
    source = {"nanoserve.draft_source": "ngram"}
    assert read.points("nanoserve.spec_decode.num_drafts") == [(source, 2)]
    assert read.points("nanoserve.spec_decode.num_draft_tokens") == [(source, 4)]
    assert read.points("nanoserve.spec_decode.num_accepted_tokens") == [(source, 3)]
    assert read.points("nanoserve.spec_decode.num_accepted_tokens_per_pos") == [
        (source | {"nanoserve.spec_decode.position": "0"}, 2),
        (source | {"nanoserve.spec_decode.position": "1"}, 1),
    ]
    # What was guessed right need not be computed to go on from it.
    steps = {p.attributes["gen_ai.token.type"]: p.sum for p in read.all()["nanoserve.step.tokens"].data.data_points}
    assert steps == {"input": 9, "output": 2}


def test_every_reason_of_the_error_table_is_a_rejection_or_known_not_to_be():
    others = {"DEADLINE", "CANCELLED_BY_OPERATOR", "ENGINE_FAILURE", "REQUEST_NOT_FOUND", "NOT_RECORDED"}
    assert {kind.reason for kind in _TABLE} == REJECTIONS | others


async def test_the_page_tells_of_every_metric():
    """Name, unit and labels of each row of its table."""
    read = Read()
    read.metrics.server_ready("model", 1.0)
    read.refusals.note({"method": "GET", "raw_path": b"/", "state": {"request_id": "x"}}, bad_request(None, "no"))
    tell_of_an_adapter(read.metrics)
    async with watched(read.metrics, max_waiting=2, num_blocks=32) as (bench, client):
        # One of everything: two that preempt each other, one that is refused, one that is late, one that leaves. And
        # guesses, and a constraint.
        bench.executor._draft = lambda token_ids, seed: right_drafts(token_ids, seed, 2, VOCAB)
        bench.executor.gate.clear()
        streams = [client.generate([i] * 40, max_tokens=50, ignore_eos=True) for i in (1, 2)]
        await until(lambda: len(bench.engine._streams) == 2)
        with pytest.raises(NanoserveError):
            await client.generate(PROMPT).result()
        bench.executor.gate.set()
        await asyncio.gather(*(stream.result() for stream in streams))
        await client.generate(PROMPT, regex="ab").result()
        bench.executor.gate.clear()
        await miss_deadline(
            lambda timeout_s: client.generate(PROMPT, timeout=timeout_s),
            lambda: read.points("nanoserve.requests.deadline_missed"),
        )
        left = client.generate(PROMPT)
        await until(lambda: bench.engine._streams)
        left.cancel()
        bench.executor.gate.set()
        await until(lambda: len(read.all()) == 31)
        kept = {
            metric.name: (metric.unit, {label for p in metric.data.data_points for label in p.attributes})
            for metric in read.all().values()
        }
    assert on_the_page() == kept


def tell_of_an_adapter(metrics):
    metrics.request_ended(RequestRecord("label", 0.0, adapter="a", started_s=1.0))
    counts = AdapterCounts((AdapterUse("a", 1, 0),), num_loads=1, num_evictions=1, num_slots=2)
    metrics.step_ended(
        StepRecord(1, 0.0, 1.0, [], [], [], [], None, 0, 1, 64, 0, 0, None, has_failed=False, adapters=counts)
    )


def on_the_page():
    """Unit and labels of each metric."""
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \|([^|]+)\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {name: (unit.strip(), set(re.findall(r"`([a-z_.]+)`", labels))) for name, unit, labels in rows}


# ---------------------------------------------------------------------------------------------- over OTLP


def test_a_collector_is_pushed_what_prometheus_reads_and_the_callers_saw():
    port = free_port()
    with collecting() as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "200"}
        with serving("--http-port", f"{port}", variables=variables) as server, Client(server.address) as client:
            results = [client.chat("Hello!", n=n, max_tokens=5 * n, ignore_eos=True).result() for n in (1, 1, 2)]
            stream = client.generate("Once", max_tokens=1000, ignore_eos=True)
            next(stream)
            stream.cancel()
            with pytest.raises(NanoserveError):
                client.chat("Hello!", temperature=-1).result()

            def exposed():
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                    families = text_string_to_metric_families(answer.read().decode())
                    samples = [sample for family in families for sample in family.samples]
                # To Prometheus an empty label is none.
                return {
                    (s.name, frozenset((name, value) for name, value in s.labels.items() if value)): s.value
                    for s in samples
                    if s.name != "target_info"
                }

            # The cancelled call is counted last, and perhaps only after a while.
            pushed = collector.metrics(lambda pushed: count_of_calls(pushed) == 5 and as_samples(pushed) == exposed())
    assert collector.resource["service.name"] == "nanoserve"
    units = {name: unit for name, (unit, _) in on_the_page().items()}
    assert {name: metric.unit for name, metric in pushed.items()}.items() <= units.items()
    assert all(metric.description for metric in pushed.values())
    by_code = {labels["rpc.response.status_code"]: p.count for labels, p in points(pushed, "rpc.server.call.duration")}
    assert by_code == {"OK": 3, "CANCELLED": 1, "INVALID_ARGUMENT": 1}
    good = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "nanoserve"}
    good["gen_ai.request.model"] = "nanoserve-builtin"
    [(labels, point)] = points(pushed, "gen_ai.server.time_to_first_token")
    assert (labels, point.count) == (good, 3)
    # From the begin of the call, which is a moment before the request's.
    assert point.sum > sum(result.timing.queue_s + result.timing.prefill_s for result in results) - 1e-6
    [(_, point)] = points(pushed, "nanoserve.sequences.finished")
    assert point.as_int == 4
    [(_, point)] = points(pushed, "nanoserve.completion.tokens")
    assert point.as_int >= sum(result.usage.completion_tokens for result in results) == 30
    assert points(pushed, "nanoserve.calls.rejected")[0][0] == {"nanoserve.error.reason": "INVALID_REQUEST"}


def count_of_calls(pushed):
    return sum(point.count for _, point in points(pushed, "rpc.server.call.duration"))


def points(pushed, name):
    """(attributes, point) of each series."""
    if name not in pushed:
        return []
    metric = pushed[name]
    return [(attributes(point), point) for point in getattr(metric, metric.WhichOneof("data")).data_points]


def as_samples(pushed):
    """What Prometheus must read of a push: {(name, labels): value}."""
    return {
        (name, frozenset(labels.items())): value
        for metric in pushed.values()
        for name, labels, value in _samples(metric, {"s": "_seconds"}.get(metric.unit, ""))
    }


def _samples(metric, unit):
    name = metric.name.replace(".", "_") + unit
    kind = metric.WhichOneof("data")
    data = getattr(metric, kind)
    for point in data.data_points:
        labels = {key.replace(".", "_"): value for key, value in attributes(point).items()}
        if kind == "gauge":
            yield name, labels, getattr(point, point.WhichOneof("value"))
            continue
        assert data.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
        if kind == "sum":
            assert data.is_monotonic
            yield f"{name}_total", labels, getattr(point, point.WhichOneof("value"))
        else:
            yield f"{name}_count", labels, point.count
            yield f"{name}_sum", labels, point.sum
            bounds, counts = [*point.explicit_bounds, math.inf], itertools.accumulate(point.bucket_counts)
            for bound, count in zip(bounds, counts, strict=True):
                yield f"{name}_bucket", labels | {"le": floatToGoString(bound)}, count
