"""The floors of the house: who may import whom, who may know torch, and what can be taken out."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from nanoserve_client import Client, NanoserveError
from serve_process import serving

import nanoserve

SOURCE = Path(nanoserve.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_FUNCTION_LINES = 60
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"

# Room -> rooms that it may import. What engine and model share is the vocabulary in request.py.
ALLOWED = {
    "__main__": {"cli"},
    "bench": {"errors", "cli", "checkpoint", "config", "request", "build", "engine"},
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
    "build": {
        "adapter",
        "errors",
        "dialect",
        "constraint",
        "checkpoint",
        "config",
        "request",
        "engine",
        "model",
        "kv_cache",
        "speculation",
    },
    "flight_recorder": {"errors", "request", "step_record", "observability", "observer", "rpc"},
    "rpc": {"adapter", "dialect", "errors", "config", "request", "observer", "engine", "constraint"},
    "engine": {
        "adapter",
        "dialect",
        "errors",
        "config",
        "request",
        "constraint",
        "step_record",
        "observer",
        "kv_cache",
    },
    "model": {"adapter", "constraint", "checkpoint", "config", "request", "kv_cache", "speculation"},
    "kv_cache": {"adapter", "config", "request"},
    "constraint": {"errors", "request"},
    "dialect": {"errors", "request"},
    "speculation": {"request"},
    "observability": {"errors", "config", "request", "step_record", "observer"},
    "observer": {"errors", "request", "step_record"},
    "request": {"adapter", "errors", "step_record"},
    "adapter": {"checkpoint", "errors"},
    "errors": set(),
    "step_record": set(),
    "checkpoint": {"config"},
    "config": set(),
}


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(["nanoserve", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            inside = {f"{module}.{alias.name}" for alias in node.names} & set(map(module_of, MODULES))
            names |= inside or {module}
    return names


def test_the_page_draws_the_same_imports():
    lines = re.findall(r"^(\w+) +─▶(.*)$", PAGE.read_text(), re.MULTILINE)
    assert {room: set(allowed.split()) for room, allowed in lines} == ALLOWED


def test_the_page_has_every_error():
    """As the reference has them, which is made from the code."""
    told = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", PAGE.read_text(), re.MULTILINE)
    reference = (PAGE.parent / "reference" / "errors.md").read_text()
    assert told == re.findall(r"^\| \[([A-Z_]+)\]\(.*?\) \| ([A-Z_]+) ", reference, re.MULTILINE)


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
        "nanoserve.constraint.compiler",
        "nanoserve.dialect.grammar",
        "nanoserve.dialect.parser",
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


def test_no_imports_go_round_in_a_circle():
    """Not in functions either, and not for type checking alone."""
    modules = {module_of(path): path for path in MODULES}
    left = {module: (imports_of(path) & modules.keys()) - {module} for module, path in modules.items()}
    # Take out what imports nothing that is left, until nothing can be taken out: what remains are circles.
    while free := [module for module, used in left.items() if not used & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


def test_observers_know_nothing_of_each_other():
    folder = SOURCE / "observability"
    for name in ("tracing", "metrics", "access_log", "logs"):
        used = {each.rpartition(".")[2] for each in imports_of(folder / f"{name}.py") if ".observability." in each}
        assert used <= {"conventions"}, name


def test_the_flight_recorder_can_be_deleted(tmp_path):
    """Its folder, and the lines of the composition root that name it. The server then serves as before, but for the two
    RPCs that ask the recorder."""
    source = tmp_path / "nanoserve"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "flight_recorder"))
    root = source / "cli" / "serve.py"
    kept = [line for line in root.read_text().splitlines(keepends=True) if "recorder" not in line.lower()]
    root.write_text("".join(kept))
    assert [path for path in source.rglob("*.py") if "flight_recorder" in path.read_text()] == [source / "rpc/admin.py"]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    with serving(sabotage=code) as server, Client(server.address) as client:
        assert client.generate("Once", max_tokens=3, ignore_eos=True).result().usage.completion_tokens == 3
        for call in (lambda: client.explain_request("x"), lambda: next(client.watch_engine())):
            with pytest.raises(NanoserveError) as caught:
                call()
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_RECORDED")


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
