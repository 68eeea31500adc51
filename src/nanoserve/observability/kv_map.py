"""Which KV block is whose, kept from the records of steps, as the block pool has it in another process."""

from nanoserve.step_record import StepRecord

# (StepPart.request_id, StepPart.sequence_index).
SequenceKey = tuple[str, int]


class KvMap:
    """Every block is free, cached, or owned: free + cached + owned = all. Event loop thread."""

    def __init__(self) -> None:
        # The block table of each sequence that owns blocks. A block may be in several.
        self.tables: dict[SequenceKey, list[int]] = {}
        # 1 for each free block. Empty until the first step, when all are free.
        self._is_free = bytearray()

    def take(self, step: StepRecord) -> None:
        """Bring the map to the end of this step, the next after the one before."""
        if not self._is_free:
            num_blocks = step.num_free_blocks + step.num_cached_blocks + step.num_owned_blocks
            self._is_free = bytearray(b"\x01" * num_blocks)
        for release in step.early_releases:
            self._free(release.freed_block_ids)
            self.tables.pop((release.request_id, release.index), None)
        for part in step.parts:
            if part.new_block_ids:
                self.tables.setdefault((part.request_id, part.sequence_index), []).extend(part.new_block_ids)
                for block_id in part.new_block_ids:
                    self._is_free[block_id] = 0
        for release in step.late_releases:
            self._free(release.freed_block_ids)
            self.tables.pop((release.request_id, release.index), None)

    def _free(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._is_free[block_id] = 1

    def cached_block_ids(self) -> list[int]:
        """Blocks that are kept for their prefix, and that nobody owns."""
        owned = {block_id for table in self.tables.values() for block_id in table}
        return [i for i, is_free in enumerate(self._is_free) if not is_free and i not in owned]
