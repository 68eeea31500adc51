"""From logits to tokens: one batched step over rows that each have their own parameters.

    raw logits ─▶ penalties ─▶ logit_bias ─▶ min_tokens mask ─▶ greedy ──────────────────────────────▶ token
         │                                                  └─▶ temperature ─▶ top_k ─▶ top_p ─▶ min_p ─▶ draw
         └──▶ log-probabilities, ranks, alternatives

The sampler owns what sampling must remember of each row: its parameters, and which tokens it has seen if a penalty
asks for them. The runner owns one Sampler, and tells it once of every sequence that takes a row.

Rows are grouped by the work they need, so that a plain greedy row costs one argmax whatever the others ask for.
Nothing here depends on which rows share the step. A row's order of preference is total (higher logit, then lower
token id), and its noise is a function of (seed, position).
"""

import enum
import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.request import Admission, SamplingParams, SequenceResult, TokenLogprob

# How many of the most likely tokens are looked at before the whole vocabulary is sorted.
NUM_CANDIDATES = 1024
# The draw adds up weights in blocks of this many tokens, then looks into one block.
DRAW_BLOCK = 128
# Log-probabilities are computed for this many logits at once, to bound the float32 and int64 copies.
LOGPROB_CHUNK = 1 << 23

FLOAT32 = torch.finfo(torch.float32)


class _Path(enum.Enum):
    """The work that a row needs, cheapest first."""

    # Greedy, nothing changes the logits.
    ARGMAX = enum.auto()
    # Greedy after edits.
    GREEDY = enum.auto()
    # Random, no filter that needs an order: weights are drawn where they lie.
    UNORDERED = enum.auto()
    # Random, top_k of at most NUM_CANDIDATES.
    TOP_K = enum.auto()
    # Random, top_p alone: the nucleus is mostly within NUM_CANDIDATES.
    TOP_P = enum.auto()
    # Random, and the whole vocabulary must be sorted.
    SORTED = enum.auto()


class Sampler:
    """Draws the next token of each row.

    Runs on the engine thread. State is per row, replaced by `admit`, and advanced only when `sample` has its result,
    so that an exception leaves every row as it was.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: list[_Row | None] = [None] * max_num_rows

    def admit(self, row: int, admission: Admission) -> None:
        """A sequence takes the row."""
        self._rows[row] = _Row(admission, self._vocab_size)

    def sample(self, rows: list[int], positions: list[int], logits: Tensor) -> list[SequenceResult]:
        """One token for each of `rows`, with log-probabilities where they are wanted.

        logits: [len(rows), vocab], raw, any float dtype; left unchanged.
        positions[i]: tokens that sequence i has before the one to draw.

        A row is corrupt, and gets no token, if its logits hold NaN or +inf, or if no token is possible.
        """
        if not rows:
            return []
        states = [self._state(row) for row in rows]
        # The maximum shows what is wrong with a row too: NaN, +inf, or -inf if there is nothing else.
        best, tokens = logits.max(dim=-1)  # [n], [n]
        is_usable = best.isfinite()  # [n]
        for path, members in _group_by_path(states, positions, self._vocab_size).items():
            index = torch.tensor(members, device=self._device)
            scores = logits.index_select(0, index).float()  # [m, vocab], a copy
            drawn, is_drawn = self._sample_group(
                path, [states[i] for i in members], [positions[i] for i in members], scores
            )
            tokens[index] = drawn
            is_usable[index] &= is_drawn
        token_ids: list[int] = tokens.where(is_usable, -1).tolist()  # the step's one wait for the device
        results = _results(states, logits, token_ids)
        for state, token_id in zip(states, token_ids, strict=True):
            if token_id >= 0 and state.seen is not None:
                state.seen.add(token_id)
        return results

    def _state(self, row: int) -> "_Row":
        state = self._rows[row]
        if state is None:
            raise ValueError(f"row {row} was not admitted")
        return state

    def _sample_group(
        self, path: _Path, states: list["_Row"], positions: list[int], scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [m], and whether each row had any possible token [m]. Overwrites scores [m, vocab]."""
        _apply_penalties(scores, states)
        _apply_bias(scores, states)
        _forbid_early_end(scores, states, positions)
        best, tokens = scores.max(dim=-1, keepdim=True)  # [m, 1], [m, 1]
        is_possible = best.isfinite().squeeze(1)
        if path is _Path.GREEDY:
            return tokens.squeeze(1), is_possible
        params = [state.params for state in states]
        temperature = _column(scores, [max(p.temperature, FLOAT32.tiny) for p in params])
        # With the maximum at 0 no temperature overflows upwards, and exp(scores) is p / p_max.
        scores.sub_(best).div_(temperature)
        noise = [uniform(s.seed, p) for s, p in zip(states, positions, strict=True)]
        uniforms = torch.tensor(noise, dtype=torch.float64, device=scores.device)  # [m]
        return _draw_group(path, scores, params, uniforms), is_possible


# -------------------------------------------------------------------------------------------- a row's state


class _Row:
    """What sampling needs of the sequence in a row; host memory only."""

    def __init__(self, admission: Admission, vocab_size: int) -> None:
        params = admission.params
        self.params = params
        self.seed = admission.seed
        # Up to this position no end token may be drawn.
        self.min_end_position = admission.num_prompt_tokens + params.min_tokens
        # Ids that the model cannot draw are left out here and below, or they would index outside the logits.
        self.end_token_ids = torch.tensor([i for i in admission.end_token_ids if i < vocab_size])
        bias = {i: b for i, b in params.logit_bias.items() if i < vocab_size}
        self.bias_token_ids = torch.tensor(list(bias), dtype=torch.int64)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        is_penalized = params.repetition_penalty != 1 or _has_output_penalty(params)
        self.seen = _SeenTokens(admission, vocab_size) if is_penalized else None

    def changes_logits(self, position: int) -> bool:
        """Whether the scores at this position differ from the raw logits."""
        forbids_end = position < self.min_end_position and len(self.end_token_ids) > 0
        return self.seen is not None or len(self.bias) > 0 or forbids_end


class _SeenTokens:
    """The distinct tokens of one sequence and how often each was generated: what penalties look at.

    Prompt tokens are kept only if there is a repetition penalty. `token_ids` and `counts` are aligned; work a step
    is in proportion to them, not to the vocabulary.
    """

    def __init__(self, admission: Admission, vocab_size: int) -> None:
        generated = admission.token_ids[admission.num_prompt_tokens :]
        counts = dict.fromkeys(admission.token_ids, 0) if admission.params.repetition_penalty != 1 else {}
        counts |= Counter(generated)
        counts = {token_id: count for token_id, count in counts.items() if token_id < vocab_size}
        self.token_ids = torch.tensor(list(counts), dtype=torch.int64)  # [num_seen]
        self.counts = torch.tensor(list(counts.values()), dtype=torch.float32)  # [num_seen]
        self._slots = {token_id: slot for slot, token_id in enumerate(counts)}

    def add(self, token_id: int) -> None:
        """The token was generated."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot < len(self.counts):
            self.counts[slot] += 1
        else:
            self.token_ids = torch.cat([self.token_ids, torch.tensor([token_id])])
            self.counts = torch.cat([self.counts, torch.ones(1)])


def _has_output_penalty(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0 or params.presence_penalty != 0


def _group_by_path(
    states: list[_Row], positions: list[int], vocab_size: int
) -> dict[_Path, list[int]]:
    """Indices of the rows that need more than the argmax of their raw logits, by what they need."""
    groups: dict[_Path, list[int]] = {}
    for i, (state, position) in enumerate(zip(states, positions, strict=True)):
        path = _path(state, position, vocab_size)
        if path is not _Path.ARGMAX:
            groups.setdefault(path, []).append(i)
    return groups


def _path(state: _Row, position: int, vocab_size: int) -> _Path:
    params = state.params
    if params.temperature == 0:
        return _Path.GREEDY if state.changes_logits(position) else _Path.ARGMAX
    if 0 < params.top_k < vocab_size:
        return _Path.TOP_K if params.top_k <= NUM_CANDIDATES else _Path.SORTED
    return _Path.TOP_P if params.top_p < 1 else _Path.UNORDERED


# ---------------------------------------------------------------------------------------- edits, all sparse


def _apply_penalties(scores: Tensor, states: list[_Row]) -> None:
    """Repetition, frequency and presence penalties on the tokens each row has seen.

    x <- (x / r if x > 0 else x * r) - frequency * count - presence * [count > 0]
    """
    rows, seen = _of_rows([state.seen for state in states])
    if not seen:
        return
    lengths = torch.tensor([len(s.token_ids) for s in seen])
    index = _flat_index(scores, rows, [s.token_ids for s in seen])
    counts = torch.cat([s.counts for s in seen]).to(scores.device)  # [num_seen]

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(scores.device)  # [num_seen]

    params = [states[row].params for row in rows]
    repetition = per_token([p.repetition_penalty for p in params])
    frequency = per_token([p.frequency_penalty for p in params])
    presence = per_token([p.presence_penalty for p in params])
    values = scores[index]  # [num_seen]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    # A very small repetition penalty must not make an infinity.
    scores[index] = values.clamp(max=FLOAT32.max)


def _apply_bias(scores: Tensor, states: list[_Row]) -> None:
    rows, biased = _of_rows([state if len(state.bias) > 0 else None for state in states])
    if biased:
        index = _flat_index(scores, rows, [state.bias_token_ids for state in biased])
        scores[index] += torch.cat([state.bias for state in biased]).to(scores.device)


def _forbid_early_end(scores: Tensor, states: list[_Row], positions: list[int]) -> None:
    """No end token before min_tokens."""
    early = [
        state if position < state.min_end_position and len(state.end_token_ids) > 0 else None
        for state, position in zip(states, positions, strict=True)
    ]
    rows, forbidding = _of_rows(early)
    if forbidding:
        index = _flat_index(scores, rows, [state.end_token_ids for state in forbidding])
        scores[index] = -torch.inf
