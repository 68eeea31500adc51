"""What the model may call, and which of it the caller wants called."""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What every format can write, and no format has to escape.
NAME = re.compile(r"[A-Za-z0-9_./\-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    # As NAME has it.
    name: str
    # JSON Schema of the arguments, which are an object. None = it takes none.
    parameters: Mapping[str, Any] | None = None
    # Its arguments are to satisfy the schema even where the choice is left to the model.
    is_strict: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"tool {self.name!r}: a name has 1 to 128 letters, digits or any of _ . / -")


class Choosing(enum.Enum):
    """Whether the model calls a tool."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the caller wants called. One certain tool: required, with its name alone."""

    choosing: Choosing = Choosing.AUTO
    # Only these may be called. None = all.
    names: frozenset[str] | None = None

    def allowed(self, tools: Sequence[Tool]) -> list[int]:
        """Places in `tools` of those that may be called."""
        if self.choosing is Choosing.NONE:
            return []
        return [i for i, tool in enumerate(tools) if self.names is None or tool.name in self.names]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a conversation, and how they may be called."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    # There may be more than one call.
    parallel: bool = True

    @property
    def allowed(self) -> list[int]:
        """Places of the tools that may be called."""
        return self.choice.allowed(self.tools)

    @property
    def is_held(self) -> bool:
        """The model may not simply call what it likes, with what arguments it likes."""
        return (
            self.choice.choosing is Choosing.REQUIRED
            or not self.parallel
            or self.choice.names is not None
            or any(self.tools[i].is_strict for i in self.allowed)
        )
