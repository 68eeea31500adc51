"""The adapters that are served, by name, and what is asked of them: load, replace, unload, list.

A request names an adapter; the content that the name stands for when it starts is the one that it is computed with to
its end. So a name may stand for new weights while streams still run with the old ones:

    load      read ──▶ checked ──▶ served; under the root folder also when a request first asks for it
    replace   the new content is served; the old one is kept until the last stream that began with it has ended
    unload    nobody may name it any more; it is forgotten when those who did are done
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.store import AdapterStore, Found
from nanoserve.adapter.vocabulary import (
    AdapterAnswer,
    AdapterInfo,
    AdapterMessage,
    AdaptersServed,
    AdapterStats,
    AdapterStatus,
    ListAdapters,
    LoadAdapter,
    UnloadAdapter,
)
from nanoserve.engine.residency import Residency
from nanoserve.engine.sequence import AdapterState, Sequence
from nanoserve.errors import (
    AdapterInUse,
    AdapterInvalid,
    AdapterMemoryFull,
    AdapterNotFound,
    EngineFailure,
    InvalidRequest,
    Rejection,
    RequestError,
    Violation,
)
from nanoserve.request import Event, Failure
from nanoserve.step_record import AdapterCounts, AdapterUse

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Changes:
    """What the scheduler must do about its sequences."""

    # They wait for another adapter than the one that they were queued for.
    moved: list[Sequence] = field(default_factory=list)
    # By request id.
    failures: list[tuple[str, Failure | Rejection]] = field(default_factory=list)


class ServedAdapters:
    """Owns the states of all adapters. Engine thread only, once it runs.

    What is asked of one name is done in the order in which it was asked for. A load that fails, however it fails,
    leaves what was there.
    """

    def __init__(self, store: AdapterStore, folders: AdapterFolders) -> None:
        self.store = store
        self.residency = Residency(store, self._read_again, self._give_up)
        self._folders = folders
        self._served: dict[str, AdapterState] = {}
        # Contents that no new request gets, and that somebody still uses.
        self._retired: list[AdapterState] = []
        # Of these, those that are unloaded: number of the message, and until when that may take.
        self._drains: dict[AdapterState, tuple[int, float]] = {}
        # Names under the root folder that were unloaded.
        self._withdrawn: set[str] = set()
        # Loads by name that the store's thread has yet to come to.
        self._num_loading: Counter[str] = Counter()
        # Those that have live sequences.
        self._used: dict[AdapterState, None] = {}
        self._changes = Changes()
        self._events: list[Event] = []
        self._num_loads = 0

    # ----------------------------------------------------------------------------------- what sequences do

    def add(self, name: str, sequences: list[Sequence]) -> None:
        """A request of this adapter is accepted. Raises AdapterNotFound."""
        state = self._served.get(name)
        if state is None:
            if name in self._withdrawn or self._folders.root is None:
                raise AdapterNotFound(name)
            state = self._served[name] = AdapterState(name)
        for sequence in sequences:
            self._bind(sequence, state)

    def _bind(self, sequence: Sequence, state: AdapterState) -> None:
        """It will be computed with this content, as soon as that is known."""
        request, sequence.adapter = sequence.request, state
        state.live[sequence] = None
        self._used[state] = None
        if state.info is not None and request.adapter != state.info.adapter:
            # Its blocks were named for another content, or for none.
            sequence.request = dataclasses.replace(request, adapter=state.info.adapter, block_hashes=[])
            sequence.block_hashes = []

    def remove(self, sequence: Sequence) -> None:
        """It is over."""
        state = sequence.adapter
        assert state is not None
        if sequence in state.waiting:
            self.residency.stop_waiting(state, sequence)
        del state.live[sequence]
        self._forget_if_unused(state)

    def _forget_if_unused(self, state: AdapterState) -> None:
        if state.live:
            return
        self._used.pop(state, None)
        if not state.is_served:
            self._retired.remove(state)
            self.residency.leave(state)
        elif state.info is None:
            # Nobody knows yet whether there is such an adapter.
            del self._served[state.name]
            self.residency.leave(state)
        if state in self._drains:
            number, _ = self._drains.pop(state)
            self._answer(number, None)

    # ---------------------------------------------------------------------------------------- once a step

    def settle(self, now: float) -> Changes:
        """Hear of what was read and written, and end what was waited for long enough. Returns what follows from it."""
        self.store.settle()
        for state, (number, until_s) in list(self._drains.items()):
            if now >= until_s:
                self._serve_again(state, number)
        changes, self._changes = self._changes, Changes()
        return changes

    def advance(self, now: float, num_steps: int) -> list[AdapterState]:
        """See Residency.advance."""
        return self.residency.advance(now, num_steps, self._retired)

    def take_events(self) -> list[Event]:
        """What is to be told since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def is_awaiting(self) -> bool:
        """Time alone may bring something about."""
        return bool(self._drains) or self.residency.has_waiting

    def counts(self) -> AdapterCounts:
        """Who has sequences, and what that cost."""
        uses = tuple(AdapterUse(s.name, s.num_running, len(s.live) - s.num_running) for s in self._used)
        return AdapterCounts(uses, self._num_loads, self.residency.num_evictions, self.store.num_slots)

    # ------------------------------------------------------------------------------------------- messages

    @property
    def served(self) -> AdaptersServed:
        """What new requests may name."""
        infos = (state.info for _, state in sorted(self._served.items()))
        return AdaptersServed(tuple(filter(None, infos)), frozenset(self._withdrawn))

    def load_first(self, name: str, folder: Path) -> None:
        """Before the engine runs: read an adapter and serve it. Raises a Rejection."""
        self._folders.check_name(name)
        self._put(AdapterState(name), self.store.read_now(name, folder))

    def obey(self, message: AdapterMessage, now: float) -> None:
        """Do what is asked for; the answer is among the events, now or later."""
        match message:
            case LoadAdapter(number):
                self._answering(number, partial(self._load, message))
            case UnloadAdapter(number, name, drain_timeout_s):
                unload = partial(self._answering, number, partial(self._unload, number, name, now + drain_timeout_s))
                if self._num_loading[name]:
                    # It comes behind what was asked of the name before.
                    self.store.submit(lambda: None, lambda _: unload())
                else:
                    unload()
            case ListAdapters(number):
                self._answer(number, self._stats())

    def _answering(self, number: int, act: Callable[[], None]) -> None:
        """Do it; what it raises is the answer."""
        try:
            act()
        except RequestError as error:
            self._answer(number, error)

    def _answer(self, number: int, result: AdapterInfo | AdapterStats | RequestError | None) -> None:
        self._events.append(AdapterAnswer(number, result))

    def _stats(self) -> AdapterStats:
        states = [state for state in (*self._served.values(), *self._retired) if state.info is not None]
        return AdapterStats(
            tuple(map(self._status, sorted(states, key=lambda s: (s.name, not s.is_served)))),
            self.store.num_bytes,
            self.store.max_bytes,
            self.store.num_slots,
        )

    def _status(self, state: AdapterState) -> AdapterStatus:
        assert state.info is not None
        num_waiting = len(state.live) - state.num_running
        return AdapterStatus(state.info, self.residency.place(state), state.num_running, num_waiting)

    def _load(self, message: LoadAdapter) -> None:
        self._folders.check_name(message.name)
        self._check_pin(message)
        find = partial(self._folders.resolve, message.name, message.path)
        self._num_loading[message.name] += 1
        self.store.read(message.name, find, partial(self._was_loaded, message))

    def _was_loaded(self, message: LoadAdapter, found: Found | Exception) -> None:
        self._num_loading[message.name] -= 1
        if not self._num_loading[message.name]:
            del self._num_loading[message.name]
        self._answering(message.number, partial(self._serve_loaded, message, found))

    def _serve_loaded(self, message: LoadAdapter, found: Found | Exception) -> None:
        if isinstance(found, Exception):
            raise _as_told(found)
        self._check_pin(message)
        found = dataclasses.replace(found, info=dataclasses.replace(found.info, is_pinned=message.is_pinned))
        state = self._state_for(message, found.info)
        self._put(state, found)
        self._answer(message.number, state.info)

    def _check_pin(self, message: LoadAdapter) -> None:
        """A slot must be left for those that are not pinned. Raises InvalidRequest."""
        if not message.is_pinned:
            return
        # One that is unloaded may yet be served again.
        states = (*self._served.values(), *self._drains)
        others = {s.name for s in states if s.info is not None and s.info.is_pinned} - {message.name}
        most = self.store.num_slots - 1
        if len(others) >= most:
            why = f"{len(others)} others are pinned; at most {most} can be, one less than --adapter-slots"
            raise InvalidRequest([Violation("pinned", why)])

    def _state_for(self, message: LoadAdapter, info: AdapterInfo) -> AdapterState:
        """Where the content belongs: to a state that has it already, or to a new one. Raises AdapterInUse."""
        if any(state.name == message.name for state in self._drains):
            raise AdapterInUse(message.name, "is being unloaded; load it when that is done")
        current = self._served.get(message.name)
        if current is None or current.info is None:
            return current or AdapterState(message.name)
        if current.info.adapter == info.adapter:
            return current
        if not message.may_replace:
            raise AdapterInUse(message.name, "has other weights already; set replace to serve these instead")
        # It may be that streams still run with this content from before.
        before = (s for s in self._retired if s.info is not None and s.info.adapter == info.adapter)
        return next(before, None) or AdapterState(message.name)

    def _put(self, state: AdapterState, found: Found) -> None:
        """Serve the content in this state. Raises AdapterMemoryFull, and then leaves all as it was."""
        is_kept = self.residency.kept_before(None, self._retired)
        if not self.store.add(found.info.adapter, found.weights, is_kept) and state.info is None:
            raise AdapterMemoryFull(state.name, found.info.num_bytes, self.store.max_bytes)
        self._num_loads += 1
        self._serve(state, found)

    def _serve(self, state: AdapterState, found: Found) -> None:
        """Requests get this content from now on; so do those that have not started yet."""
        state.folder, state.info = found.folder, dataclasses.replace(found.info, path=str(found.folder))
        self._withdrawn.discard(state.name)
        if not state.is_served:
            self._retired.remove(state)
            state.is_served = True
        old, self._served[state.name] = self._served.get(state.name), state
        for sequence in list(state.live):
            self._bind(sequence, state)
        if old is not None and old is not state:
            self._retire(old)
            for sequence in _not_started(old):
                self._move(sequence, old, state)
            self._forget_if_unused(old)
        self.residency.want(state)
        self._events.append(self.served)

    def _retire(self, state: AdapterState) -> None:
        """No new request gets it."""
        state.is_served = False
        self._retired.append(state)
        self.residency.want(state)

    def _move(self, sequence: Sequence, old: AdapterState, new: AdapterState) -> None:
        del old.live[sequence]
        if sequence in old.waiting:
            self.residency.stop_waiting(old, sequence)
            self._changes.moved.append(sequence)
        self._bind(sequence, new)

    def _unload(self, number: int, name: str, until_s: float) -> None:
        state = self._served.get(name)
        if state is None or state.info is None:
            raise AdapterNotFound(name)
        del self._served[name]
        if self._folders.root is not None:
            self._withdrawn.add(name)
        self._retire(state)
        self._drains[state] = number, until_s
        self._events.append(self.served)
        self._forget_if_unused(state)

    def _serve_again(self, state: AdapterState, number: int) -> None:
        """It was to be unloaded, but its requests have not ended in time."""
        del self._drains[state]
        self._retired.remove(state)
        state.is_served = True
        self._served[state.name] = state
        self._withdrawn.discard(state.name)
        self.residency.want(state)
        self._events.append(self.served)
        why = f"is in use: {len(state.live)} sequences have not ended in time; it is served as before"
        self._answer(number, AdapterInUse(state.name, why))

    # ------------------------------------------------------------------------------ what a request needs read

    def _read_again(self, state: AdapterState) -> None:
        """Its weights are not in main memory, or never were. For Residency."""
        folder = state.folder
        find = partial(self._folders.find, state.name) if folder is None else lambda: folder
        self.store.read(state.name, find, partial(self._was_read, state))

    def _was_read(self, state: AdapterState, found: Found | Exception) -> None:
        self.residency.finish_reading()
        if self._served.get(state.name) is not state and state not in self._retired:
            return  # nobody wants it any more
        if isinstance(found, Exception):
            self._give_up(state, found)
            return
        if state.info is not None and state.folder != found.folder:
            return  # it was loaded from another folder meanwhile
        self._num_loads += 1
        if state.info is None:
            self._serve(state, found)
        elif state.info.adapter != found.info.adapter:
            self._follow_change(state, found)
            return
        is_kept = self.residency.kept_before(state, self._retired)
        fits = self.store.add(found.info.adapter, found.weights, is_kept)
        if not fits and found.info.num_bytes > self.store.max_bytes:
            self._give_up(state, AdapterMemoryFull(state.name, found.info.num_bytes, self.store.max_bytes))

    def _follow_change(self, state: AdapterState, found: Found) -> None:
        """The folder has other content now, and the one that was served is nowhere any more: who has begun with it
        cannot go on. Others get the new one, which is read when its turn comes."""
        assert state.info is not None
        why = "its folder has changed since its weights were read, and they are needed again"
        if state.is_served:
            logger.warning("adapter %r has changed: new requests get what is in %s now", state.name, found.folder)
            info = dataclasses.replace(found.info, is_pinned=state.info.is_pinned)
            self._serve(AdapterState(state.name), dataclasses.replace(found, info=info))
        self._fail(state.live, AdapterInvalid(state.name, [why]))

    def _give_up(self, state: AdapterState, error: Exception) -> None:
        """It cannot be read, or not be put into its slot: who asks for it cannot be served. The next one may try."""
        told = _as_told(error)
        self._fail(state.live, told if isinstance(told, Rejection) else Failure.STEP)
        if state.is_pinned and state.info is not None:
            logger.warning("adapter %r is not pinned any more: %s", state.name, error)
            state.info = dataclasses.replace(state.info, is_pinned=False)
            self.residency.want(state)

    def _fail(self, sequences: Iterable[Sequence], error: Failure | Rejection) -> None:
        self._changes.failures += [(request_id, error) for request_id in dict.fromkeys(s.request.id for s in sequences)]

    def check_invariants(self) -> None:
        """Raise AssertionError if states, slots and memory do not agree. For tests, between steps."""
        self.residency.check_invariants()
        states = [*self._served.values(), *self._retired]
        assert all(state.live for state in self._retired)
        assert all(state.is_served for state in self._served.values())
        assert {state for state in states if state.live} == self._used.keys()
        assert self._drains.keys() <= set(self._retired)
        assert self.store.num_bytes <= self.store.max_bytes
        for state in states:
            running = [sequence for sequence in state.live if sequence.row is not None]
            assert len(running) == state.num_running
            assert not running or state.is_written
            assert all(sequence.adapter is state for sequence in state.live)
            assert set(state.waiting) <= state.live.keys() - set(running)
            assert not state.is_queued or state.is_open or state.slot is not None


def answer_without_adapters(message: AdapterMessage) -> AdapterAnswer:
    """What a server says that was started without adapters."""
    match message:
        case LoadAdapter(number):
            why = "this server was started without adapters; start it with --adapters DIR, and load what is under DIR"
            return AdapterAnswer(number, InvalidRequest([Violation("path", why)]))
        case UnloadAdapter(number, name):
            return AdapterAnswer(number, AdapterNotFound(name))
        case ListAdapters(number):
            return AdapterAnswer(number, AdapterStats((), num_bytes=0, max_bytes=0, num_slots=0))


def _not_started(state: AdapterState) -> list[Sequence]:
    """Sequences of requests of which nothing has run."""
    started = {sequence.request.id for sequence in state.live if sequence.has_started}
    return [sequence for sequence in state.live if sequence.request.id not in started]


def _as_told(error: Exception) -> RequestError:
    """What callers may know of it."""
    if isinstance(error, RequestError):
        return error
    logger.error("an adapter could not be read or moved", exc_info=error)
    return EngineFailure()
