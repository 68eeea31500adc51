"""What the server, the step loop and the model side say to each other of adapters: plain picklable data, no torch."""

import enum
from dataclasses import dataclass

from nanoserve.errors import RequestError


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights that a request is computed with, besides the model's."""

    name: str
    # Hexadecimal digest of the content: equal for equal files, whatever their name.
    revision: str


class Residency(enum.Enum):
    """Where an adapter's weights are."""

    DISK = "disk"  # in its folder alone; they are read when a request asks for them
    HOST = "host"  # in main memory
    ACTIVE = "active"  # in a slot, ready for the next step


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that was read and checked."""

    adapter: Adapter
    path: str
    # The largest of its layers.
    rank: int
    # Of its weights in memory.
    num_bytes: int
    # Never leaves its slot.
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """How an adapter fares."""

    info: AdapterInfo
    residency: Residency
    # Sequences.
    num_running: int = 0
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """All adapters, by name, and what they take."""

    adapters: tuple[AdapterStatus, ...]
    # Of all weights in main memory, and the most that they may take.
    num_bytes: int
    max_bytes: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read an adapter and check it. Answered by its AdapterInfo."""

    number: int
    name: str
    # Empty = of this name under the root folder.
    path: str = ""
    is_pinned: bool = False
    # A name that has other weights already gets these. Requests that run keep theirs.
    may_replace: bool = False


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Forget an adapter, once the requests that run with it have ended. Answered by None."""

    number: int
    name: str
    # How long these may take; then it is an AdapterInUse, and the adapter is served again.
    drain_timeout_s: float


@dataclass(frozen=True, slots=True)
class ListAdapters:
    """Answered by AdapterStats."""

    number: int


@dataclass(frozen=True, slots=True)
class AdaptersServed:
    """What new requests may name, from now on."""

    # Those that were read, by name.
    adapters: tuple[AdapterInfo, ...]
    # Names of folders under the root folder that are no adapters any more, because they were unloaded.
    withdrawn: frozenset[str]


AdapterMessage = LoadAdapter | UnloadAdapter | ListAdapters


@dataclass(frozen=True, slots=True)
class AdapterAnswer:
    """Answers an AdapterMessage of the same number."""

    number: int
    result: AdapterInfo | AdapterStats | RequestError | None
