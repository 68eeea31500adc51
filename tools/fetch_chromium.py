"""Puts Debian's headless Chromium into .venv, as .venv/bin/chromium-headless-shell, for the tests of the live view.

No root is needed, and nothing outside of the checkout is touched. A machine that has a Chromium in its PATH needs none
of it; one without apt goes without those tests, which say so.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from debian import unpack

BIN = Path(sys.executable).parent
PROGRAM = BIN / "chromium-headless-shell"
ROOT = BIN.parent / "chromium"
# What a test may find instead.
KNOWN = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")

FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{root}/usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>{root}/fontconfig</cachedir>
</fontconfig>
"""
LAUNCHER = """#!/bin/sh
export LD_LIBRARY_PATH="{libraries}"
export FONTCONFIG_FILE="{root}/fonts.conf"
exec "{root}/usr/lib/chromium/chromium-headless-shell" "$@"
"""


def main() -> None:
    if PROGRAM.exists() or any(map(shutil.which, KNOWN)):
        return
    try:
        shutil.rmtree(ROOT, ignore_errors=True)
        unpack(PACKAGES, ROOT, with_dependencies=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot get Chromium ({error}): the live view's tests are skipped until chromium is in the PATH")
    else:
        launch()


def launch() -> None:
    """Write the program, which finds the unpacked libraries and fonts."""
    libraries = sorted({str(path.parent) for path in ROOT.rglob("*.so*")} - {str(ROOT / "usr/lib/chromium")})
    (ROOT / "fonts.conf").write_text(FONTS.format(root=ROOT))
    PROGRAM.write_text(LAUNCHER.format(libraries=":".join(libraries), root=ROOT))
    PROGRAM.chmod(0o755)


if __name__ == "__main__":
    main()
