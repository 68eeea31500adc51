"""Puts Prometheus and promtool of Debian's package into .venv/bin, for the tests that scrape a server.

No root is needed, and nothing outside of the checkout is touched. A machine that has both in its PATH needs none of it;
one without apt goes without those tests, which say so.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from debian import unpack

BIN = Path(sys.executable).parent
PROGRAMS = ("prometheus", "promtool")


def main() -> None:
    if all(shutil.which(program) or (BIN / program).exists() for program in PROGRAMS):
        return
    try:
        with tempfile.TemporaryDirectory() as root:
            unpack(("prometheus",), Path(root))
            for program in PROGRAMS:
                shutil.copy2(Path(root) / "usr" / "bin" / program, BIN / program)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot get Prometheus ({error}): its tests are skipped until prometheus and promtool are in the PATH")


if __name__ == "__main__":
    main()
