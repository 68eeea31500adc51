"""`nanoserve version`: what to put into a report of a problem."""

import argparse
import platform
from importlib import metadata

from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import write

PACKAGES = ("nanoserve", "nanoserve-client", "torch", "transformers", "tokenizers", "grpcio", "protobuf")
# What makes half precision on a CPU as fast as it can be, on x86 and ARM, and what comes next to it.
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2", "sve_bf16", "bf16", "neon")


def add_arguments(parser: Parser) -> None:
    parser.describe("", "Print versions, device and CPU features.", "nanoserve version")


def run(_arguments: argparse.Namespace) -> int:
    lines = [(name, _version_of(name)) for name in PACKAGES]
    lines.insert(1, ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    write("".join(f"{name:16}  {value}\n" for name, value in lines))
    # The rest has to wait for torch.
    write("".join(f"{name:16}  {value}\n" for name, value in _machine()))
    return 0


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    import torch

    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    found = torch.cpu.get_capabilities()
    features = [name for name in CPU_FEATURES if found.get(name)]
    return [
        ("device", ", ".join(devices) or "cpu"),
        ("cpu threads", str(torch.get_num_threads())),
        ("cpu features", " ".join(features) or "none that matter"),
    ]
