"""Puts Debian's headless Chromium into .venv, as .venv/bin/chromium-headless-shell, for the tests of the live view.

No root is needed, and nothing outside of the checkout is touched: apt keeps its lists in a folder of its own, and
packages are unpacked, not installed. A machine that has a Chromium in its PATH needs none of it; one without apt goes
without those tests, which say so.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
        fetch()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot get Chromium ({error}): the live view's tests are skipped until chromium is in the PATH")


def fetch() -> None:
    """Raises OSError without apt, CalledProcessError if it fails."""
    shutil.rmtree(ROOT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # apt's own user may not read a private folder.
        folder.chmod(0o755)
        for place in ("lists/partial", "archives/partial"):
            (folder / place).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}"]
        apt += ["-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=true"]
        subprocess.run([*apt, "update"], check=True)
        # What the machine lacks of all that they need: 'address' name_version_architecture.deb size checksum
        install = [*apt, "install", "--no-install-recommends", "--print-uris", *PACKAGES]
        listed = subprocess.run(install, check=True, capture_output=True, text=True).stdout
        needed = {line.split()[1].partition("_")[0] for line in listed.splitlines()}
        # They may be installed, and yet be no program in the PATH.
        subprocess.run([*apt, "download", *sorted(needed | set(PACKAGES))], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, ROOT], check=True)
    launch()


def launch() -> None:
    """Write the program, which finds the unpacked libraries and fonts."""
    libraries = sorted({str(path.parent) for path in ROOT.rglob("*.so*")} - {str(ROOT / "usr/lib/chromium")})
    (ROOT / "fonts.conf").write_text(FONTS.format(root=ROOT))
    PROGRAM.write_text(LAUNCHER.format(libraries=":".join(libraries), root=ROOT))
    PROGRAM.chmod(0o755)


if __name__ == "__main__":
    main()
