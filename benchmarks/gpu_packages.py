"""The Python packages of benchmarks/gpu.py on a machine that has torch and numpy, but no network.

`collect` downloads wheels where there is a network; `install` puts them into a folder of their own where there is none;
`lacking` says by name what is still missing. Only pip is used, and the copy of `packaging` that it brings.
"""

import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECTS = (ROOT, ROOT / "clients/python", ROOT / "gateway/openai")
# Where their modules lie: they are not installed.
SOURCES = tuple(str(project / "src") for project in PROJECTS)
OURS = {"nanoserve", "nanoserve-client", "nanoserve-gateway"}
# Of the machine itself, with all that they need.
GIVEN = {"torch", "numpy"}
# pip matches these exactly; wheels are made for several.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
LIMIT_BYTES = 60 << 20


def requirements() -> Iterator[Requirement]:
    """What we ask for ourselves, and the tests' runner."""
    for project in PROJECTS:
        yield from map(Requirement, tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"])
    yield Requirement("pytest>=9")


def needed(python: str) -> dict[str, list[Requirement]]:
    """Package -> what is asked of it, by us or by others that are installed here. python: such as 3.12."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    found: dict[str, list[Requirement]] = {}
    pending = list(requirements())
    while pending:
        asked = pending.pop()
        name = canonicalize_name(asked.name)
        if name in OURS or asked in found.setdefault(name, []):
            continue
        found[name].append(asked)
        if name not in GIVEN:
            for each in map(Requirement, _requires(name)):
                extras = ("", *asked.extras)
                if each.marker is None or any(each.marker.evaluate({**machine, "extra": extra}) for extra in extras):
                    pending.append(each)
    return found


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def lacking() -> list[str]:
    """What this machine has not, or has too old, by name."""
    words = []
    for name, asked in sorted(needed(f"{sys.version_info.major}.{sys.version_info.minor}").items()):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            words.append(f"{name} is missing")
            continue
        unmet = {str(each.specifier) for each in asked if not each.specifier.contains(version, prereleases=True)}
        if unmet:
            words.append(f"{name} is {version}, and should be {' and '.join(sorted(unmet))}")
    return words


def install(wheels: str, folder: str) -> int:
    """Returns how many there were. Raises CalledProcessError."""
    files = sorted(map(str, Path(wheels).glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    if files:
        subprocess.run([*pip, "--no-cache-dir", "--target", folder, *files], check=True)
    return len(files)


def collect(folder: str, python: str) -> str:
    """Download, in the versions that are installed here, what a machine with torch and numpy lacks; says what came."""
    names = sorted(set(needed(python)) - GIVEN)
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--python-version", python, "--implementation", "cp", *platforms, "--dest", folder]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, *target, *pinned], check=True)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.whl"))
    if size > LIMIT_BYTES:
        sys.exit(f"the wheels in {folder} have {size >> 20} MiB, and may have {LIMIT_BYTES >> 20}")
    return f"{len(names)} wheels for Python {python} in {folder}, {size / (1 << 20):.0f} MiB"
