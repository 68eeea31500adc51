"""Which adapters are in a slot of the model side, and whose turn it is to get one.

    disk ── read ──▶ main memory ── write ──▶ slot: its sequences may run
      ▲                   │                     │
      └── make room ──────┘◀── take the slot ───┘

Sequences whose adapter has no slot wait beside the queue, and others pass them. Adapters get slots in the order in
which the first of their sequences is served: a free slot; one whose adapter nobody asks for, the least recently used
first; or one whose sequences, none of which runs, come later. If sequences run in all slots, then after MAX_PASSED_S no
new one is let in on one of them, so that it becomes free: nobody waits for ever because others keep coming.
"""

import bisect
import itertools
from collections.abc import Callable

from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import Adapter
from nanoserve.adapter.vocabulary import Residency as Place
from nanoserve.engine.sequence import AdapterState, Sequence

# How long requests of adapters that have slots may pass one whose adapter waits for a slot.
MAX_PASSED_S = 0.25


class Residency:
    """The slots, and who waits for one. Engine thread only.

    A slot is written only when no sequence runs in it, and no step in flight computes with it.
    """

    def __init__(
        self,
        store: AdapterStore,
        read: Callable[[AdapterState], None],
        give_up: Callable[[AdapterState, Exception], None],
    ) -> None:
        """read: has its weights read into the store. give_up: its requests fail."""
        self.num_evictions = 0
        self._store = store
        self._read = read
        self._give_up = give_up
        self._slots: list[AdapterState | None] = [None] * store.num_slots
        # By slot, the number of the last step that computes with it.
        self._last_steps = [0] * store.num_slots
        # States with sequences that wait, and pinned ones.
        self._wanted: dict[AdapterState, None] = {}
        self._closed: list[AdapterState] = []
        # Of these, `is_open` may have changed.
        self._turned: dict[AdapterState, None] = {}
        self._uses = itertools.count(1)
        # One of those that wait is read; one at a time, because a slot is written by the same thread.
        self._is_reading = False

    # --------------------------------------------------------------------------------------- what sequences do

    def wait(self, state: AdapterState, sequence: Sequence) -> None:
        """It waits for a row, or for its adapter."""
        bisect.insort(state.waiting, sequence, key=lambda s: s.rank)
        self._wanted[state] = None

    def stop_waiting(self, state: AdapterState, sequence: Sequence) -> None:
        """It does not want a row any more."""
        state.waiting.remove(sequence)
        if not state.waiting and not state.is_pinned:
            self._wanted.pop(state, None)
            state.wants_slot_since_s = None

    def begin(self, state: AdapterState, sequence: Sequence) -> None:
        """One of its sequences, which waited, has a row."""
        assert state.is_open
        self.stop_waiting(state, sequence)
        state.num_running += 1
        self._use(state)

    def end(self, state: AdapterState) -> None:
        """It has lost the row."""
        state.num_running -= 1
        self._use(state)

    def compute(self, state: AdapterState, step: int) -> None:
        """The step of this number computes with its slot."""
        assert state.slot is not None
        self._last_steps[state.slot] = step

    def _use(self, state: AdapterState) -> None:
        assert state.info is not None
        state.last_use = next(self._uses)
        self._store.touch(state.info.adapter)

    # ------------------------------------------------------------------------------------- what adapters do

    def want(self, state: AdapterState) -> None:
        """It may have been pinned, or not be any more."""
        if state.is_pinned or state.waiting:
            self._wanted[state] = None
        else:
            self._wanted.pop(state, None)

    @property
    def has_waiting(self) -> bool:
        """Somebody waits for a row or an adapter."""
        return any(state.waiting for state in self._wanted)

    def first_waiting(self) -> Sequence | None:
        """Of those that wait for their adapter alone, the first to be served."""
        waiting = (state.waiting[0] for state in self._wanted if state.waiting and not state.is_queued)
        return min(waiting, key=lambda s: s.rank, default=None)

    def finish_reading(self) -> None:
        """What `read` was called for has come to an end."""
        self._is_reading = False

    def leave(self, state: AdapterState) -> None:
        """Nobody will use it again."""
        assert not state.live
        self._wanted.pop(state, None)
        self._turned.pop(state, None)
        if state.slot is not None:
            self._vacate(state)
        if state.info is not None:
            self._store.drop(state.info.adapter)

    def place(self, state: AdapterState) -> Place:
        """Where its weights are."""
        if state.is_written:
            return Place.ACTIVE
        return Place.HOST if state.info is not None and state.info.adapter in self._store else Place.DISK

    def kept_before(self, state: AdapterState | None, others: list[AdapterState]) -> Callable[[Adapter], bool]:
        """Which weights stay in main memory when those of `state` need room: of those that get a slot before it, and of
        `others`. None = those of all who wait for a slot."""
        ahead = [s for s in self._unplaced() if state is None or s.turn < state.turn]
        kept = {s.info.adapter for s in (*ahead, *others) if s.info is not None and s is not state}
        return kept.__contains__

    def _unplaced(self) -> list[AdapterState]:
        return [state for state in self._wanted if state.slot is None]

    # ------------------------------------------------------------------------------------------ once a step

    def advance(self, now: float, num_steps: int, others: list[AdapterState]) -> list[AdapterState]:
        """Read and write what can be. Returns those whose sequences may run from now on, or may not any more.

        num_steps: that were committed. others: see `kept_before`.
        """
        if self._wanted or self._closed:
            order = sorted(self._unplaced(), key=lambda s: s.turn)
            self._read_next(order, others)
            # Who can take no slot now leaves none to those behind it either.
            left = itertools.dropwhile(lambda s: self._claim(s, num_steps), filter(self._is_ready, order))
            self._make_slots_free(list(left), now)
        turned = [state for state in self._turned if state.is_open != state.is_queued]
        self._turned.clear()
        for state in turned:
            state.is_queued = state.is_open
        return turned

    def _is_ready(self, state: AdapterState) -> bool:
        return state.info is not None and state.info.adapter in self._store

    def _read_next(self, order: list[AdapterState], others: list[AdapterState]) -> None:
        """Have the weights read that will be needed first, if there is room for them."""
        missing = next(itertools.filterfalse(self._is_ready, order), None)
        if missing is None or self._is_reading:
            return
        # How large it is is known when it was read once.
        num_bytes = 0 if missing.info is None else missing.info.num_bytes
        if self._store.has_room(num_bytes, self.kept_before(missing, others)):
            self._is_reading = True
            self._read(missing)

    def _claim(self, state: AdapterState, num_steps: int) -> bool:
        """Give it a slot, if one can be had."""
        free = [
            slot
            for slot, holder in enumerate(self._slots)
            if self._last_steps[slot] <= num_steps and (holder is None or self._yields(holder, state))
        ]
        if not free:
            return False
        slot = min(free, key=self._cost)
        if (holder := self._slots[slot]) is not None:
            self._vacate(holder)
            self.num_evictions += 1
        self._slots[slot] = state
        state.slot = slot
        state.last_claim = next(self._uses)
        state.wants_slot_since_s = None
        assert state.info is not None
        self._store.write(slot, state.info.adapter, lambda error: self._written(state, slot, error))
        return True

    @staticmethod
    def _yields(holder: AdapterState, state: AdapterState) -> bool:
        """Whether `holder` gives its slot to `state`."""
        is_idle = holder.is_written and not holder.num_running and not holder.is_pinned
        return is_idle and (not holder.waiting or holder.turn > state.turn)

    def _cost(self, slot: int) -> tuple[float, ...]:
        """What taking the slot costs: least if it is empty, most if somebody waits who comes soon."""
        holder = self._slots[slot]
        if holder is None:
            return (0,)
        return (2, *(-part for part in holder.turn)) if holder.waiting else (1, holder.last_use)

    def _written(self, state: AdapterState, slot: int, error: Exception | None) -> None:
        if state.slot != slot:
            return  # it was unloaded meanwhile
        if error is not None:
            self._vacate(state)
            self._give_up(state, error)
            return
        state.is_written = True
        self._turned[state] = None

    def _vacate(self, state: AdapterState) -> None:
        """Take its slot away."""
        assert state.slot is not None
        assert not state.num_running
        self._slots[state.slot] = None
        state.slot = None
        state.is_written = False
        self._set_closed(state, is_closed=False)

    def _set_closed(self, state: AdapterState, *, is_closed: bool) -> None:
        if state.is_closed and not is_closed:
            self._closed.remove(state)
        elif is_closed:
            self._closed.append(state)
        state.is_closed = is_closed
        self._turned[state] = None

    def _make_slots_free(self, unplaced: list[AdapterState], now: float) -> None:
        """Close as many slots as there are adapters that were passed for too long. unplaced: in order."""
        overdue = []
        for state in unplaced[: len(self._slots)]:
            if state.wants_slot_since_s is None:
                state.wants_slot_since_s = now
            if now - state.wants_slot_since_s >= MAX_PASSED_S:
                overdue.append(state)
        for holder in self._closed[::-1]:
            if len(self._closed) > len(overdue) or (holder.waiting and holder.turn < overdue[0].turn):
                self._set_closed(holder, is_closed=False)
        for state in overdue[len(self._closed) :]:
            holders = [each for each in self._slots if each is not None and self._may_be_closed(each, state)]
            if not holders:
                break
            self._set_closed(min(holders, key=lambda s: s.last_claim), is_closed=True)

    @staticmethod
    def _may_be_closed(holder: AdapterState, state: AdapterState) -> bool:
        """Whether `holder` makes place for `state` as soon as what runs has ended."""
        return holder.is_open and not holder.is_pinned and (not holder.waiting or holder.turn > state.turn)

    def check_invariants(self) -> None:
        """Raise AssertionError if slots and states do not agree. For tests, between steps."""
        for slot, state in enumerate(self._slots):
            assert state is None or state.slot == slot
        assert all(state.is_closed for state in self._closed)
        assert len(self._closed) == len(set(self._closed))
        assert all(not state.waiting or state in self._wanted for state in self._slots if state is not None)
