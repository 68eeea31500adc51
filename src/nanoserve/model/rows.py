"""What is kept of each row: the tokens and the blocks of the sequence that has it, on the device, and its adapter."""

from collections.abc import Iterable

import torch

from nanoserve.request import ScheduledSequence


class Rows:
    """Written by the runner; every model that computes a sequence reads it, so that all of them are told once."""

    def __init__(self, max_num_seqs: int, max_context_tokens: int, block_size: int, device: torch.device) -> None:
        self._device = device
        # [max_num_seqs, max_context_tokens + 1]: the tokens as far as they are known, and one behind a full context.
        # Not zeroed: memory is taken when it is used.
        self.tokens = torch.empty(max_num_seqs, max_context_tokens + 1, dtype=torch.int32, device=device)
        # [max_num_seqs, max_num_blocks]: the blocks in order; beyond the row's own number the ids mean nothing.
        max_num_blocks = -(-max_context_tokens // block_size)
        self.block_tables = torch.zeros(max_num_seqs, max_num_blocks, dtype=torch.long, device=device)
        # The same blocks, for whoever computes on the host.
        self.block_ids: list[list[int]] = [[] for _ in range(max_num_seqs)]
        # The slot of its adapter. None = the model alone.
        self.adapter_slots: list[int | None] = [None] * max_num_seqs

    def take(self, sequences: list[ScheduledSequence]) -> None:
        """A new sequence's tokens, and new block ids behind those that a row has. Whose it is changes with `commit`."""
        rows, columns, blocks = [], [], []
        for s in sequences:
            if s.admission is not None:
                token_ids = torch.tensor(s.admission.token_ids, dtype=torch.int32)
                self.tokens[s.row, : len(token_ids)] = token_ids.to(self._device)
                self.adapter_slots[s.row] = s.admission.adapter_slot
            first = 0 if s.admission is not None else len(self.block_ids[s.row])
            for column, block in enumerate(s.new_block_ids, start=first):
                rows.append(s.row)
                columns.append(column)
                blocks.append(block)
        if blocks:
            index = torch.tensor([rows, columns, blocks], device=self._device)  # [3, num_new_blocks]
            self.block_tables[index[0], index[1]] = index[2]

    def commit(self, sequences: list[ScheduledSequence]) -> None:
        """The step has run: rows that changed hands are the new sequence's."""
        for s in sequences:
            if s.admission is not None:
                self.block_ids[s.row] = []
            self.block_ids[s.row] += s.new_block_ids

    def write(self, runs: Iterable[tuple[int, int, list[int]]]) -> None:
        """Rows, and the tokens that stand in them from a position on."""
        cells = [
            (row, position, token_id)
            for row, start, token_ids in runs
            for position, token_id in enumerate(token_ids, start=start)
        ]
        if cells:
            index = torch.tensor(cells, device=self._device)  # [n, 3]
            self.tokens[index[:, 0], index[:, 1]] = index[:, 2].int()
