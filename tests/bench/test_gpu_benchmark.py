"""benchmarks/gpu.py, on a CPU: what it reckons, what it keeps of a stage that fails, and, as a soak, all of it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanoserve.bench.workload import BenchRequest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """They are scripts in a folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def start(tmp_path, *arguments):
    """Returns the report."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--results", path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert path.exists(), done.stderr
    report = json.loads(path.read_text())
    assert (done.returncode == 0) == all(stage["ended"] == "well" for stage in report["stages"].values())
    for name in report["stages"]:
        assert f"## {name}: ended " in done.stdout
    return report


def test_decoding_is_compared_with_what_its_steps_must_read():
    gpu_work = importlib.import_module("gpu_work")
    work = gpu_work.Work("two", [BenchRequest([1] * 10, 3), BenchRequest([1] * 20, 3)], 0.0)
    reads = gpu_work.Reads(weights=1000, kv=1, vocab_size=100)
    # The second's first token comes last, beside the first's second; then there are two steps.
    row = gpu_work.figures(work, [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], 0.0, reads, bandwidth=1e4)
    assert row["done"] == 1
    assert (row["seconds"], row["tokens/s"], row["prompts, s"]) == (4.0, 1.5, 2.0)
    assert (row["decode tokens/s"], row["ms a step"]) == (1.5, 1000.0)
    # Steps read the weights twice, and contexts of 10 + 2, of 20 + 1 and of 20 + 2 tokens.
    assert row["of memory"] == pytest.approx((2000 + 12 + 21 + 22) / 1e4 / 2, abs=1e-3)


def test_what_came_in_time_counts():
    gpu_work = importlib.import_module("gpu_work")
    work = gpu_work.Work("two", [BenchRequest([1], 4), BenchRequest([1], 4)], 0.0)
    reads = gpu_work.Reads(weights=1000, kv=1, vocab_size=100)
    assert gpu_work.figures(work, [[], []], 0.0, reads, None) == {"workload": "two", "done": 0.0}
    assert gpu_work.figures(work, [[1.0, 2.0], []], 0.0, reads, None) == {
        "workload": "two",
        "done": 0.25,
        "seconds": 2.0,
        "tokens/s": 1.0,
    }


def test_nano_vllms_benchmark_is_drawn_as_it_draws():
    gpu_work = importlib.import_module("gpu_work")
    given = gpu_work.Given("cpu", False, "", "", None, 0.0, None)
    requests = gpu_work.nano(given, 151936).requests
    assert (len(requests), sum(len(r.prompt) for r in requests)) == (256, 142_827)
    assert sum(r.num_out for r in requests) == 133_966


def test_a_stage_that_fails_or_hangs_is_recorded_with_its_last_lines_and_the_next_goes_on(tmp_path):
    # There is no checkpoint, and 0.1 s is too little for Python to start.
    stages = start(tmp_path, "--stages", "offline", "peer")["stages"]
    assert list(stages) == ["offline", "peer"]
    assert stages["peer"]["ended"] == "with exit code 1"
    assert stages["peer"]["last_lines"] == ["there is no checkpoint: its stage did not end well"]
    [late] = start(tmp_path, "--stages", "facts", "--seconds", "0.1")["stages"].values()
    assert late["ended"].startswith("out of time")
    assert late["rows"] == []


# Where other tests have imported distutils.
@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")
def test_what_is_lacking_is_said_by_name(monkeypatch):
    gpu_packages = importlib.import_module("gpu_packages")
    asked = [gpu_packages.Requirement(text) for text in ("torch>=1", "transformers>=99", "no-such-package")]
    monkeypatch.setattr(gpu_packages, "requirements", lambda: iter(asked))
    lacking = [word for word in gpu_packages.lacking() if "99" in word or "no-such" in word]
    assert lacking[0] == "no-such-package is missing"
    assert lacking[1].startswith("transformers is ")
    assert lacking[1].endswith(", and should be >=99")


@pytest.mark.soak
def test_all_stages_end_well_on_a_cpu(tmp_path):
    stages = start(tmp_path, "--seconds", "900")["stages"]
    assert {name: stage["ended"] for name, stage in stages.items()} == dict.fromkeys(stages, "well")
    assert [row["done"] for row in stages["offline"]["rows"]] == [1.0] * 5
    assert all(row["of memory"] > 0 for row in stages["offline"]["rows"])
    [counted] = stages["equivalence"]["rows"]
    assert (counted["families"], counted["passed"]) == (1, 1)
    assert [row["rows"] for row in stages["step"]["rows"] if "kernels" in row] == [1, 6]
    assert len(stages["peer"]["rows"]) == 3
    assert stages["8b"]["rows"][-1]["tokens/s"] > 0
