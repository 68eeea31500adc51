import sys

import pytest
from matplotlib.figure import Figure

from nanoserve.bench.load import Measurement, Record
from nanoserve.bench.plot import _draw_shares, check_plot, save_plot, token_rates
from nanoserve.config import ConfigError

RECORD = Record(0.0, [(0.0, 1), (0.55, 2), (2.0, 4)], end_s=2.0)
MEASUREMENT = Measurement([RECORD, RECORD], seconds=2.0, is_interrupted=False)


def test_rates_are_of_the_tokens_that_came_in_each_part_of_the_run():
    rates, edges = token_rates(MEASUREMENT)
    assert len(edges) == len(rates) + 1
    assert (edges[0], edges[-1]) == (0, pytest.approx(2.0))
    width = edges[1]
    assert {i: rate * width for i, rate in enumerate(rates) if rate} == pytest.approx({0: 2, 13: 4, 49: 8})


@pytest.mark.parametrize(("name", "begin"), [("run.png", b"\x89PNG"), ("run.svg", b"<?xml")])
def test_the_file_has_the_format_of_its_name(tmp_path, name, begin):
    path = tmp_path / name
    check_plot(path)
    save_plot(path, [("8:64:16", MEASUREMENT), ("nothing came", Measurement([], 1.0, is_interrupted=True))])
    assert path.read_bytes().startswith(begin)


def test_percentiles_can_be_read_off():
    axes = Figure().subplots()
    _draw_shares(axes, [30.0, 10.0, 20.0, 40.0])
    [line] = axes.get_lines()
    assert dict(zip(*line.get_data(), strict=True)) == {10: 0.25, 20: 0.5, 30: 0.75, 40: 1}
    _draw_shares(axes, [])


def test_a_picture_that_could_not_be_drawn_is_refused_before_the_run(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        check_plot(tmp_path / "run.gif")
    with pytest.raises(ConfigError, match="no such folder"):
        check_plot(tmp_path / "nowhere" / "run.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'nanoserve\[bench\]'"):
        check_plot(tmp_path / "run.png")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run.png").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_plot(tmp_path / "run.png", [("8:64:16", MEASUREMENT)])
