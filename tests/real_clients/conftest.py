"""A real chat model behind `nanoserve serve`, and for each of its clients an environment of its own.

Environments lie in benchmarks/venvs/, which git ignores. They are made when first needed, from PyPI and npm's registry.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_process import free_port, serving

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "benchmarks/checkpoints/smollm2-135m"
ENVIRONMENTS = ROOT / "benchmarks/venvs"
INSTALL_S = 900
RUN_S = 300
# Clients look nowhere but at the server.
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="session")
def model() -> Path:
    if not MODEL.exists():
        pytest.skip(f"needs a chat model: make {MODEL.relative_to(ROOT)}")
    return MODEL


@pytest.fixture(scope="session")
def url(model):
    """Of the server, without a path."""
    options = ("--served-model-name", "smollm2", "--http-port", str(free_port()))
    # In bfloat16 one step of rounding decides some first tokens: of the capital of France "The" has a logit of 25.36,
    # "L", which leads to a French text, 25.26, and numbers of that size are 0.125 apart.
    options += ("--dtype", "float32")
    # It has learned no way to call tools. Held to one it can be made to.
    options += ("--tool-call-parser", "hermes")
    with serving(str(model), *options, variables={"OMP_NUM_THREADS": str(os.cpu_count())}) as server:
        server.wait_until_ready_over_http()
        yield server.url


@pytest.fixture(scope="session")
def caller_url():
    """Of a server with the built-in model, which calls tools as SmolLM2-135M cannot; without a path."""
    with serving("--http-port", str(free_port())) as server:
        server.wait_until_ready_over_http()
        yield server.url


@pytest.fixture(scope="session")
def python_with() -> Callable[..., str]:
    """The Python of an environment that has the packages."""

    def python(name: str, *packages: str) -> str:
        folder = ENVIRONMENTS / f"clients-{name}"
        program = str(folder / "bin/python")
        install(folder, packages, [sys.executable, "-m", "venv", "."], [program, "-m", "pip", "install", *packages])
        return program

    return python


@pytest.fixture(scope="session")
def folder_with() -> Callable[..., Path]:
    """A folder from which Node.js finds the packages."""

    def folder(name: str, *packages: str) -> Path:
        if not (shutil.which("node") and shutil.which("npm")):
            pytest.skip("needs Node.js and npm")
        folder = ENVIRONMENTS / f"clients-{name}"
        install(folder, packages, ["npm", "install", "--no-audit", "--no-fund", *packages])
        return folder

    return folder


def install(folder: Path, packages: tuple[str, ...], *commands: list[str]) -> None:
    """Run the commands in the folder, unless they have brought the same packages before."""
    installed = folder / "installed.txt"
    if installed.exists() and installed.read_text().split() == list(packages):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in commands:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the registry does not answer: {' '.join(packages)}")
        if done.returncode != 0:
            pytest.skip(f"cannot install {' '.join(packages)}: {done.stderr[-300:]}")
    installed.write_text("\n".join(packages))


@pytest.fixture(scope="session")
def run() -> Callable[..., None]:
    """Run a client as a user does, in a process of its own; what it says is shown if it fails."""

    def run(*command: str | Path, cwd: Path | None = None) -> None:
        environment = {**os.environ, **OFFLINE}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    return run
