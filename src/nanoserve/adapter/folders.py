"""Names of adapters, and the folders that they stand for: what may be read, and what may not. No torch.

--adapter NAME=PATH     any folder; whoever starts the server may read what the server may
--adapters ROOT         the folders under ROOT alone, for requests and for LoadAdapter, symbolic links resolved
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanoserve.errors import AdapterNotFound, InvalidRequest, Violation

MAX_NAME_CHARS = 128
# Parts with slashes between them, none of which is hidden, "." or "..".
NAME = re.compile(r"[\w:-][\w.:-]*(/[\w:-][\w.:-]*)*", re.ASCII)
NAME_RULE = f"1 to {MAX_NAME_CHARS} characters of letters, digits and ._:/-, no part of which begins with a dot"
CONFIG = "adapter_config.json"


def name_problem(name: str, model_name: str) -> str | None:
    """Why no adapter may be called this beside a model of this name; None if it may."""
    if name == model_name:
        return f"{name!r} is the model's own name; an adapter needs another"
    if len(name) > MAX_NAME_CHARS or not NAME.fullmatch(name):
        return f"{name[:MAX_NAME_CHARS]!r} is no name of an adapter: {NAME_RULE}"
    return None


def parse_choice(choice: str) -> dict[str, Path]:
    """What --adapter says: NAME=PATH,NAME=PATH. Raises ValueError, which says what is wrong."""
    folders: dict[str, Path] = {}
    for part in choice.split(","):
        name, separator, path = part.strip().partition("=")
        if not (separator and name and path):
            raise ValueError(f"{part.strip()!r} is not NAME=PATH")
        if name in folders:
            raise ValueError(f"{name!r} is there twice")
        folders[name] = Path(path)
    return folders


@dataclass(frozen=True, slots=True)
class AdapterFolders:
    """The root folder, and who may be called what. Every method but `check_name` looks at the disk. Any thread."""

    # Of --adapters. None = there is none.
    root: Path | None
    # Of the model that is served; no adapter is called like it.
    model_name: str

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest."""
        if (problem := name_problem(name, self.model_name)) is not None:
            raise InvalidRequest([Violation("name", problem)])

    def names(self) -> Iterator[str]:
        """The adapters right under the root, read or not."""
        if self.root is not None and self.root.is_dir():
            for folder in self.root.iterdir():
                if name_problem(folder.name, self.model_name) is None and self.has(folder.name):
                    yield folder.name

    def has(self, name: str) -> bool:
        """The root has an adapter of this name, as far as can be told without reading it."""
        try:
            self.find(name)
        except AdapterNotFound:
            return False
        return True

    def find(self, name: str) -> Path:
        """The folder of a request's adapter. Raises AdapterNotFound, whatever is wrong with the name."""
        if self.root is None or name_problem(name, self.model_name) is not None:
            raise AdapterNotFound(name)
        folder = (self.root / name).resolve()
        if not (folder / CONFIG).is_file() or self._first_outside(folder) is not None:
            raise AdapterNotFound(name)
        return folder

    def resolve(self, name: str, path: str) -> Path:
        """The folder that LoadAdapter means; path: empty = as the adapter is called.

        Raises InvalidRequest or AdapterNotFound.
        """
        if self.root is None:
            why = "adapters are loaded from the folder of --adapters, and this server was started without it"
            raise InvalidRequest([Violation("path", why)])
        if "\0" in path:
            raise InvalidRequest([Violation("path", "it has a NUL character; a path has none")])
        folder = (self.root / (path or name)).resolve()
        if (outside := self._first_outside(folder)) is not None:
            why = f"{outside!r} is not under the folder of --adapters; only what is under it can be loaded"
            raise InvalidRequest([Violation("path", why)])
        if not folder.is_dir():
            raise AdapterNotFound(name)
        return folder

    def _first_outside(self, folder: Path) -> str | None:
        """What is not under the root: the resolved folder, or a file in it that is a link to elsewhere."""
        assert self.root is not None
        root = self.root.resolve()
        if folder == root or not folder.is_relative_to(root):
            return str(folder)
        if folder.is_dir():
            for file in folder.iterdir():
                if file.is_symlink() and not file.resolve().is_relative_to(root):
                    return str(file)
        return None
