"""The pool's accounts: states, references, hashes, eviction order."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from nanoserve.kv_cache.block_pool import BlockPool, hash_block, hash_root


def chain(*blocks: list[int], root: bytes = b"root") -> list[bytes]:
    hashes = [root]
    for block in blocks:
        hashes.append(hash_block(hashes[-1], block))
    return hashes[1:]


def match(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    block_ids = pool.find(hashes)
    pool.hold(block_ids)
    return block_ids


def test_allocation_is_all_or_nothing():
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_a_hashed_block_outlives_its_owner_and_is_found_again():
    pool = BlockPool(4)
    hashes = chain([1, 2], [3, 4])
    table = pool.allocate(3)
    pool.register(table[0], hashes[0])
    pool.register(table[1], hashes[1])
    pool.release(table)
    assert (pool.num_free, pool.num_cached, pool.num_owned) == (2, 2, 0)
    assert match(pool, hashes) == table[:2]
    assert (pool.num_cached, pool.num_owned) == (0, 2)


def test_match_stops_at_the_first_unknown_block():
    pool = BlockPool(4)
    hashes = chain([1], [2], [3])
    table = pool.allocate(3)
    pool.register(table[0], hashes[0])
    pool.register(table[2], hashes[2])
    assert match(pool, hashes) == table[:1]


def test_shared_block_is_freed_with_its_last_reference():
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.register(block, b"h")
    assert match(pool, [b"h"]) == [block]
    pool.release([block])
    assert pool.num_owned == 1
    pool.release([block])
    assert (pool.num_owned, pool.num_cached) == (0, 1)


def test_the_least_recently_used_tail_is_evicted_first():
    pool = BlockPool(4)
    old, new = chain([1], [2]), chain([8], [9])
    for hashes in (old, new):
        table = pool.allocate(2)
        for block, block_hash in zip(table, hashes, strict=True):
            pool.register(block, block_hash)
        pool.release(table)
    pool.allocate(1)
    assert len(match(pool, old)) == 1, "the old tail went"
    assert len(match(pool, new)) == 2


def test_free_blocks_are_used_before_cached_ones():
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.register(block, b"h")
    pool.release([block])
    assert pool.allocate(1) != [block]
    assert match(pool, [b"h"]) == [block]


def test_of_two_equal_blocks_the_first_keeps_the_name():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"h")
    pool.register(second, b"h")
    pool.release([first, second])
    assert (pool.num_cached, pool.num_free) == (1, 1)
    assert match(pool, [b"h"]) == [first]


def test_without_a_cache_a_name_dies_with_the_last_reference():
    pool = BlockPool(1, keep_cached=False)
    [block] = pool.allocate(1)
    pool.register(block, b"h")
    assert match(pool, [b"h"]) == [block]
    pool.release([block])
    pool.release([block])
    assert (pool.num_cached, pool.num_free) == (0, 1)
    assert match(pool, [b"h"]) == []


def test_forgotten_blocks_are_never_matched():
    pool = BlockPool(2)
    table = pool.allocate(2)
    pool.register(table[0], b"h")
    pool.forget(table)
    assert match(pool, [b"h"]) == []
    pool.release(table)
    assert pool.num_free == 2


def test_reset_frees_cached_blocks_and_leaves_owned_ones():
    pool = BlockPool(2)
    kept, dropped = pool.allocate(2)
    pool.register(kept, b"k")
    pool.register(dropped, b"d")
    pool.release([dropped])
    assert len(pool.reset_cache()) == 1
    assert (pool.num_free, pool.num_owned) == (1, 1)
    assert match(pool, [b"k"]) == []
    pool.release([kept])
    pool.check_invariants()


def test_hashes_tell_parents_tokens_and_roots_apart():
    assert hash_block(b"p", [1, 2]) != hash_block(b"q", [1, 2])
    assert hash_block(b"p", [1, 2]) != hash_block(b"p", [2, 1])
    assert hash_root("a", "bc") != hash_root("ab", "c")
    assert hash_root("m", "salt") != hash_root("m", "")


def test_hashes_are_the_same_everywhere():
    # Replicas and later versions must agree, so the value itself is the contract.
    assert hash_block(hash_root("model", "", ""), [1, 2, 3]).hex() == (
        "f94c1d8e4e8c564cdb719c94890623a62a70c01ad35773c9c35c1c11bf3b97dc"
    )


class Pool(RuleBasedStateMachine):
    """Random use of a tiny pool by many owners."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(5)

    @rule(target=tables, count=st.integers(0, 4))
    def allocate(self, count):
        table = self.pool.allocate(count)
        return multiple() if table is None else table

    @rule(target=tables, names=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4))
    def match(self, names):
        return match(self.pool, names)

    @rule(table=tables, name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def register(self, table, name):
        if table and self.pool._ref_counts.get(table[0]):
            self.pool.register(table[0], name)

    @rule(table=consumes(tables))
    def release(self, table):
        self.pool.release(table)

    @rule(table=tables)
    def forget(self, table):
        self.pool.forget([b for b in table if b in self.pool._ref_counts])

    @rule()
    def reset(self):
        self.pool.reset_cache()

    @invariant()
    def accounts_balance(self):
        self.pool.check_invariants()
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_owned == 5


TestPool = Pool.TestCase


def test_check_invariants_sees_a_lost_block():
    pool = BlockPool(2)
    pool.allocate(1)
    pool._ref_counts.clear()
    with pytest.raises(AssertionError):
        pool.check_invariants()
