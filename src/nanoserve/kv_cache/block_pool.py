"""The accounts of the KV cache: which block is free, cached or owned. Ids only; the tensors are in paged_kv_cache.py.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. A full block is known by a hash
over all tokens up to its end, so a later sequence that begins alike takes the block instead of computing it:

    tokens   [ a b c d | e f g h | i j ]
    hashes     h0 = H(root, abcd)
                         h1 = H(h0, efgh)
                                   none: not full

(prefix caching by hash chains as in vLLM; paged attention: Kwon et al. 2023)
"""

import hashlib
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanoserve.request import Request


def hash_root(*parts: str) -> bytes:
    """The parent of a sequence's first block: all that its keys and values depend on besides the tokens."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
    return digest.digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block; the same in every process and on every machine."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


@dataclass(frozen=True, slots=True)
class BlockNames:
    """How the full blocks of a sequence are named. Any thread."""

    # Model and weights.
    cache_identity: str
    block_size: int
    # False = only the sequences of one request share blocks, whose prompt one of them has computed.
    is_cache_enabled: bool

    def extend(self, hashes: list[bytes], request: Request, token_ids: Sequence[int], count: int) -> None:
        """Add hashes of the next blocks of these tokens, of a sequence of the request, until there are `count`."""
        root = [self.cache_identity, request.cache_salt, "" if self.is_cache_enabled else request.id]
        if request.adapter is not None:
            root.append(request.adapter.revision)
        for i in range(len(hashes), count):
            block = token_ids[i * self.block_size : (i + 1) * self.block_size]
            assert len(block) == self.block_size, "only a full block has a hash"
            hashes.append(hash_block(hashes[-1] if hashes else hash_root(*root), block))


class BlockPool:
    """Hands out blocks, counts their references and finds them again by hash. Engine thread only.

    Every block is in one state, so that free + cached + owned == num_blocks always holds:

                   allocate                      release, no hash
        free  ───────────────▶  owned (ref ≥ 1)  ───────────────▶  free
          ▲                       │         ▲
          │ allocate evicts       │ release │ hold
          │ the least recent      ▼         │
          └───────────────────  cached (hashed, ref 0)
    """

    def __init__(self, num_blocks: int, *, keep_cached: bool = True) -> None:
        """With keep_cached=False a block's hash is forgotten with its last reference."""
        self.num_blocks = num_blocks
        self.keep_cached = keep_cached
        self._free: deque[int] = deque(range(num_blocks))
        # Unreferenced but hashed, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Owned blocks alone.
        self._ref_counts: Counter[int] = Counter()
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        return len(self._ref_counts)

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, or none at all if there are not enough."""
        if count > self.num_available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget_hash(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix."""
        block_ids = []
        for block_id in map(self._block_of_hash.get, hashes):
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def hold(self, block_ids: Sequence[int]) -> None:
        """Take a reference to each of these blocks, which `find` has just given."""
        for block_id in self._cached.keys() & block_ids:
            del self._cached[block_id]
        self._ref_counts.update(block_ids)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Make an owned, full block findable. Of two equal blocks the first one keeps the name."""
        if block_hash not in self._block_of_hash and block_id not in self._hash_of_block:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash

    def release(self, block_ids: Sequence[int]) -> list[int]:
        """Give up one reference to each block of a sequence's table. Returns those that became free."""
        freed = []
        # Last block first: a prefix is of use without its tail, a tail without its prefix is not.
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            del self._ref_counts[block_id]
            if not self.keep_cached:
                self._forget_hash(block_id)
            if block_id in self._hash_of_block:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)
                freed.append(block_id)
        return freed

    def forget(self, block_ids: Iterable[int]) -> None:
        """Never give these owned blocks to another sequence: their content is not to be trusted."""
        for block_id in block_ids:
            self._forget_hash(block_id)

    def reset_cache(self) -> list[int]:
        """Forget every prefix, and free the cached blocks. Returns those."""
        freed = list(self._cached)
        self._free.extend(freed)
        self._cached.clear()
        self._block_of_hash.clear()
        self._hash_of_block.clear()
        return freed

    def _forget_hash(self, block_id: int) -> None:
        block_hash = self._hash_of_block.pop(block_id, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]

    def check_invariants(self) -> None:
        """Raise AssertionError if a block is in no state, in two, or badly named."""
        states = [*self._free, *self._cached, *self._ref_counts]
        assert sorted(states) == list(range(self.num_blocks)), "free + cached + owned != total"
        assert all(count > 0 for count in self._ref_counts.values())
        assert all(block_id in self._hash_of_block for block_id in self._cached)
        assert self._block_of_hash == {h: b for b, h in self._hash_of_block.items()}
        assert not any(block_id in self._hash_of_block for block_id in self._free)
