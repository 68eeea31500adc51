"""What a report of a problem needs."""

import torch
import transformers

from nanoserve.cli import main


def test_versions_device_and_cpu_features_are_printed(capsys):
    assert main(["version"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("cpu ", "cpu_").splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["transformers"] == transformers.__version__
    assert {"nanoserve", "nanoserve-client", "python", "grpcio", "protobuf", "device", "cpu_features"} <= lines.keys()
    assert "not installed" not in lines.values()


def test_the_flag_that_people_try_first_works_too(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nanoserve ")
