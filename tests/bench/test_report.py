import json
from dataclasses import asdict

import pytest

from nanoserve.bench.load import Measurement, Record
from nanoserve.bench.report import Limits, Report, distribution_of

FAST = Record(0.0, [(0.1, 1), (0.2, 1), (0.3, 1)], end_s=0.3, num_prompt_tokens=30, num_cached_tokens=10)
SLOW = Record(0.5, [(1.5, 1), (2.0, 2)], end_s=2.0, num_prompt_tokens=10)
FAILED = Record(0.5, [(0.6, 1), (0.9, 1)], end_s=1.0, failure="ENGINE_FAILURE")
UNFINISHED = Record(0.5, [(0.8, 1)])
MEASUREMENT = Measurement([FAST, SLOW, FAILED, UNFINISHED], seconds=2.0, is_interrupted=True)


def report(limits=Limits(), measurement=MEASUREMENT):  # noqa: B008
    return Report.of("4:10:3", None, measurement, limits)


def test_percentiles_lie_between_the_values_around_them():
    assert distribution_of([0.05, 0.02, 0.03, 0.04, 0.01]) == {"mean": 30, "p50": 30, "p90": 46, "p99": 49.6}
    assert distribution_of([0.007]) == {"mean": 7, "p50": 7, "p90": 7, "p99": 7}


def test_a_distribution_is_in_milliseconds_and_skips_what_is_missing():
    assert distribution_of([0.003, None, 0.001]) == {"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98}
    assert distribution_of([None]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_counts_and_rates():
    r = report()
    assert (r.n, r.completed, r.failed, r.unfinished) == (4, 2, {"ENGINE_FAILURE": 1}, 1)
    assert (r.prompt_tokens, r.cached_tokens, r.output_tokens) == (40, 10, 9)
    assert (r.out_tok_s, r.req_s) == (4.5, 1.0)
    assert r.tokens_per_delta == pytest.approx(9 / 8)


def test_guesses_are_told():
    assert "guesses        0, 0% right" in report().as_text()
    guessing = Record(0.0, [(0.1, 5)], end_s=0.2, num_prompt_tokens=3, num_drafted=8, num_accepted=4)
    r = report(measurement=Measurement([guessing, guessing], seconds=1.0, is_interrupted=False))
    assert (r.draft_tokens, r.accepted_draft_tokens) == (16, 8)
    assert "guesses        16, 50% right" in r.as_text()


def test_first_and_next_tokens_of_every_request_count_and_the_ends_of_completed_ones():
    r = report()
    assert r.ttft_ms["mean"] == pytest.approx((100 + 1000 + 100 + 300) / 4)
    assert r.itl_ms["mean"] == pytest.approx((100 + 100 + 250 + 250 + 300) / 5)
    assert r.e2e_ms["mean"] == pytest.approx((300 + 1500) / 2)


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [
        (Limits(ttft=1000), 2),
        (Limits(ttft=999), 1),
        (Limits(ttft=99), 0),
        (Limits(itl=250.1), 2),
        (Limits(itl=249), 1),
        (Limits(e2e=1500), 2),
        (Limits(e2e=1499), 1),
        (Limits(ttft=1000, itl=249, e2e=1500), 1),
    ],
)
def test_goodput_counts_completed_requests_within_every_limit(limits, num_good):
    goodput = report(limits).goodput
    # Two completed, one failed; the one that was cut off might have been good.
    assert goodput.share == pytest.approx(num_good / 3, abs=1e-4)
    assert goodput.req_s == num_good / 2.0


def test_a_limit_on_tokens_does_not_fail_a_request_of_one_token():
    one = Record(0.0, [(0.5, 1)], end_s=0.5)
    goodput = report(Limits(itl=1), Measurement([one], 1.0, is_interrupted=False)).goodput
    assert goodput.share == 1


def test_without_limits_there_is_no_goodput():
    assert report().goodput is None
    assert "goodput" not in report().as_text()


def test_text_has_the_figures_and_says_what_did_not_complete():
    text = report(Limits(ttft=1000, e2e=9000)).as_text()
    assert "2 of 4 completed, 1 failed (ENGINE_FAILURE), 1 unfinished" in text
    assert "4.5 output tokens/s, 1.00 requests/s" in text
    assert "25% cached" in text
    assert "TTFT              375.0" in text
    assert "66.7%, 1.00 requests/s with TTFT up to 1000 ms, E2E up to 9000 ms" in text


def test_a_run_in_which_nothing_came_has_figures_too():
    nothing = report(Limits(ttft=1), Measurement([Record(0.0, end_s=1.0, failure="X")], 1.0, is_interrupted=False))
    assert "0 of 1 completed, 1 failed (X)" in nothing.as_text()
    assert nothing.ttft_ms["p99"] is None
    assert nothing.goodput.share == 0
    assert json.loads(json.dumps(asdict(nothing)))["ttft_ms"]["mean"] is None


def test_json_names_the_limits():
    fields = json.loads(json.dumps(asdict(report(Limits(itl=249)))))
    assert fields["goodput"]["limits_ms"] == {"ttft": None, "itl": 249, "e2e": None}
    assert fields["failed"] == {"ENGINE_FAILURE": 1}
    assert set(fields["itl_ms"]) == {"mean", "p50", "p90", "p99"}
