"""A picture of a run: how TTFT and ITL are spread, and the throughput over time; a row for each workload."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from nanoserve.bench.load import Measurement
from nanoserve.config import ConfigError

FORMATS = (".png", ".svg")
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
        ttft.hist([r.ttft_s * 1000 for r in records if r.ttft_s is not None], bins=NUM_BINS)
        ttft.set(title=f"{name}: time to first token", xlabel="ms", ylabel="requests")
        itl.hist([seconds * 1000 for r in records for seconds in r.itls_s], bins=NUM_BINS)
        itl.set(title="inter-token latency", xlabel="ms", ylabel="tokens")
        rates, edges_s = token_rates(measurement)
        throughput.stairs(rates, edges_s, fill=True)
        throughput.set(title="throughput", xlabel="s", ylabel="output tokens/s")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot is {str(path)!r}; it cannot be written: {error.strerror}") from None


def token_rates(measurement: Measurement) -> tuple[list[float], list[float]]:
    """Output tokens/s in each of equal parts of the run, and the NUM_BINS + 1 times in seconds where these begin or
    end."""
    width_s = measurement.seconds / NUM_BINS
    counts = [0] * NUM_BINS
    for time_s, count in itertools.chain.from_iterable(record.arrivals for record in measurement.records):
        counts[min(int(time_s / width_s), NUM_BINS - 1)] += count
    return [count / width_s for count in counts], [i * width_s for i in range(NUM_BINS + 1)]
