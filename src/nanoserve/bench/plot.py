"""A picture of a run: the distributions of TTFT and ITL, and the throughput over time; a row for each workload."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoserve.bench.load import Measurement
from nanoserve.config import ConfigError

FORMATS = (".png", ".svg")
# Of the throughput over time.
NUM_BINS = 50


def check_plot(path: Path) -> None:
    """Raise ConfigError if `save_plot` could not draw this; called before the run, which may be long."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot is {str(path)!r}; the file's name must end in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}; there is no such folder")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'nanoserve[bench]'") from None


def save_plot(path: Path, measurements: Sequence[tuple[str, Measurement]]) -> None:
    """Write the file. measurements: each with its workload's text. Raises ConfigError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.5 * len(measurements)), layout="constrained")
    rows = figure.subplots(len(measurements), 3, squeeze=False)
    for (ttft, itl, throughput), (name, measurement) in zip(rows, measurements, strict=True):
        records = measurement.records
        _draw_shares(ttft, [r.ttft_s * 1000 for r in records if r.ttft_s is not None])
        ttft.set(title=f"{name}: time to first token", xlabel="ms, at most", ylabel="share of requests")
        _draw_shares(itl, [seconds * 1000 for r in records for seconds in r.itls_s])
        itl.set(title="inter-token latency", xlabel="ms, at most", ylabel="share of tokens")
        rates, edges_s = token_rates(measurement)
        throughput.stairs(rates, edges_s, fill=True)
        throughput.set(title="throughput", xlabel="s", ylabel="output tokens/s")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot is {str(path)!r}; it cannot be written: {error.strerror}") from None


def _draw_shares(axes: Any, values: Sequence[float]) -> None:
    """How many of the values are at most so large: every percentile can be read off, of few values and of many."""
    if values:
        axes.ecdf(values)
    axes.set(xlim=(0, None), ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 0.9, 1])
    axes.grid(alpha=0.4)


def token_rates(measurement: Measurement) -> tuple[list[float], list[float]]:
    """Output tokens/s in each of equal parts of the run, and the NUM_BINS + 1 times in seconds where these begin or
    end."""
    width_s = measurement.seconds / NUM_BINS
    counts = [0] * NUM_BINS
    for time_s, count in itertools.chain.from_iterable(record.arrivals for record in measurement.records):
        counts[min(int(time_s / width_s), NUM_BINS - 1)] += count
    return [count / width_s for count in counts], [i * width_s for i in range(NUM_BINS + 1)]
