"""Debian's packages without root: downloaded and unpacked, not installed.

Nothing outside of the folder is touched: apt keeps its lists there.
"""

import subprocess
import tempfile
from pathlib import Path


def unpack(packages: tuple[str, ...], root: Path, *, with_dependencies: bool = False) -> None:
    """Unpack them below root, and of what they depend on all that the machine lacks, if that is wanted.

    Raises OSError on a machine without apt, CalledProcessError if it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # apt's own user may not read a private folder.
        folder.chmod(0o755)
        for place in ("lists/partial", "archives/partial"):
            (folder / place).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}"]
        apt += ["-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=true"]
        subprocess.run([*apt, "update"], check=True)
        needed = set(packages)
        if with_dependencies:
            # 'address' name_version_architecture.deb size checksum
            install = [*apt, "install", "--no-install-recommends", "--print-uris", *packages]
            listed = subprocess.run(install, check=True, capture_output=True, text=True).stdout
            needed |= {line.split()[1].partition("_")[0] for line in listed.splitlines()}
        subprocess.run([*apt, "download", *sorted(needed)], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)
