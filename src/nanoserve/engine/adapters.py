"""The adapters that are served, by name, and what is asked of them: load, replace, unload, list.

A request names an adapter; the content that the name stands for when it starts is the one that it is computed with to
its end. So a name may stand for new weights while streams still run with the old ones:

    load      read ──▶ checked ──▶ served                          a name that is read when a request first asks for it
    replace   new content is served; the old one is kept until the last stream that began with it has ended
    unload    nobody may name it any more; it is forgotten when those who did are done
"""

import dataclasses
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanoserve.adapter.folders import AdapterFolders
from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import (
    Adapter,
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
from nanoserve.engine.residency import AdapterState, Residency
from nanoserve.engine.sequence import Sequence
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
from nanoserve.step_record import AdapterUse

if TYPE_CHECKING:
    from nanoserve.adapter.weights import AdapterWeights

logger = logging.getLogger(__name__)


class ServedAdapters:
    """Owns the states of all adapters. Engine thread only, once it runs.

    What is asked of one name is done in the order in which it was asked for. A load that fails, however it fails, leaves
    what was there.
    """

    def __init__(self, store: AdapterStore, folders: AdapterFolders) -> None:
        self.store = store
        self.residency = Residency(store, self._read_again, self._give_up)
        # For the scheduler to report, by request id.
        self.failures: list[tuple[str, Failure | Rejection]] = []
        self.events: list[Event] = []
        # They wait for another adapter than the one that they were queued for.
        self.moved: list[Sequence] = []
        self._folders = folders
        self._served: dict[str, AdapterState] = {}
        # Contents that no new request gets, and that somebody still uses.
        self._retired: list[AdapterState] = []
        # Of these, those that are unloaded: number of the message, and until when that may take.
        self._drains: dict[AdapterState, tuple[int, float]] = {}
        # Names under the root folder that were unloaded.
        self._withdrawn: set[str] = set()
        # Messages by name that the store's thread has yet to come to.
        self._pending: Counter[str] = Counter()
        self._num_loads = 0

    # -------------------------------------------------------------------------------------------- sequences

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
        """It will be computed with this content, as far as that is known."""
        request, sequence.adapter = sequence.request, state
        state.live.add(sequence)
        if state.info is not None and request.adapter != state.info.adapter:
            # Its blocks were named for another content.
            sequence.request = dataclasses.replace(request, adapter=state.info.adapter, block_hashes=[])
            sequence.block_hashes = []

    def remove(self, sequence: Sequence) -> None:
        """It is over."""
        assert (state := sequence.adapter) is not None
        state.live.remove(sequence)
        self._forget_if_unused(state)

    def _forget_if_unused(self, state: AdapterState) -> None:
        if state.live or (state.is_served and state.info is not None):
            return
        if state.is_served:
            self._served.pop(state.name, None)
        else:
            self._retired.remove(state)
        self.residency.leave(state)
        if state in self._drains:
            number, _ = self._drains.pop(state)
            self._answer(number, None)

    # ------------------------------------------------------------------------------------------- once a step

    def advance(self, now: float, num_steps: int) -> list[AdapterState]:
        """See Residency.advance; it also ends what was waited for long enough."""
        self.store.settle()
        for state, (number, until_s) in list(self._drains.items()):
            if now >= until_s:
                self._serve_again(state, number)
        return self.residency.advance(now, num_steps, self._retired)

    @property
    def is_awaiting(self) -> bool:
        """Time alone may bring something about."""
        return bool(self._drains)

    def stats(self) -> AdapterStats:
        """All that were read, and what they take."""
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

    def uses(self) -> tuple[AdapterUse, ...]:
        """Who has requests."""
        states = [state for state in (*self._served.values(), *self._retired) if state.live]
        return tuple(AdapterUse(s.name, s.num_running, len(s.live) - s.num_running) for s in states)

    @property
    def counts(self) -> tuple[int, int]:
        """How often weights were read, and how often a slot was taken from an adapter."""
        return self._num_loads, self.residency.num_evictions

    # --------------------------------------------------------------------------------------------- messages

    def load_first(self, name: str, folder: Path) -> None:
        """Before the engine runs: read an adapter and serve it. Raises AdapterInvalid, or another Rejection."""
        self._folders.check_name(name)
        info, weights = self.store.read_now(name, folder)
        self._put(AdapterState(name), folder, info, weights)

    def obey(self, message: AdapterMessage, now: float) -> None:
        """Do what is asked for; the answer is among the events, now or later."""
        try:
            match message:
                case LoadAdapter():
                    self._load(message)
                case UnloadAdapter(number, name, drain_timeout_s):
                    if self._pending[name]:
                        # Behind the loads of this name.
                        again = partial(self._obey_later, message, now)
                        self._defer(name, lambda: None, again)
                    else:
                        self._unload(number, name, now + drain_timeout_s)
                case ListAdapters(number):
                    self._answer(number, self.stats())
        except RequestError as error:
            self._answer(message.number, error)

    def _obey_later(self, message: UnloadAdapter, now: float, _: object) -> None:
        self.obey(message, now)

    def _answer(self, number: int, result: AdapterInfo | AdapterStats | RequestError | None) -> None:
        self.events.append(AdapterAnswer(number, result))

    def _load(self, message: LoadAdapter) -> None:
        self._folders.check_name(message.name)
        self._check_pin(message)
        find = partial(self._folders.resolve, message.name, message.path)
        self._pending[message.name] += 1
        self.store.read(message.name, find, partial(self._loaded, message))

    def _check_pin(self, message: LoadAdapter) -> None:
        """A slot must be left for those that are not pinned. Raises InvalidRequest."""
        others = [s for s in self._served.values() if s.is_pinned and s.name != message.name]
        most = self.store.num_slots - 1
        if message.is_pinned and len(others) >= most:
            why = f"{len(others)} adapters are pinned; at most {most} can be, which is one less than --adapter-slots"
            raise InvalidRequest([Violation("pinned", why)])

    def _loaded(self, message: LoadAdapter, result: "tuple[Path, AdapterInfo, AdapterWeights] | Exception") -> None:
        """It was read, or could not be."""
        self._end_pending(message.name)
        if isinstance(result, Exception):
            self._answer(message.number, _as_told(result))
            return
        folder, info, weights = result
        info = dataclasses.replace(info, is_pinned=message.is_pinned)
        try:
            self._check_pin(message)
            state = self._state_for(message, info)
            self._put(state, folder, info, weights)
        except RequestError as error:
            self._answer(message.number, error)
        else:
            self._answer(message.number, state.info)

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

    def _put(self, state: AdapterState, folder: Path, info: AdapterInfo, weights: "AdapterWeights") -> None:
        """Serve the content in this state. Raises AdapterMemoryFull, and then leaves all as it was."""
        kept = self.residency.kept_before(None, self._retired)
        if self.residency.is_absent(state) and not self.store.add(info.adapter, weights, kept):
            raise AdapterMemoryFull(info.adapter.name, weights.num_bytes, self.store.max_bytes)
        self._num_loads += 1
        self._withdrawn.discard(info.adapter.name)
        self._serve(state, folder, info)

    def _serve(self, state: AdapterState, folder: Path, info: AdapterInfo) -> None:
        """Requests get this content from now on, and those that have not started yet, too."""
        is_news = state.info is None
        state.folder, state.info = folder, dataclasses.replace(info, path=str(folder))
        if state in self._retired:
            self._retired.remove(state)
            state.is_served = True
        old = self._served.get(state.name)
        self._served[state.name] = state
        if is_news:
            for sequence in state.live:
                self._bind(sequence, state)
        if old is not None and old is not state:
            self._retire(old)
            for sequence in _not_started(old):
                self._move(sequence, old, state)
            self._forget_if_unused(old)
        self.residency.want(state)
        self._tell_served()

    def _retire(self, state: AdapterState) -> None:
        state.is_served = False
        self._retired.append(state)
        self.residency.want(state)

    def _move(self, sequence: Sequence, old: AdapterState, new: AdapterState) -> None:
        old.live.remove(sequence)
        if sequence in old.waiting:
            self.residency.stop_waiting(old, sequence)
            self.moved.append(sequence)
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
        self._tell_served()
        self._forget_if_unused(state)

    def _serve_again(self, state: AdapterState, number: int) -> None:
        """Requests still run with it, and the time is over."""
        del self._drains[state]
        self._retired.remove(state)
        state.is_served = True
        self._served[state.name] = state
        self._withdrawn.discard(state.name)
        self.residency.want(state)
        self._tell_served()
        why = f"is in use: {len(state.live)} sequences have not ended in time; it is served as before"
        self._answer(number, AdapterInUse(state.name, why))

    def _tell_served(self) -> None:
        infos = (state.info for _, state in sorted(self._served.items()))
        self.events.append(AdaptersServed(tuple(filter(None, infos)), frozenset(self._withdrawn)))

    # ------------------------------------------------------------------------------ what a request asks to read

    def _read_again(self, state: AdapterState) -> None:
        """Its weights are not in main memory, or never were. For Residency."""
        folder = state.folder
        find = partial(self._folders.find, state.name) if folder is None else lambda: folder
        self.store.read(state.name, find, partial(self._was_read, state))

    def _was_read(self, state: AdapterState, result: "tuple[Path, AdapterInfo, AdapterWeights] | Exception") -> None:
        self.residency.finish_reading()
        if not state.is_served and state not in self._retired:
            return  # nobody wants it any more
        if isinstance(result, Exception):
            self._give_up(state, result)
            return
        folder, info, weights = result
        self._num_loads += 1
        if state.info is None:
            self._served.setdefault(state.name, state)
            self._serve(state, folder, info)
        elif state.info.adapter != info.adapter:
            state = self._follow_change(state, folder, info)
        if not state.is_served and not state.live:
            return
        kept = self.residency.kept_before(state, self._retired)
        if not self.store.add(info.adapter, weights, kept) and info.num_bytes > self.store.max_bytes:
            self._give_up(state, AdapterMemoryFull(state.name, info.num_bytes, self.store.max_bytes))

    def _follow_change(self, state: AdapterState, folder: Path, info: AdapterInfo) -> AdapterState:
        """Its folder has other content now, and the old one is in no slot and nowhere else. Who has begun with that
        cannot go on. Returns the state of the new content, which is served if the old one was."""
        error = AdapterInvalid(state.name, [f"{folder} has changed since its weights were read, and they are needed again"])
        if not state.is_served:
            self._fail(state.waiting, error)
            return state
        logger.warning("adapter %r: %s has changed; new requests get what it has now", state.name, folder)
        assert state.info is not None
        new = AdapterState(state.name)
        self._serve(new, folder, dataclasses.replace(info, is_pinned=state.info.is_pinned))
        self._fail(state.waiting, error)
        return new

    def _give_up(self, state: AdapterState, error: Exception) -> None:
        """It cannot be read, or not be put into its slot: nobody can be computed with it."""
        told = _as_told(error)
        self._fail(state.live, told if isinstance(told, Rejection) else Failure.STEP)
        if state.is_served and state.info is not None:
            logger.warning("adapter %r is not served any more: %s", state.name, error)
            del self._served[state.name]
            self._retire(state)
            self._tell_served()
            self._forget_if_unused(state)

    def _fail(self, sequences: "list[Sequence] | set[Sequence]", error: Failure | Rejection) -> None:
        self.failures += [(request_id, error) for request_id in dict.fromkeys(s.request.id for s in sequences)]
