"""What observers tell of adapters: metrics of which there are only so many, traces, the log, snapshots, timelines."""

import logging

import pytest
from metrics_reader import Read
from nanoserve_client.v1 import admin_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nanoserve.errors import AdapterNotFound
from nanoserve.flight_recorder.recorder import FlightRecorder
from nanoserve.observability import conventions as names
from nanoserve.observability.access_log import AccessLog
from nanoserve.observability.metrics import MAX_ADAPTERS, OTHER
from nanoserve.observability.tracing import Tracing
from nanoserve.observer import CallRecord, RequestRecord
from nanoserve.request import FinishReason, SamplingParams
from nanoserve.step_record import AdapterCounts, AdapterUse, StepRecord, Wait, WaitReason


def request_of(adapter, *, started_s=1.0, **fields):
    fields = {"number": 1, "id": "1", "finish_reasons": {0: FinishReason.EOS}, "end_s": 3.0, **fields}
    counts = {"num_prompt_tokens": 5, "num_completion_tokens": 7, "first_token_s": 1.5, "last_token_s": 2.0}
    revision = "0123456789abcdef" if adapter and started_s is not None else ""
    return RequestRecord(
        "mine", 0.5, adapter=adapter, adapter_revision=revision, started_s=started_s, **counts, **fields
    )


def call_of(request, code="OK"):
    return CallRecord(names.GENERATE, "mine", 0.25, number=1, request=request, code=code, end_s=3.5)


def step_of(*uses, num_loads=0, num_evictions=0, wait=None):
    """After which these (name, running, waiting) have sequences."""
    counts = AdapterCounts(tuple(AdapterUse(*use) for use in uses), num_loads, num_evictions, num_slots=8)
    lists = {"early_releases": [], "preemptions": [], "parts": [], "late_releases": []}
    blocks = {"num_free_blocks": 1, "num_cached_blocks": 0, "num_owned_blocks": 0}
    others = {"num_waiting": 0, "num_running": 0, "num_threads": None, "has_failed": False}
    return StepRecord(number=1, start_s=1.0, end_s=1.5, wait=wait, adapters=counts, **lists, **blocks, **others)


# --------------------------------------------------------------------------------------------------- metrics


def test_tokens_and_times_are_told_by_adapter():
    read = Read()
    read.metrics.server_ready("base", 1.0)
    for adapter in ("pirate", "pirate", ""):
        request = request_of(adapter)
        read.metrics.request_ended(request)
        read.metrics.call_ended(call_of(request))
    assert read.points("nanoserve.adapter.completion_tokens") == [({names.ADAPTER: "pirate"}, 14)]
    assert read.value("nanoserve.completion.tokens") == 21
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        assert read.value(f"gen_ai.server.{name}", gen_ai__request__model="pirate") == 2
        assert read.value(f"gen_ai.server.{name}", gen_ai__request__model="base") == 1


def test_names_that_callers_make_up_get_no_label():
    read = Read()
    for i in range(50):
        request = request_of(f"made-up-{i}", started_s=None, id="", finish_reasons={}, error=AdapterNotFound("x"))
        read.metrics.request_ended(request)
        read.metrics.call_ended(call_of(request, "NOT_FOUND"))
    labels = {found[names.REQUEST_MODEL] for found, _ in read.points("gen_ai.server.request.duration")}
    assert labels == {OTHER}
    assert read.points("nanoserve.adapter.completion_tokens") == []


def test_of_very_many_adapters_the_later_ones_share_a_label():
    read = Read()
    for i in range(3 * MAX_ADAPTERS):
        read.metrics.step_ended(step_of((f"tenant-{i}", 1, 0)))
        request = request_of(f"tenant-{i}")
        read.metrics.request_ended(request)
        read.metrics.call_ended(call_of(request))
    counted = {found[names.ADAPTER]: count for found, count in read.points("nanoserve.adapter.completion_tokens")}
    assert len(counted) == MAX_ADAPTERS + 1
    assert counted[OTHER] == 2 * MAX_ADAPTERS * 7
    assert len(read.points("nanoserve.adapter.sequences")) == 2 * (MAX_ADAPTERS + 1)
    assert len({found[names.REQUEST_MODEL] for found, _ in read.points("gen_ai.server.request.duration")}) == len(
        counted
    )


def test_sequences_of_adapters_are_those_of_the_last_step():
    read = Read()
    assert read.points("nanoserve.lora_requests_info") == []
    # A name that was replaced is there twice.
    read.metrics.step_ended(step_of(("pirate", 2, 1), ("pirate", 1, 0), ("german", 0, 4), num_loads=2))

    def sequences():
        return {
            (found[names.ADAPTER], found[names.PHASE]): count
            for found, count in read.points("nanoserve.adapter.sequences")
        }

    assert sequences() == {
        ("pirate", "running"): 3,
        ("pirate", "waiting"): 1,
        ("german", "running"): 0,
        ("german", "waiting"): 4,
    }
    [(info, _)] = read.points("nanoserve.lora_requests_info")
    assert info == {
        "max_lora": "8",
        "running_lora_adapters": "pirate",
        "waiting_lora_adapters": "pirate,german",
    }
    read.metrics.step_ended(step_of(num_loads=2))
    assert set(sequences().values()) == {0}
    [(info, _)] = read.points("nanoserve.lora_requests_info")
    assert (info["running_lora_adapters"], info["waiting_lora_adapters"]) == ("", "")


def test_loads_and_evictions_count_up():
    read = Read()
    for num_loads, num_evictions in ((2, 0), (2, 0), (5, 3), (5, 4)):
        read.metrics.step_ended(step_of(num_loads=num_loads, num_evictions=num_evictions))
    assert read.value("nanoserve.adapter.loads") == 5
    assert read.value("nanoserve.adapter.evictions") == 4


# ------------------------------------------------------------------------------------------- traces and the log


@pytest.mark.parametrize("adapter", ["pirate", ""])
async def test_a_span_names_the_adapter(adapter):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    tracing.server_ready("base", 1.0)
    call = call_of(request_of(adapter))
    tracing.call_started(call)
    tracing.call_ended(call)
    [span] = [each for each in exporter.get_finished_spans() if each.name == names.GENERATE]
    assert span.attributes["gen_ai.request.model"] == (adapter or "base")
    assert span.attributes["gen_ai.response.model"] == "base"
    assert span.attributes.get("nanoserve.adapter", "") == adapter
    assert span.attributes.get("nanoserve.adapter.revision", "") == ("0123456789abcdef" if adapter else "")


@pytest.mark.parametrize("adapter", ["pirate", ""])
def test_a_line_of_the_log_names_the_adapter(adapter, caplog):
    caplog.set_level(logging.INFO, "nanoserve")
    AccessLog().call_ended(call_of(request_of(adapter)))
    assert ("adapter=pirate adapter_revision=0123456789abcdef" in caplog.text) == bool(adapter)
    assert ("adapter" in caplog.text) == bool(adapter)


# ------------------------------------------------------------------------------------------- the flight recorder


def test_snapshots_name_the_adapter_of_a_sequence():
    recorder = FlightRecorder()
    for number, adapter in enumerate(("pirate", ""), start=1):
        request = request_of(adapter, number=number, id=f"{number}", finish_reasons={}, params=SamplingParams(n=1))
        recorder.request_arrived(lambda request=request: request)
    snapshot, _ = recorder.snapshot(None)
    assert [each.adapter for each in snapshot.sequences] == ["pirate", ""]


def test_a_timeline_says_the_adapter_and_that_it_was_waited_for():
    recorder = FlightRecorder()
    request = request_of("pirate")
    recorder.request_arrived(lambda: request)
    recorder.step_ended(step_of(("pirate", 0, 1), wait=Wait("1", 0, WaitReason.ADAPTER, "")))
    late = request_of("pirate", started_s=1.5)
    recorder.request_ended(late)
    [timeline] = recorder.explain("mine")
    assert (timeline.adapter, timeline.adapter_revision) == ("pirate", "0123456789abcdef")
    assert timeline.summary.startswith(
        "Computed with adapter pirate, revision 0123456789ab. Waited 500 ms for its adapter"
    )
    reasons = [entry.wait.reason for entry in timeline.entries if entry.HasField("wait")]
    assert admin_pb2.WAIT_REASON_ADAPTER in reasons


def test_a_timeline_of_a_refused_request_says_no_adapter():
    recorder = FlightRecorder()
    refused = request_of("pirate", started_s=None, id="", finish_reasons={}, error=AdapterNotFound("pirate"))
    recorder.request_arrived(lambda: refused)
    recorder.request_ended(refused)
    [timeline] = recorder.explain("mine")
    assert (timeline.adapter, timeline.adapter_revision) == ("", "")
    assert "It was refused: there is no adapter 'pirate'" in timeline.summary
