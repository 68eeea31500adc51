"""The model side of a step: from a StepPlan to a StepResult.

    plan ─▶ pack ─▶ trunk (attention over the paged cache) ─▶ check ─┬─▶ head ─▶ sampler ─▶ tokens
                                                                    └─▶ head ─▶ log-probabilities of the prompt

Tokens of all sequences are packed into one row without padding. The head, whose output is as wide as the vocabulary,
runs only for positions whose logits are wanted.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.attend import attend
from nanoserve.model.attention import Attention, StepFacts, attending
from nanoserve.model.loader import LoadedModel, fix_rope
from nanoserve.model.sampler import Place, Sampler, token_logprobs
from nanoserve.model.threads import ComputeThreads
from nanoserve.request import Failure, Logprobs, ScheduledSequence, SequenceResult, StepPlan, StepResult

# Logits of prompt positions are made for so many numbers at a time, to bound memory.
PROMPT_LOGITS_AT_ONCE = 1 << 24


class ModelRunner:
    """One model on one device. Implements Executor. Engine thread only.

    Owns the K/V tensors, each row's tokens and block table on the device, attention's memory, and through the sampler
    what sampling remembers of a row. A step that raises leaves rows as they were.
    """

    # A CPU has nothing to do between two steps that could hide a plan.
    depth = 1

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedKVCache,
        sampler: Sampler,
        max_num_seqs: int,
        max_num_tokens: int,
        max_context_tokens: int,
        *,
        threads: ComputeThreads | None = None,
    ) -> None:
        """max_num_tokens: of a step. threads: None where no threads of a CPU compute."""
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._threads = threads
        self._plans: deque[StepPlan] = deque()
        self.attention = Attention(cache, model.attention_layers, attend)
        max_num_blocks = -(-max_context_tokens // cache.block_size)
        # Row -> its tokens, as far as they are known, and one behind a full context. Not zeroed: memory is taken when
        # it is used.
        self._tokens = torch.empty(max_num_seqs, max_context_tokens + 1, dtype=torch.int32, device=model.device)
        # Row -> its blocks in order; beyond the row's own number of them the ids mean nothing.
        self._block_tables = torch.zeros(max_num_seqs, max_num_blocks, dtype=torch.long, device=model.device)
        self._num_blocks = [0] * max_num_seqs
        self._facts = StepFacts(self._block_tables, cache.block_size, max_num_tokens)
        # Row -> alternatives to report for prompt tokens.
        self._num_prompt_top = [0] * max_num_seqs
        fix_rope(model.model, max_context_tokens)

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Compute the oldest plan's step."""
        sequences = self._plans.popleft().sequences
        self._write_tables(sequences)
        facts = self._facts
        facts.set([s.row for s in sequences], [s.start for s in sequences], [s.num_known for s in sequences])
        try:
            hidden = self._run_trunk(self._tokens[facts.rows[facts.sequence_of], facts.positions].long())
        except Exception:
            # Some layers have written, perhaps NaN, into blocks that others get next.
            self._cache.clear(facts.slots)
            raise
        corrupt = self._clear_corrupt(hidden)
        self._commit_rows(sequences)
        ends = torch.tensor(facts.counts).cumsum(0).tolist()
        drawn = self._sample(sequences, hidden, ends, corrupt)
        return StepResult(
            [
                SequenceResult(failure=Failure.CORRUPT)
                if i in corrupt
                else self._with_prompt_logprobs(s, drawn.get(i, SequenceResult()), hidden[end - s.num_known : end])
                for i, (s, end) in enumerate(zip(sequences, ends, strict=True))
            ],
            num_threads=self._threads.count if self._threads else None,
        )

    def close(self) -> None:
        self._cache.close()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a small step, so that the first request does not pay for what is set up on first use.

        Before any request: it writes into block 0, and zeroes it again.
        """
        num_tokens = min(4, self._cache.block_size)
        counts = [1, num_tokens - 1] if num_tokens > 1 and len(self._num_blocks) > 1 else [1]
        self._facts.set(list(range(len(counts))), [0] * len(counts), counts)
        hidden = self._run_trunk(torch.zeros(sum(counts), dtype=torch.long, device=self._model.device))
        self._logits(hidden[:1])
        self._cache.clear(self._facts.slots)

    # ------------------------------------------------------------------------------------------------- the rows

    def _write_tables(self, sequences: list[ScheduledSequence]) -> None:
        """A new sequence's tokens, and new block ids behind those that a row has. Its number of them comes later."""
        rows, columns, blocks = [], [], []
        for s in sequences:
            if s.admission is not None:
                token_ids = torch.tensor(s.admission.token_ids, dtype=torch.int32)
                self._tokens[s.row, : len(token_ids)] = token_ids.to(self._model.device)
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

    def _run_trunk(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens], of the step that the facts are of. Returns [num_tokens, hidden_size]."""
        self.attention.prepare(self._facts)
        positions = self._facts.positions[None]
        with attending(self._run_layer):
            out = self._model.trunk(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        hidden: Tensor = out[0][0]
        return hidden

    def _run_layer(self, *call: Any) -> Tensor:
        if self._threads is not None:  # in each layer, because a step that a neighbour holds up takes seconds
            self._threads.adapt()
        return self.attention.run(*call)

    def _clear_corrupt(self, hidden: Tensor) -> set[int]:
        """Sequences with NaN or infinity in this step; what they wrote into the cache is zeroed.

        A key or value that is not finite makes its own token's hidden state so too, because a token sees itself.
        """
        bad = ~hidden.isfinite().all(-1)  # [num_tokens]
        if not bad.any():
            return set()
        sequence = self._facts.sequence_of  # [num_tokens]
        corrupt = set(sequence[bad].tolist())
        self._cache.clear(self._facts.slots[torch.isin(sequence, torch.tensor(list(corrupt), device=bad.device))])
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
        places = [Place(sequences[i].row, sequences[i].start + sequences[i].num_known) for i in members]
        results = self._sampler.sample(places, logits)
        drawn = [(place, result.token_ids) for place, result in zip(places, results, strict=True) if result.token_ids]
        self._sampler.keep(drawn)
        if drawn:
            rows, positions = [place.row for place, _ in drawn], [place.position for place, _ in drawn]
            index = torch.tensor([rows, positions, [token for _, [token] in drawn]], device=hidden.device)  # [3, n]
            self._tokens[index[0], index[1]] = index[2].int()
        return dict(zip(members, results, strict=True))

    def _with_prompt_logprobs(
        self, sequence: ScheduledSequence, result: SequenceResult, hidden: Tensor
    ) -> SequenceResult:
        """hidden: [num_known, hidden_size], of this sequence."""
        if not sequence.num_prompt_logprobs or result.failure is not None:
            return result
        first = sequence.start + 1
        targets = self._tokens[sequence.row, first : first + sequence.num_prompt_logprobs].tolist()
        size = max(1, PROMPT_LOGITS_AT_ONCE // self._model.facts.vocab_size)
        parts: list[Logprobs] = []
        for i in range(0, len(targets), size):
            part = targets[i : i + size]
            logits = self._logits(hidden[i : i + len(part)])
            if not logits.isfinite().all():
                return SequenceResult(failure=Failure.CORRUPT)
            parts.append(token_logprobs(logits, part, self._num_prompt_top[sequence.row]))
        return SequenceResult(result.token_ids, result.logprobs, Logprobs.join(parts))
