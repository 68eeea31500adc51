"""Which command is run, and what is said when there is none."""

import subprocess
import sys

import pytest

from nanoserve.cli import COMMANDS, main


def test_no_command_at_all_lists_the_commands(capsys):
    assert main([]) == 2
    error = capsys.readouterr().err
    assert all(f"  {name}" in error for name in COMMANDS)
    assert "Examples:" in error


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands_and_is_no_error(flag, capsys):
    assert main([flag]) == 0
    assert "usage: nanoserve COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sevre", "did you mean 'serve'?"), ("xyz", "there are serve, generate, chat, adapters, top, bench, version.")],
)
def test_an_unknown_command_is_one_line_with_a_hint(name, hint, capsys):
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert f"there is no command {name!r}; {hint}" in error
    assert error.count("\n") == 1


def test_an_unknown_flag_is_one_line_with_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", "--max-num-seq", "3"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean --max-num-seqs? See nanoserve serve --help" in error
    assert error.count("\n") == 1


def test_a_flag_that_lacks_its_value_is_not_taken_for_an_unknown_one(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--host"])
    assert capsys.readouterr().err == (
        "nanoserve serve: argument --host: expected one argument. See nanoserve serve --help\n"
    )


@pytest.mark.parametrize("argv", [[], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_does_not_wait_for_torch(argv):
    code = (
        "import sys\n"
        "from nanoserve.cli import main\n"
        "try:\n"
        f"    main({argv})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "sys.exit(1 if {'torch', 'transformers'} & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["serve", "generate", "chat", "top", "bench"])
def test_help_ends_with_examples(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    help = capsys.readouterr().out
    assert help.startswith(f"usage: nanoserve {name} ")
    assert f"\n  nanoserve {name}" in help.partition("Examples:")[2]


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "nanoserve", "help"], capture_output=True, text=True, check=True)
    assert "usage: nanoserve COMMAND" in done.stdout
