"""Puts Prometheus and promtool of Debian's package into .venv/bin, for the tests that scrape a server.

No root is needed, and nothing outside of the checkout is touched: apt keeps its lists in a folder of its own. A machine
that has both in its PATH needs none of it; one without apt goes without those tests, which say so.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent
PROGRAMS = ("prometheus", "promtool")


def main() -> None:
    if all(shutil.which(program) or (BIN / program).exists() for program in PROGRAMS):
        return
    try:
        fetch()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot get Prometheus ({error}): its tests are skipped until prometheus and promtool are in the PATH")


def fetch() -> None:
    """Raises OSError without apt, CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # apt's own user may not read a private folder.
        folder.chmod(0o755)
        for place in ("lists/partial", "archives/partial"):
            (folder / place).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}"]
        apt += ["-o", "APT::Sandbox::User="]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "download", "prometheus"], cwd=folder, check=True)
        [package] = folder.glob("prometheus_*.deb")
        subprocess.run(["dpkg", "-x", package, folder / "package"], check=True)
        for program in PROGRAMS:
            shutil.copy2(folder / "package" / "usr" / "bin" / program, BIN / program)


if __name__ == "__main__":
    main()
