"""Makes the client's stubs from `protos/`; the results are committed.

    python tools/generate_stubs.py            write them
    python tools/generate_stubs.py --check    fail if what is committed differs from what would be written

protoc derives a Python module's name from the path of its proto file, so `nanoserve/v1/generation.proto` becomes
`nanoserve.v1.generation_pb2`, a name inside the engine's package. Renaming the proto file would change the name in its
descriptor, which reflection, the edge proxy and buf must see unchanged. So protoc runs on the contract as it is, and
only the names of Python modules are rewritten, to `nanoserve_client.v1`.
"""

import argparse
import difflib
import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
VENDORED = ROOT / "third_party" / "googleapis"
STUBS = ROOT / "clients" / "python" / "src" / "nanoserve_client" / "v1"

# `from nanoserve.v1 import generation_pb2`, and the module name that the generated classes carry for pickle.
_MODULE_NAME = re.compile(r"(?<=from )nanoserve\.v1(?= import )|(?<=')nanoserve\.v1(?=\.\w+_pb2')")
_PACKAGE = '"""Generated from protos/nanoserve/v1 by tools/generate_stubs.py: messages and service stubs."""\n'


def generate() -> dict[str, str]:
    """The text of every file of the stub package, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        _run_protoc(folder)
        made = sorted((Path(folder) / "nanoserve" / "v1").iterdir())
        stubs = {path.name: _MODULE_NAME.sub("nanoserve_client.v1", path.read_text()) for path in made}
    return {"__init__.py": _PACKAGE, **stubs}


def _run_protoc(folder: str) -> None:
    scripts = Path(sys.executable).parent
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={PROTOS}",
        f"--proto_path={VENDORED}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        f"--mypy_out=quiet:{folder}",
        f"--mypy_grpc_out=quiet:{folder}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


def write(stubs: dict[str, str], folder: Path) -> None:
    """Make `folder` hold these files and no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in stubs:
            path.unlink()
    for name, text in stubs.items():
        (folder / name).write_text(text)


def differences(stubs: dict[str, str], folder: Path) -> list[str]:
    """A unified diff from what `folder` holds to `stubs`; empty if they agree."""
    committed = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    lines: list[str] = []
    for name in sorted(committed.keys() | stubs.keys()):
        before, after = committed.get(name, ""), stubs.get(name, "")
        lines += difflib.unified_diff(
            before.splitlines(), after.splitlines(), f"committed/{name}", f"generated/{name}", lineterm=""
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the client's stubs from the contract.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    stubs = generate()
    if not parser.parse_args().check:
        write(stubs, STUBS)
    elif diff := differences(stubs, STUBS):
        sys.exit("\n".join([*diff[:200], "The stubs do not match protos/: run tools/generate_stubs.py"]))


if __name__ == "__main__":
    main()
