"""What is installed from wheels alone, without the repository: everything that serves the built-in model."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("clients/python", "gateway/openai", ".")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*cache", ".hypothesis", "*.egg-info", "build", "tests", "docs", "benchmarks"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheels, and what they depend on lent by this one."""
    folder = tmp_path_factory.mktemp("wheels")
    # A copy, because building writes into the sources.
    shutil.copytree(ROOT, folder / "sources", ignore=NOT_COPIED)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    sources = [str(folder / "sources" / each) for each in DISTRIBUTIONS]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheels"), *sources)
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
    wheels = map(str, (folder / "wheels").glob("*.whl"))
    run(*pip, "--python", str(folder / "venv"), "install", "--no-deps", "--no-index", *wheels)
    # Of a folder that a .pth file names, .pth files do nothing: what is installed here in editable form is not lent.
    [packages] = (folder / "venv").glob("lib/*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_comes_from_the_wheels(environment):
    code = (
        "import nanoserve, nanoserve_client, nanoserve_gateway as gateway\n"
        "print(nanoserve.__file__, nanoserve_client.__file__, gateway.__file__)"
    )
    for path in run(str(environment / "bin" / "python"), "-c", code).split():
        assert Path(path).is_relative_to(environment), path


@pytest.mark.parametrize("distribution", ["nanoserve-client", "nanoserve-gateway"])
def test_client_and_gateway_are_installed_without_torch(distribution):
    needed: set[str] = set()
    asked = [distribution]
    while asked:
        name = asked.pop()
        needed.add(name)
        for requirement in map(Requirement, metadata.requires(name) or ()):
            is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_wanted and (other := canonicalize_name(requirement.name)) not in needed:
                asked.append(other)
    assert "grpcio" in needed
    assert not needed & {"nanoserve", "torch", "transformers"}


def test_the_built_in_model_answers_without_a_network(environment):
    # Whoever asked the Hub would fail.
    answer = run(
        str(environment / "bin" / "nanoserve"), "generate", "--chat", "What is TTFT?", "--temperature", "0",
        HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert "time to first token" in answer
