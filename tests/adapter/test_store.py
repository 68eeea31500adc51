"""The memory of adapters' weights: what stays, what makes room, and the order of what the thread does."""

import threading

from adapter_bench import FakeWeights

from nanoserve.adapter.store import AdapterStore
from nanoserve.adapter.vocabulary import Adapter

A, B, C = (Adapter(name, f"{name}1") for name in "abc")


def store_with(*adapters, max_bytes=2):
    store = AdapterStore(None, None, max_bytes, num_slots=1)
    for adapter in adapters:
        assert store.add(adapter, FakeWeights(adapter.revision), nothing)
    return store


def nothing(_adapter):
    return False


def test_the_least_recently_used_makes_room():
    store = store_with(A, B)
    store.touch(A)
    assert store.add(C, FakeWeights("c1"), nothing)
    assert (A in store, B in store, C in store, store.num_bytes) == (True, False, True, 2)


def test_what_is_kept_makes_no_room_and_then_nothing_does():
    store = store_with(A, B)
    assert store.add(C, FakeWeights("c1"), lambda adapter: adapter == A)
    assert (A in store, B in store) == (True, False)
    assert not store.add(B, FakeWeights("b1", 2), lambda adapter: adapter == A)
    assert (A in store, C in store, store.num_bytes) == (True, True, 2)
    assert not store.add(B, FakeWeights("b1", 3), nothing)


def test_the_same_weights_again_take_no_more():
    store = store_with(A, B)
    assert store.add(B, FakeWeights("b1"), nothing)
    assert (A in store, store.num_bytes) == (True, 2)
    store.drop(B)
    store.drop(B)
    assert store.num_bytes == 1


def test_jobs_are_done_in_order_and_told_where_settle_is_called():
    store, told, woken = store_with(), [], threading.Event()
    store.wake = woken.set

    def fail():
        raise ValueError("wrong")

    store.submit(lambda: 1, lambda result: told.append((result, threading.current_thread())))
    store.submit(fail, told.append)
    store._thread.shutdown(wait=True)
    assert woken.is_set()
    assert not told
    store.settle()
    first, error = told
    assert first == (1, threading.main_thread())
    assert isinstance(error, ValueError)
