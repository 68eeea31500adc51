"""From what was noted to figures, for people and for programs. Pure."""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from nanoserve.bench.load import Measurement, Record


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must meet to count as good; None = anything will do. Milliseconds."""

    ttft: float | None = None
    # Of a request's mean inter-token latency.
    itl: float | None = None
    e2e: float | None = None

    def are_met_by(self, record: Record) -> bool:
        """A request that did not complete meets nothing."""
        itls_s = record.itls_s
        mean_itl_s = sum(itls_s) / len(itls_s) if itls_s else None
        pairs = ((self.ttft, record.ttft_s), (self.itl, mean_itl_s), (self.e2e, record.e2e_s))
        return record.is_completed and all(
            limit is None or seconds is None or seconds * 1000 <= limit for limit, seconds in pairs
        )

    def __str__(self) -> str:
        named = (("TTFT", self.ttft), ("mean ITL", self.itl), ("E2E", self.e2e))
        return ", ".join(f"{name} up to {limit:g} ms" for name, limit in named if limit is not None)


# Of latencies, in milliseconds: "mean", "p50", "p90", "p99". None if there are no latencies.
Distribution = dict[str, float | None]


def distribution_of(seconds: Iterable[float | None]) -> Distribution:
    """None among the values is skipped."""
    values = [value * 1000 for value in seconds if value is not None]
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    # Percentiles 1 to 99; between two values, as far along the way as the percentage is.
    percentiles = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {
        "mean": round(statistics.fmean(values), 3),
        **{f"p{percent}": round(percentiles[percent - 1], 3) for percent in (50, 90, 99)},
    }


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the limits."""

    limits_ms: Limits
    # Of the requests that ended, failed ones too.
    share: float
    req_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one workload.

    TTFT and ITL are of all tokens that came, those of requests that failed or were cut off too; E2E is of completed
    requests.
    """

    workload: str
    # Requests/s that were asked for; None = all at once.
    rate: float | None
    # Requests asked for, and how many of them completed.
    n: int
    completed: int
    # How many failed, by reason.
    failed: dict[str, int]
    # Cut off by Ctrl-C, or never sent.
    unfinished: int
    # From the first request due to the last end.
    seconds: float
    # Of completed requests.
    prompt_tokens: int
    cached_tokens: int
    # All that came.
    output_tokens: int
    tokens_per_delta: float | None
    # Of completed requests: guessed, and right.
    draft_tokens: int
    accepted_draft_tokens: int
    out_tok_s: float
    # Completed.
    req_s: float
    ttft_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    # None = no limit was given.
    goodput: Goodput | None

    @classmethod
    def of(cls, workload: str, rate: float | None, measurement: Measurement, limits: Limits) -> "Report":
        records, seconds = measurement.records, measurement.seconds
        ended = [r for r in records if r.end_s is not None]
        num_completed = sum(r.is_completed for r in records)
        num_tokens, num_deltas = sum(r.num_tokens for r in records), sum(len(r.arrivals) for r in records)
        goodput = None
        if limits != Limits():
            num_good = sum(map(limits.are_met_by, records))
            goodput = Goodput(limits, round(num_good / max(len(ended), 1), 4), round(num_good / seconds, 3))
        return cls(
            workload=workload,
            rate=rate,
            n=len(records),
            completed=num_completed,
            failed=dict(Counter(r.failure for r in ended if r.failure is not None)),
            unfinished=len(records) - len(ended),
            seconds=round(seconds, 3),
            prompt_tokens=sum(r.num_prompt_tokens for r in records),
            cached_tokens=sum(r.num_cached_tokens for r in records),
            output_tokens=num_tokens,
            tokens_per_delta=round(num_tokens / num_deltas, 3) if num_deltas else None,
            draft_tokens=sum(r.num_drafted for r in records),
            accepted_draft_tokens=sum(r.num_accepted for r in records),
            out_tok_s=round(num_tokens / seconds, 1),
            req_s=round(num_completed / seconds, 3),
            ttft_ms=distribution_of(r.ttft_s for r in records),
            itl_ms=distribution_of(itl_s for r in records for itl_s in r.itls_s),
            e2e_ms=distribution_of(r.e2e_s for r in records),
            goodput=goodput,
        )

    def as_text(self) -> str:
        """For people; ends with a newline."""
        arrivals = "all at once" if self.rate is None else f"{self.rate:g} requests/s"
        failures = "".join(f", {count} failed ({reason})" for reason, count in self.failed.items())
        unfinished = f", {self.unfinished} unfinished" if self.unfinished else ""
        cached = f"{self.cached_tokens / self.prompt_tokens:.0%} cached" if self.prompt_tokens else "none cached"
        merged = f", {self.tokens_per_delta:.1f} a Delta" if self.tokens_per_delta is not None else ""
        right = self.accepted_draft_tokens / max(self.draft_tokens, 1)
        lines = [
            f"{self.workload}, {arrivals}",
            f"  requests       {self.completed} of {self.n} completed{failures}{unfinished}",
            f"  time           {self.seconds:.2f} s",
            f"  throughput     {self.out_tok_s:.1f} output tokens/s, {self.req_s:.2f} requests/s",
            f"  prompt tokens  {self.prompt_tokens}, {cached}",
            f"  output tokens  {self.output_tokens}{merged}",
            f"  guesses        {self.draft_tokens}, {right:.0%} right",
            f"  {'ms':12} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10}",
            _row("TTFT", self.ttft_ms),
            _row("ITL", self.itl_ms),
            _row("E2E", self.e2e_ms),
        ]
        if self.goodput is not None:
            good = self.goodput
            lines.append(f"  goodput        {good.share:.1%}, {good.req_s:.2f} requests/s with {good.limits_ms}")
        return "\n".join(lines) + "\n"


def _row(name: str, values: Distribution) -> str:
    cells = ("-" if value is None else f"{value:.1f}" for value in values.values())
    return f"  {name:12} " + " ".join(f"{cell:>10}" for cell in cells)
