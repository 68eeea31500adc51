"""The model side of a step: from a StepPlan to a StepResult.

    plan ─▶ pack ─▶ trunk (attention over the paged cache) ─▶ check ─┬─▶ head ─▶ sampler ─▶ tokens
                                                                    └─▶ head ─▶ log-probabilities of the prompt

Tokens of all sequences are packed into one row without padding. The head, whose output is as wide as the vocabulary,
runs only for positions whose logits are wanted.
"""

from typing import Any

import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.attend import attend
from nanoserve.model.attention import AttentionBatch, Buffers, CompiledAttention, RunLayer, attending
from nanoserve.model.loader import LoadedModel, fix_rope
from nanoserve.model.sampler import Sampler, token_logprobs
from nanoserve.model.threads import ComputeThreads
from nanoserve.request import ScheduledSequence, SequenceResult, StepPlan, StepResult, TokenLogprob

# Logits of prompt positions are made for so many numbers at a time, to bound memory.
PROMPT_LOGITS_AT_ONCE = 1 << 24


class ModelRunner:
    """One model on one device. Implements Executor. Engine thread only.

    Owns the K/V tensors, each row's block table on the device, the buffers of attention, and through the sampler what
    sampling remembers of a row. A step that raises leaves rows as they were.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedKVCache,
        sampler: Sampler,
        max_num_seqs: int,
        max_context_tokens: int,
        *,
        threads: ComputeThreads | None = None,
    ) -> None:
        """threads: None where no threads of a CPU compute."""
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._threads = threads
        self._buffers = Buffers()
        # Filled while the server runs, by model/compiled.py.
        self.compiled_attention: CompiledAttention = {}
        max_num_blocks = -(-max_context_tokens // cache.block_size)
        # Row -> its blocks in order; beyond the row's own number of them the ids mean nothing.
        self._block_tables = torch.zeros(max_num_seqs, max_num_blocks, dtype=torch.long, device=model.device)
        self._num_blocks = [0] * max_num_seqs
        # Row -> alternatives to report for prompt tokens.
        self._num_prompt_top = [0] * max_num_seqs
        fix_rope(model.model, max_context_tokens)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step. Raises only if the whole step failed."""
        sequences = plan.sequences
        self._update_block_tables(sequences)
        batch, token_ids = self._pack(sequences)
        try:
            hidden = self._run_trunk(batch, token_ids)  # [num_tokens, hidden_size]
        except Exception:
            # Some layers have written, perhaps NaN, into blocks that others get next.
            self._cache.clear(batch.slots)
            raise
        corrupt = self._clear_corrupt(batch, hidden)
        self._commit_rows(sequences)
        ends = torch.tensor(batch.counts).cumsum(0).tolist()
        drawn = self._sample(sequences, hidden, ends, corrupt)
        return StepResult(
            [
                SequenceResult(is_corrupt=True)
                if i in corrupt
                else self._with_prompt_logprobs(s, drawn.get(i, SequenceResult()), hidden[end - len(s.token_ids) : end])
                for i, (s, end) in enumerate(zip(sequences, ends, strict=True))
            ],
            num_threads=self._threads.count if self._threads else None,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a small step, so that the first request does not pay for what is set up on first use.

        Before any request: it writes into block 0, and zeroes it again.
        """
        num_tokens = min(4, self._cache.block_size)
        table = torch.zeros(2, 1, dtype=torch.long, device=self._model.device)
        counts = [1, num_tokens - 1] if num_tokens > 1 else [1]
        batch = self._batch([0] * len(counts), counts, table[: len(counts)])
        hidden = self._run_trunk(batch, torch.zeros(sum(counts), dtype=torch.long, device=self._model.device))
        self._logits(hidden[:1])
        self._cache.clear(batch.slots)

    # ------------------------------------------------------------------------------------------------- the rows

    def _update_block_tables(self, sequences: list[ScheduledSequence]) -> None:
        """Write new block ids behind those that the row has. The row's number of blocks is not changed yet."""
        rows, columns, blocks = [], [], []
        for s in sequences:
            first = 0 if s.admission is not None else self._num_blocks[s.row]
            for column, block in enumerate(s.new_block_ids, start=first):
                rows.append(s.row)
                columns.append(column)
                blocks.append(block)
        if blocks:
            index = torch.tensor([rows, columns, blocks], device=self._model.device)  # [3, num_new_blocks]
            self._block_tables[index[0], index[1]] = index[2]

    def _commit_rows(self, sequences: list[ScheduledSequence]) -> None:
        """The trunk has run: rows that changed hands are the new sequence's."""
        for s in sequences:
            if s.admission is not None:
                self._num_blocks[s.row] = 0
                self._num_prompt_top[s.row] = s.admission.params.prompt_logprobs or 0
                self._sampler.admit(s.row, s.admission)
            self._num_blocks[s.row] += len(s.new_block_ids)

    # ------------------------------------------------------------------------------------------------- the step

    def _pack(self, sequences: list[ScheduledSequence]) -> tuple[AttentionBatch, Tensor]:
        """The step's facts, and its token ids: [num_tokens]."""
        device = self._model.device
        rows = torch.tensor([s.row for s in sequences], device=device)  # [num_sequences]
        token_ids = torch.tensor([token for s in sequences for token in s.token_ids], device=device)
        starts, counts = [s.start for s in sequences], [len(s.token_ids) for s in sequences]
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        max_num_blocks = -(-longest // self._cache.block_size)
        return self._batch(starts, counts, self._block_tables[rows, :max_num_blocks]), token_ids

    def _batch(self, starts: list[int], counts: list[int], block_tables: Tensor) -> AttentionBatch:
        device, block_size = self._model.device, self._cache.block_size
        facts = torch.tensor([starts, counts], device=device)  # [2, num_sequences]
        sequence = torch.arange(len(counts), device=device).repeat_interleave(facts[1])  # [num_tokens]
        offset = facts[0] - (facts[1].cumsum(0) - facts[1])  # [num_sequences]: position - index in the step
        positions = torch.arange(sum(counts), device=device) + offset[sequence]  # [num_tokens]
        blocks = block_tables[sequence, positions // block_size]  # [num_tokens]
        slots = blocks * block_size + positions % block_size  # [num_tokens]
        return AttentionBatch(
            self._cache,
            self._model.attention_layers,
            attend,
            self._buffers,
            self.compiled_attention,
            starts,
            counts,
            slots,
            positions,
            block_tables,
        )

    def _run_trunk(self, batch: AttentionBatch, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden_size]"""
        with attending(self._adapting(batch.run_layer)):
            out = self._model.trunk(input_ids=token_ids[None], position_ids=batch.positions[None], use_cache=False)
        hidden: Tensor = out[0][0]
        return hidden

    def _adapting(self, run_layer: RunLayer) -> RunLayer:
        """In each layer, because a step that a neighbour holds up takes seconds."""
        if (threads := self._threads) is None:
            return run_layer

        def adapt_and_run(*call: Any) -> Tensor:
            threads.adapt()
            return run_layer(*call)

        return adapt_and_run

    def _clear_corrupt(self, batch: AttentionBatch, hidden: Tensor) -> set[int]:
        """Sequences with NaN or infinity in this step; what they wrote into the cache is zeroed.

        A key or value that is not finite makes its own token's hidden state so too, because a token sees itself.
        """
        bad = ~hidden.isfinite().all(-1)  # [num_tokens]
        if not bad.any():
            return set()
        counts = torch.tensor(batch.counts, device=bad.device)
        sequence = torch.arange(len(batch.counts), device=bad.device).repeat_interleave(counts)  # [num_tokens]
        corrupt = set(sequence[bad].tolist())
        self._cache.clear(batch.slots[torch.isin(sequence, torch.tensor(list(corrupt), device=bad.device))])
        return corrupt

    # ----------------------------------------------------------------------------------------------- the results

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden_size]. Returns [n, vocab_size]."""
        logits: Tensor = self._model.head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]

    def _sample(
        self, sequences: list[ScheduledSequence], hidden: Tensor, ends: list[int], corrupt: set[int]
    ) -> dict[int, SequenceResult]:
        """Draw for every sequence that samples: its index in the plan -> result."""
        members = [i for i, s in enumerate(sequences) if s.samples and i not in corrupt]
        if not members:
            return {}
        last = torch.tensor([ends[i] - 1 for i in members], device=hidden.device)  # [n]
        logits = self._logits(hidden[last])
        rows = [sequences[i].row for i in members]
        positions = [sequences[i].start + len(sequences[i].token_ids) for i in members]
        return dict(zip(members, self._sampler.sample(rows, positions, logits), strict=True))

    def _with_prompt_logprobs(
        self, sequence: ScheduledSequence, result: SequenceResult, hidden: Tensor
    ) -> SequenceResult:
        """hidden: [num_scheduled_tokens, hidden_size], of this sequence."""
        targets = sequence.prompt_targets
        if not targets or result.is_corrupt:
            return result
        size = max(1, PROMPT_LOGITS_AT_ONCE // self._model.facts.vocab_size)
        logprobs: list[TokenLogprob] = []
        for i in range(0, len(targets), size):
            part = targets[i : i + size]
            logits = self._logits(hidden[i : i + len(part)])
            if not logits.isfinite().all():
                return SequenceResult(is_corrupt=True)
            logprobs += token_logprobs(logits, part, self._num_prompt_top[sequence.row])
        return SequenceResult(result.token_ids, result.logprobs, logprobs)
