"""Which KV block is whose, from the records of steps: the block pool itself is in another process."""

import itertools

from nanoserve.step_record import StepRecord

# (StepPart.request_id, StepPart.sequence_index).
SequenceKey = tuple[str, int]


class KvMap:
    """Every block is free, cached, or owned: free + cached + owned = all. Event loop thread."""

    def __init__(self) -> None:
        # The block table of each sequence that owns blocks. A block may be in several.
        self.tables: dict[SequenceKey, list[int]] = {}
        # 1 for each block that is owned or cached. Empty until the first step, when all are free.
        self._is_used = bytearray()

    def take(self, step: StepRecord) -> None:
        """Bring the map to the end of this step, the next after the one before."""
        if not self._is_used:
            self._is_used = bytearray(step.num_free_blocks + step.num_cached_blocks + step.num_owned_blocks)
        for release in step.early_releases:
            self._free(release.freed_block_ids)
            self.tables.pop((release.request_id, release.index), None)
        for part in step.parts:
            if part.new_block_ids:
                self.tables.setdefault((part.request_id, part.sequence_index), []).extend(part.new_block_ids)
                for block_id in part.new_block_ids:
                    self._is_used[block_id] = 1
        for release in step.late_releases:
            self._free(release.freed_block_ids)
            self.tables.pop((release.request_id, release.index), None)

    def _free(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._is_used[block_id] = 0

    def cached_block_ids(self) -> list[int]:
        """Blocks that are kept for their prefix, and that nobody owns."""
        is_cached = bytearray(self._is_used)
        for table in self.tables.values():
            for block_id in table:
                is_cached[block_id] = 0
        return list(itertools.compress(range(len(is_cached)), is_cached))
