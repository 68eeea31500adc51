"""The floors of the house: who may import whom, who may know torch, and what can be taken out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nanoserve

SOURCE = Path(nanoserve.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Room -> rooms that it may import. What engine and model share is the vocabulary in request.py.
ALLOWED = {
    "__main__": {"cli"},
    "bench": {"cli", "checkpoint", "config", "request", "build", "engine"},
    "cli": {
        "config",
        "request",
        "observer",
        "observability",
        "flight_recorder",
        "rpc",
        "build",
        "engine",
        "engine_process",
        "local",
    },
    "llm": {"config", "request", "local"},
    "local": {"checkpoint", "config", "request", "rpc", "build"},
    "engine_process": {"checkpoint", "config", "request", "observer", "engine", "build"},
    "build": {"config", "request", "engine", "model", "kv_cache"},
    "flight_recorder": {"request", "step_record", "observer", "rpc"},
    "rpc": {"config", "request", "observer", "engine"},
    "engine": {"config", "request", "step_record", "observer", "kv_cache"},
    "model": {"checkpoint", "config", "request", "kv_cache"},
    "kv_cache": {"config", "request"},
    "observability": {"config", "request", "step_record", "observer"},
    "observer": {"request", "step_record"},
    "request": {"step_record"},
    "step_record": set(),
    "checkpoint": {"config"},
    "config": set(),
}


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("nanoserve.")}
    assert used - {room} <= ALLOWED[room]


def test_engine_knows_the_block_pool_and_the_model_the_tensors():
    for path in MODULES:
        forbidden = {"engine": "paged_kv_cache", "model": "block_pool"}.get(room_of(path))
        assert not any(name.endswith(f".{forbidden}") for name in imports_of(path)), path


def test_every_room_is_listed():
    assert {room_of(path) for path in MODULES} - {"__init__"} == ALLOWED.keys()


@pytest.mark.parametrize(
    "module",
    [
        "nanoserve.checkpoint",
        "nanoserve.engine.engine",
        "nanoserve.rpc.server",
        "nanoserve.engine_process",
        "nanoserve.kv_cache.block_pool",
    ],
)
def test_engine_and_rpc_run_without_torch(module):
    code = (
        f"import sys, {module}\n"
        "found = {'torch', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(f'imports {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_config_reads_the_environment():
    for path in MODULES:
        if path.name != "config.py":
            names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not names & {"environ", "getenv", "putenv"}, path


def test_features_do_not_import_each_other_and_only_build_imports_them():
    for path in MODULES:
        used = {name for name in imports_of(path) if name.startswith("nanoserve.features")}
        assert not used or path.name == "build.py", path


def test_observers_know_nothing_of_each_other():
    folder = SOURCE / "observability"
    for name in ("tracing", "metrics", "access_log", "logs"):
        used = {each.rpartition(".")[2] for each in imports_of(folder / f"{name}.py") if ".observability." in each}
        assert used <= {"conventions"}, name


def test_gateway_needs_neither_the_engine_nor_torch():
    code = (
        "import sys, nanoserve_gateway.server\n"
        "found = {'torch', 'transformers', 'nanoserve'} & sys.modules.keys()\n"
        "sys.exit(f'imports {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_client_needs_neither_the_engine_nor_torch():
    code = (
        "import sys, nanoserve_client\n"
        "found = {'torch', 'transformers', 'nanoserve'} & sys.modules.keys()\n"
        "sys.exit(f'imports {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
