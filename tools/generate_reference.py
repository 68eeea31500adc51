"""Makes the reference pages of docs/ that follow from code; the results are committed.

python tools/generate_reference.py            write docs/reference/{flags,protos,errors,rest}.md
python tools/generate_reference.py --check    fail if what is committed differs from what would be written
"""

import argparse
import difflib
import sys
from pathlib import Path

from reference import errors, flags, protos, rest

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGES = {"flags": flags.render, "protos": protos.render, "errors": errors.render, "rest": rest.render}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make reference pages from the code.")
    parser.add_argument("page", choices=PAGES, nargs="?", help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--folder", type=Path, default=REFERENCE, help="where the pages lie")
    arguments = parser.parse_args()
    for page in [arguments.page] if arguments.page else PAGES:
        path = arguments.folder / f"{page}.md"
        if arguments.check:
            check(path, PAGES[page]())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(PAGES[page]())


def check(path: Path, text: str) -> None:
    committed = path.read_text() if path.exists() else ""
    if committed != text:
        diff = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "generated", lineterm="")
        sys.exit("\n".join([*list(diff)[:200], f"{path} does not match the code: run make reference"]))


if __name__ == "__main__":
    main()
