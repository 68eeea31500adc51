"""The reference page says of every option what its help says, and its check finds a difference."""

import subprocess
import sys
import tomllib
from pathlib import Path

from reference.flags import USED_BY, render

from nanoserve.cli.sampling import sampling_flags
from nanoserve.cli.sources import ALL
from nanoserve.config import BUILTIN_MODEL, SECTIONS

TOOL = Path(__file__).parent.parent.parent / "tools" / "generate_reference.py"


def test_every_option_and_sampling_flag_is_on_the_page():
    page = render()
    helps = {each.flag: each.help for each in ALL.values()} | {k: v["help"] for k, v in sampling_flags().items()}
    for flag, help in helps.items():
        assert flag in page
        assert help.replace("|", "\\|") in page
    assert USED_BY.keys() == SECTIONS.keys()
    assert str(BUILTIN_MODEL) not in page


def test_the_pages_example_of_a_file_is_one():
    example = render().partition("```toml\n")[2].partition("```")[0]
    for key, value in tomllib.loads(example).items():
        ALL[key].parse(value)


def test_the_tool_writes_the_page_and_its_check_finds_a_difference(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(TOOL), "flags", "--folder", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--check").returncode == 1
    assert run().returncode == 0
    path = tmp_path / "flags.md"
    assert path.read_text() == render()
    assert run("--check").returncode == 0
    path.write_text(path.read_text().replace("`64`", "`65`"))
    check = run("--check")
    assert check.returncode == 1
    assert "-| `--max-num-seqs N` | `65` |" in check.stderr
