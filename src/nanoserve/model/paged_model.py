"""A model over the paged cache: from tokens of rows to hidden states, and from those to logits."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nanoserve.kv_cache.paged_kv_cache import PagedKVCache
from nanoserve.model.adapters import AdapterSlots
from nanoserve.model.attend import attend
from nanoserve.model.attention import Attention, StepFacts, attending
from nanoserve.model.loader import LoadedModel, fix_rope
from nanoserve.model.rows import Rows
from nanoserve.model.threads import ComputeThreads


class PagedModel:
    """The model that is served is one, and the one that drafts for it another, over the same rows. Engine thread only.

    Owns its K/V tensors and attention's memory.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedKVCache,
        rows: Rows,
        *,
        max_num_tokens: int,
        max_context_tokens: int,
        threads: ComputeThreads | None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        """max_num_tokens: of a step. threads: None where no threads of a CPU compute. adapters: None = it has none."""
        self.vocab_size = model.facts.vocab_size
        self.cache = cache
        self.attention = Attention(cache, model.attention_layers, attend)
        self.facts = StepFacts(rows.block_tables, cache.block_size, max_num_tokens)
        self._model = model
        self._rows = rows
        self._threads = threads
        self._adapters = adapters
        fix_rope(model.model, max_context_tokens)

    def run(self, rows: list[int], starts: list[int], counts: list[int]) -> Tensor:
        """Compute `counts` tokens of each row from `starts` on, fewer first. Returns [num_tokens, hidden_size].

        Afterwards `facts` are of this step.
        """
        self.facts.set(rows, starts, counts)
        token_ids = self._rows.tokens[self.facts.rows[self.facts.sequence_of], self.facts.positions].long()
        # A model that drafts may have fewer places for tokens than the one that is served.
        with self._adapting(rows, counts):
            return self._run_trunk(token_ids.clamp_(max=self.vocab_size - 1))

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """hidden: [n, hidden_size], of these rows, one by one. Returns [n, vocab_size]."""
        with self._adapting(rows, [1] * len(rows)):
            logits: Tensor = self._model.head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]

    def warm_up(self) -> None:
        """Run a small step, so that the first request does not pay for what is set up on first use.

        Before any request: it writes into block 0, and zeroes it again.
        """
        num_tokens = min(4, self.cache.block_size)
        counts = [1, num_tokens - 1] if num_tokens > 1 and len(self._rows.block_ids) > 1 else [1]
        self.facts.set(list(range(len(counts))), [0] * len(counts), counts)
        hidden = self._run_trunk(torch.zeros(sum(counts), dtype=torch.long, device=self._model.device))
        self.logits(hidden[:1], [0])
        self.cache.clear(self.facts.slots)

    def _adapting(self, rows: list[int], counts: list[int]) -> AbstractContextManager[None]:
        """While it lasts, the model computes `counts` tokens of each row with the row's adapter."""
        if self._adapters is None:
            return nullcontext()
        return self._adapters.step([self._rows.adapter_slots[row] for row in rows], counts)

    def _run_trunk(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens], of the step that the facts are of."""
        self.attention.prepare(self.facts)
        positions = self.facts.positions[None]
        with attending(self._run_layer):
            out = self._model.trunk(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        hidden: Tensor = out[0][0]
        return hidden

    def _run_layer(self, *call: Any) -> Tensor:
        if self._threads is not None:  # in each layer, because a step that a neighbour holds up takes seconds
            self._threads.adapt()
        return self.attention.run(*call)
