"""`nanoserve bench` hands over to the benchmarks."""

import pytest

from nanoserve.cli import main


@pytest.mark.parametrize("kind", ["offline", "serve"])
def test_each_kind_has_its_own_help(kind, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", kind, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: nanoserve bench {kind}")


def test_no_kind_and_another_kind_are_refused_in_one_line(capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("nanoserve: which benchmark? offline or serve")
    with pytest.raises(SystemExit) as end:
        main(["bench", "online"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
