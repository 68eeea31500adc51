"""Where the options of a command come from: flag > environment > file > default.

A file is flat, because its keys are the flags' names, which are unique; so are the variables'. Values are checked here
for their kind, in config.py for what they mean.
"""

import argparse
import contextlib
import difflib
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanoserve.cli.flags import destination
from nanoserve.config import (
    SECTIONS,
    VARIABLE_PREFIX,
    ClientOptions,
    ConfigError,
    Options,
    Setting,
    environment,
    settings,
)

ALL = {setting.name: setting for setting in settings(*SECTIONS)}
# What Kubernetes tells every container of a service called "nanoserve" or "nanoserve-something".
SERVICE_LINK = re.compile(r"\w+_SERVICE_(HOST|PORT\w*)|\w+_PORT_\d+_(TCP|UDP)\w*|\w+_PORT(?==(tcp|udp)://)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A value that somebody set."""

    setting: Setting
    value: Any
    # As in "... comes from ORIGIN". None = the command line, which the reader has before them.
    origin: str | None


class Choices:
    """Everything that was set, by the name of its setting; of several origins the highest."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self._choices = choices

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Choices":
        """What flags, variables and the file of --config say. Raises ConfigError."""
        choices = {} if arguments.config is None else _read_file(Path(arguments.config))
        return cls({**choices, **_read_environment(environment()), **_read_flags(vars(arguments))})

    def options(self) -> Options:
        """Raises ConfigError."""
        with self.origins_in_errors():
            return Options(**{part.name: self._section(part.name) for part in fields(Options)})

    def client_options(self) -> ClientOptions:
        """Raises ConfigError."""
        with self.origins_in_errors():
            options: ClientOptions = self._section("client")
            return options

    def flags(self, *sections: str) -> list[str]:
        """What the command line itself says of these sections."""
        chosen = (c for c in self._choices.values() if c.setting.section in sections and c.origin is None)
        return ["MODEL" if c.setting.is_positional else c.setting.flag for c in chosen]

    @contextlib.contextmanager
    def origins_in_errors(self) -> Iterator[None]:
        """A ConfigError from within says where the values that it speaks of come from."""
        try:
            yield
        except ConfigError as error:
            message = str(error)
            for choice in self._choices.values():
                if choice.origin is not None and _speaks_of(message, choice):
                    message += f" ({choice.setting.name} comes from {choice.origin})"
            raise ConfigError(message) from error

    def _section(self, name: str) -> Any:
        chosen = (c for c in self._choices.values() if c.setting.section == name)
        return SECTIONS[name](**{c.setting.field: c.value for c in chosen})


def _speaks_of(message: str, choice: Choice) -> bool:
    if re.search(rf"(?<![\w-]){choice.setting.flag}(?![\w-])", message):
        return True
    # Paths and names that are wrong stand in the message as they are.
    is_text = choice.setting.kind in (str, Path)
    return is_text and re.search(rf"(?<!\w){re.escape(str(choice.value))}(?!\w)", message) is not None


def _read_flags(given: Mapping[str, Any]) -> dict[str, Choice]:
    return {
        name: _choose(setting, given[place], None, "MODEL" if setting.is_positional else setting.flag)
        for name, setting in ALL.items()
        if given.get(place := destination(setting)) is not None
    }


def _read_environment(variables: Mapping[str, str]) -> dict[str, Choice]:
    """An empty variable is one that is not set. One that no option has is told of, and does not matter."""
    known = {setting.variable: setting for setting in ALL.values()}
    choices = {}
    for name, text in variables.items():
        if not name.startswith(VARIABLE_PREFIX) or not text or SERVICE_LINK.match(f"{name}={text}"):
            continue
        if name in known:
            choices[known[name].name] = _choose(known[name], text, name, name)
        else:
            logger.warning("%s is set, and no option has that name%s", name, _suggest(name, known))
    return choices


def _read_file(path: Path) -> dict[str, Choice]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # bad TOML, or bad UTF-8
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if tables := [key for key, value in content.items() if isinstance(value, dict)]:
        raise ConfigError(f"{path} has a section [{tables[0]}]; options stand in the file without sections")
    if unknown := [f"{key!r}{_suggest(key, ALL)}" for key in content if key not in ALL]:
        raise ConfigError(f"{path}: there is no option {', '.join(unknown)}")
    return {key: _choose(ALL[key], value, str(path), f"{key} in {path}") for key, value in content.items()}


def _choose(setting: Setting, value: object, origin: str | None, where: str) -> Choice:
    """where: as in "WHERE is 'x'; it must be ...". Raises ConfigError."""
    try:
        return Choice(setting, setting.parse(value), origin)
    except ValueError as error:
        raise ConfigError(f"{where} is {value!r}; {error}") from None


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
