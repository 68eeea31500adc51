import asyncio
import itertools
import statistics
import threading

import pytest
from nanoserve_client import AsyncClient
from nanoserve_client.v1 import generation_pb2 as pb
from scripted_server import delta, finished, overloaded, started

from nanoserve.bench.load import Record, due_times, measure, over_grpc
from nanoserve.bench.workload import BenchRequest

REQUESTS = [BenchRequest([11, 12], 3), BenchRequest([13, 14, 15], 5)]


def test_tokens_of_one_delta_share_the_time_since_the_one_before():
    record = Record(due_s=0.25, arrivals=[(1.0, 3), (1.4, 4), (1.5, 1)])
    assert record.ttft_s == 0.75
    assert record.itls_s == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert record.num_tokens == 8


def test_a_request_without_tokens_has_no_latencies():
    record = Record(due_s=0.25, end_s=1.0, failure="OVERLOADED")
    assert (record.ttft_s, record.itls_s, record.e2e_s) == (None, [], None)


def test_without_a_rate_all_requests_are_due_at_once():
    assert due_times(3, rate=None) == [0.0, 0.0, 0.0]


def test_with_a_rate_gaps_between_requests_are_exponential():
    times = due_times(4001, rate=4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert min(gaps) > 0
    assert due_times(4001, rate=4) == times


async def test_every_token_and_end_is_noted(target):
    ends = []
    async with AsyncClient(target.address) as client:
        measurement = await measure(over_grpc(client), REQUESTS, None, lambda: ends.append(1))
    assert [r.num_tokens for r in measurement.records] == [3, 5]
    for record in measurement.records:
        times = [time_s for time_s, _ in record.arrivals]
        assert times[0] > 0
        assert times == sorted(times)
        assert times[-1] <= record.end_s <= measurement.seconds
        assert record.e2e_s == record.end_s
        assert (record.num_prompt_tokens, record.num_cached_tokens) == (4, 2)
    assert len(ends) == 2
    assert not measurement.is_interrupted


async def test_requests_are_greedy_of_exact_length_and_share_prefixes_within_one_run_alone(target):
    async with AsyncClient(target.address) as client:
        await measure(over_grpc(client), REQUESTS, None)
        await measure(over_grpc(client), REQUESTS, None)
    sent = target.script.requests
    assert sorted(list(r.token_ids.ids) for r in sent[:2]) == [[11, 12], [13, 14, 15]]
    assert all(r.sampling.temperature == 0 and r.sampling.HasField("temperature") for r in sent)
    assert all(r.stopping.ignore_eos for r in sent)
    assert sorted(r.stopping.max_tokens for r in sent) == [3, 3, 5, 5]
    first, again = ({r.cache.salt for r in run} for run in (sent[:2], sent[2:]))
    assert len(first) == len(again) == 1
    assert first != again


async def test_no_request_is_sent_before_it_is_due_and_latencies_count_from_then(target):
    async with AsyncClient(target.address) as client:
        measurement = await measure(over_grpc(client), [*REQUESTS, *REQUESTS], rate=50)
    assert [r.due_s for r in measurement.records] == due_times(4, rate=50)
    for record in measurement.records:
        assert record.arrivals[0][0] > record.due_s
        assert record.ttft_s == record.arrivals[0][0] - record.due_s
        assert record.e2e_s == record.end_s - record.due_s


async def test_a_failure_is_noted_by_its_reason_and_the_others_go_on(target):
    def generate(request, context):
        if len(request.token_ids.ids) == 2:
            context.abort_with_status(overloaded(pushback_ms=-1))
        yield started()
        yield delta(token_ids=(1, 2), finish_reason=pb.FINISH_REASON_LENGTH)
        yield finished(2)

    target.script.generate = generate
    async with AsyncClient(target.address) as client:
        failed, completed = (await measure(over_grpc(client), REQUESTS, None)).records
    assert (failed.failure, failed.is_completed, failed.e2e_s) == ("OVERLOADED", False, None)
    assert (completed.failure, completed.is_completed) == (None, True)


async def test_what_was_noted_before_an_interruption_is_kept(target):
    def generate(request, context):
        yield started()
        yield delta(token_ids=(1,), finish_reason=pb.FINISH_REASON_LENGTH)
        if len(request.token_ids.ids) == 3 and context.add_callback(is_cut_off.set):  # else it is already
            is_cut_off.wait()
        yield finished(1)

    is_cut_off = threading.Event()
    target.script.generate = generate
    async with AsyncClient(target.address) as client:
        task = asyncio.create_task(measure(over_grpc(client), REQUESTS, None, lambda: task.cancel()))
        measurement = await task
    done, cut_off = measurement.records
    assert measurement.is_interrupted
    assert done.is_completed
    assert (cut_off.end_s, cut_off.e2e_s) == (None, None)
    assert not task.cancelling()
