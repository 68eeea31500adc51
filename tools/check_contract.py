"""Checks the contract in `protos/`: lint, format, build, and that no change breaks who already speaks it.

    python tools/check_contract.py                    against main, or origin/main in a clone that has no main
    python tools/check_contract.py --against HEAD~1   against another commit

Everything works offline: the one dependency is vendored in `third_party/googleapis`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUF = Path(sys.executable).parent / "buf"


class CheckFailed(Exception):
    """A check found something, or could not be made."""


def run(command: list[str | Path], root: Path) -> str:
    """Standard output of a command; raises CheckFailed with what it said if it fails."""
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stdout + done.stderr
        raise CheckFailed(f"{' '.join(map(str, command))} failed:\n{said}")
    return done.stdout


def find_baseline(root: Path, against: str | None) -> str | None:
    """The commit to compare with; None if the repository has no commit yet.

    Raises CheckFailed if there are commits, but not the one wanted: a clone without main cannot check anything.
    """
    for name in [against] if against else ["main", "origin/main"]:
        command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    has_commits = run(["git", "rev-list", "--all", "--max-count=1"], root) != ""
    if against or has_commits:
        wanted = against or "main"
        raise CheckFailed(f"there is no commit {wanted!r} to compare the contract with: git fetch origin main:main")
    return None


def check_breaking(root: Path, against: str | None) -> str:
    """Compare with the baseline. Returns what was done, which may be nothing, and why."""
    baseline = find_baseline(root, against)
    if baseline is None:
        return "nothing to compare with: the repository has no commit yet"
    if run(["git", "ls-tree", baseline, "--", "protos", "buf.yaml"], root).count("\n") < 2:
        return f"nothing to compare with: commit {baseline[:12]} has no contract"
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "baseline.tar"
        run(["git", "archive", f"--output={archive}", baseline], root)
        run([BUF, "breaking", "--against", archive], root)
    return f"nothing breaks since commit {baseline[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the contract in protos/.")
    parser.add_argument("--against", metavar="COMMIT", help="what must not break (default: main)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = arguments.root
    try:
        run([BUF, "lint"], root)
        run([BUF, "format", "--diff", "--exit-code"], root)
        run([BUF, "build"], root)
        outcome = check_breaking(root, arguments.against)
    except CheckFailed as failure:
        sys.exit(str(failure))
    sys.stdout.write(f"contract: lint, format and build pass; {outcome}\n")


if __name__ == "__main__":
    main()
