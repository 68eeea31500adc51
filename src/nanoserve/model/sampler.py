"""From logits to tokens: one batched step over rows that each have their own parameters.

    raw logits ─▶ penalties ─▶ logit_bias ─▶ min_tokens, constraint ─▶ greedy ────────────────────────────▶ token
         │                                                        └─▶ temperature ─▶ top_k ─▶ top_p ─▶ min_p ─▶ draw
         └──▶ log-probabilities, ranks, alternatives

The sampler owns what sampling must remember of each row: its parameters, and which tokens it has seen if a penalty
asks for them. The runner owns one Sampler, and tells it once of every sequence that takes a row.

Rows are grouped by the work they need, so that a plain greedy row costs one argmax whatever the others ask for.
Nothing here depends on which rows share the step. A row's order of preference is total (higher logit, then lower
token id), and its noise is a function of (seed, position).
"""

import copy
import enum
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nanoserve.request import Admission, Failure, Logprobs, SamplingParams, SequenceResult

# How many of the most likely tokens are put in order to find the nucleus of top_p, and the factor by which that
# grows where they do not hold it.
NUM_CANDIDATES = 1024
CANDIDATE_GROWTH = 16
# The draw adds up weights in blocks of this many tokens, then looks into one block.
DRAW_BLOCK = 128
# The largest logit is looked for in at most so many parts of a row.
MAX_PARTS = 512
# Rows that need more than an argmax are worked on this many logits at a time: on a CPU what fits its caches, elsewhere
# what bounds the memory of the copies.
CPU_LOGITS_AT_ONCE = 1 << 18
LOGITS_AT_ONCE = 1 << 24
# Log-probabilities are computed for this many logits at once, to bound the float32 and int64 copies.
LOGPROB_CHUNK = 1 << 23

FLOAT32 = torch.finfo(torch.float32)
# Of a score, less the largest: noise has 53 bits, and e**-80 is 2**-115.
OUT_OF_REACH = -80.0
# In place of a token.
_CORRUPT, _NO_TOKEN = -1, -2


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
    # Random, top_p alone: how many tokens it keeps is not known before.
    TOP_P = enum.auto()
    # Random, a larger top_k.
    LARGE_TOP_K = enum.auto()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is drawn."""

    row: int
    # Tokens that the sequence has before it.
    position: int
    # The last of those, if they are drafts: nobody has said yet that they are right.
    drafted: tuple[int, ...] = ()
    # A bit for each token that its constraint allows here, as in constraint.matcher.Masks; None = all are allowed.
    allowed: "np.ndarray[tuple[int], np.dtype[np.int32]] | None" = None


class Sampler:
    """Draws tokens at places of rows.

    Runs on the engine thread. State is per row: replaced by `admit`, and advanced by `keep`.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        logits_at_once = CPU_LOGITS_AT_ONCE if device.type == "cpu" else LOGITS_AT_ONCE
        self._rows_at_once = max(1, logits_at_once // vocab_size)
        # Of rows that a sequence has taken.
        self._rows: dict[int, _Row] = {}

    def admit(self, row: int, admission: Admission) -> None:
        """A sequence takes the row."""
        self._rows[row] = _Row(admission, self._vocab_size)

    def sample(self, places: list[Place], logits: Tensor) -> list[SequenceResult]:
        """One token for each place, of which there is at least one, with log-probabilities where they are wanted.

        logits: [len(places), vocab], raw, any float dtype; left unchanged.

        Logits that hold NaN or +inf, or nothing but -inf, are corrupt; where edits leave nothing else, there is no
        token.
        """
        states = [self._rows[place.row] for place in places]
        return _results(states, logits, self.draw(places, logits))

    def draw(self, places: list[Place], logits: Tensor) -> list[int]:
        """The tokens alone, as `sample` draws them; where there is none, a number below 0."""
        targets = [(self._rows[place.row], place) for place in places]
        # The maximum shows what is wrong with logits too: NaN, +inf, or -inf if there is nothing else.
        best, tokens = _largest(logits)  # [n], [n]
        tokens = tokens.where(best.isfinite(), _CORRUPT)
        for path, members in self._batches(targets):
            index = torch.tensor(members, device=self._device)
            scores = logits.index_select(0, index).float()  # [m, vocab], a copy
            drawn, is_possible = _sample_batch(path, [targets[i] for i in members], scores)
            drawn = drawn.where(is_possible, _NO_TOKEN)
            tokens[index] = drawn.where(tokens[index] >= 0, _CORRUPT)
        token_ids: list[int] = tokens.tolist()  # the step's one wait for the device
        return token_ids

    def keep(self, drawn: Mapping[int, list[int]]) -> None:
        """Row -> tokens that are its sequence's from now on."""
        for row, token_ids in drawn.items():
            if (seen := self._rows[row].seen) is not None:
                for token_id in token_ids:
                    seen.add(token_id)

    def _batches(self, targets: "list[_Target]") -> Iterator[tuple[_Path, list[int]]]:
        """Indices of the places that need more than the argmax of their raw logits, with what they need."""
        groups: dict[_Path, list[int]] = {}
        for i, (state, place) in enumerate(targets):
            path = state.path(place)
            if path is not _Path.ARGMAX:
                groups.setdefault(path, []).append(i)
        for path, members in groups.items():
            for start in range(0, len(members), self._rows_at_once):
                yield path, members[start : start + self._rows_at_once]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits.max(dim=-1): the largest of each row, and the first place where it is.

    By parts: while a CPU looks for places, it takes one number after the other, and for the largest alone a vector of
    them. For 64 rows of 151,936 this takes a quarter of the time or less.
    """
    vocab_size = logits.shape[-1]
    num_parts = next(num for num in range(MAX_PARTS, 0, -1) if vocab_size % num == 0)
    parts = logits.reshape(len(logits), num_parts, -1)  # [n, num_parts, size of a part]
    best, part = parts.amax(-1).max(-1)  # [n], [n]
    place = parts[torch.arange(len(parts), device=parts.device), part].max(-1).indices  # [n]
    return best, part * parts.shape[-1] + place


# -------------------------------------------------------------------------------------------- a row's state


class _Row:
    """What sampling needs of the sequence in a row; host memory only."""

    def __init__(self, admission: Admission, vocab_size: int) -> None:
        params = admission.params
        self.params = params
        self.vocab_size = vocab_size
        self.seed = admission.seed
        # Before this position no end token may be drawn.
        self.min_end_position = admission.num_prompt_tokens + params.min_tokens
        # Ids that the model cannot draw are left out here and below, or they would index outside the logits.
        self.end_token_ids = torch.tensor([i for i in admission.end_token_ids if i < vocab_size], dtype=torch.int64)
        bias = {i: b for i, b in params.logit_bias.items() if i < vocab_size}
        self.bias_token_ids = torch.tensor(list(bias), dtype=torch.int64)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        is_penalized = penalties != (1, 0, 0)
        self.seen = _SeenTokens(admission, vocab_size) if is_penalized else None

    def path(self, place: Place) -> _Path:
        """The work that drawing the token at this place takes."""
        params = self.params
        if params.temperature == 0:
            is_edited = (
                self.seen is not None
                or len(self.bias) > 0
                or self.forbids_end(place.position)
                or place.allowed is not None
            )
            return _Path.GREEDY if is_edited else _Path.ARGMAX
        if 0 < params.top_k < self.vocab_size:
            return _Path.TOP_K if params.top_k <= NUM_CANDIDATES else _Path.LARGE_TOP_K
        return _Path.TOP_P if params.top_p < 1 else _Path.UNORDERED

    def forbids_end(self, position: int) -> bool:
        """Whether min_tokens rules end tokens out at this position."""
        return position < self.min_end_position and len(self.end_token_ids) > 0


class _SeenTokens:
    """The distinct tokens of one sequence and how often each was generated: what penalties look at.

    Prompt tokens are kept only if there is a repetition penalty. `token_ids` and `counts` are aligned; work a step
    is in proportion to them, not to the vocabulary.
    """

    def __init__(self, admission: Admission, vocab_size: int) -> None:
        generated = admission.token_ids[admission.num_prompt_tokens :]
        is_repetition_penalized = admission.params.repetition_penalty != 1
        counts = dict.fromkeys(admission.token_ids if is_repetition_penalized else [], 0)
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

    def after(self, drafted: tuple[int, ...]) -> "_SeenTokens":
        """The same, had these tokens been generated too."""
        if not drafted:
            return self
        seen = copy.copy(self)
        seen.counts, seen._slots = self.counts.clone(), dict(self._slots)
        for token_id in drafted:
            seen.add(token_id)
        return seen


# A place, and the state of its row.
_Target = tuple[_Row, Place]


# ----------------------------------------------------------------------------------------- the order of things


def _sample_batch(path: _Path, targets: list[_Target], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [m], and whether each place had any possible one [m]. Overwrites scores [m, vocab]."""
    for edit in EDITS:
        edit(scores, targets)
    best = scores.amax(dim=1, keepdim=True)  # [m, 1]
    is_possible = best.isfinite().squeeze(1)
    if path is _Path.GREEDY:
        return scores.argmax(dim=1), is_possible
    params = [state.params for state, _ in targets]
    temperature = _column(scores, [max(p.temperature, FLOAT32.tiny) for p in params])
    # With the maximum at 0 no temperature overflows upwards, and exp(scores) is p / p_max.
    scores.sub_(best).div_(temperature)
    noise = [uniform(state.seed, place.position) for state, place in targets]
    uniforms = torch.tensor(noise, dtype=torch.float64, device=scores.device)  # [m]
    return _draw_batch(path, scores, params, uniforms), is_possible


# ---------------------------------------------------------------------------------------- edits, all sparse


def _apply_penalties(scores: Tensor, targets: list[_Target]) -> None:
    """Repetition, frequency and presence penalties on the tokens that stand before each place.

    x <- (x / r if x > 0 else x * r) - frequency * count - presence * [count > 0]
    """
    seen = {
        line: state.seen.after(place.drafted) for line, (state, place) in enumerate(targets) if state.seen is not None
    }
    if not seen:
        return
    cells = _cells(scores, {line: s.token_ids for line, s in seen.items()})
    counts = torch.cat([s.counts for s in seen.values()]).to(scores.device)  # [num_seen]
    # One row of parameters for each seen token: [num_seen, 3] -> three times [num_seen].
    params = [targets[line][0].params for line in seen]
    repetition, frequency, presence = (
        torch.tensor([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
        .repeat_interleave(torch.tensor([len(s.token_ids) for s in seen.values()]), dim=0)
        .to(scores.device)
        .unbind(dim=1)
    )
    values = scores[cells]  # [num_seen]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    # A very small repetition penalty must not make an infinity.
    scores[cells] = values.clamp(max=FLOAT32.max)


def _apply_bias(scores: Tensor, targets: list[_Target]) -> None:
    biased = {line: state for line, (state, _) in enumerate(targets) if len(state.bias) > 0}
    if biased:
        cells = _cells(scores, {line: state.bias_token_ids for line, state in biased.items()})
        scores[cells] += torch.cat([state.bias for state in biased.values()]).to(scores.device)


def _forbid_early_end(scores: Tensor, targets: list[_Target]) -> None:
    """No end token before min_tokens."""
    forbidden = {
        line: state.end_token_ids for line, (state, place) in enumerate(targets) if state.forbids_end(place.position)
    }
    if forbidden:
        scores[_cells(scores, forbidden)] = -torch.inf


def _apply_constraints(scores: Tensor, targets: list[_Target]) -> None:
    """Only tokens that the constraint allows."""
    masks = {line: place.allowed for line, (_, place) in enumerate(targets) if place.allowed is not None}
    if not masks:
        return
    octets = np.stack(list(masks.values())).view(np.uint8)  # [n, num_octets]
    # To add is many times as fast as to look where a bit is set.
    added = np.take(_ADDED, octets, axis=0).reshape(len(octets), -1)[:, : scores.shape[1]]  # [n, vocab]
    if len(masks) == len(targets):
        scores += torch.from_numpy(added).to(scores.device)
    else:
        lines = torch.tensor(list(masks), device=scores.device)
        scores[lines] += torch.from_numpy(added).to(scores.device)


# What is added to the scores of eight tokens, by the octet of a mask that has their bits: float32 [256, 8].
_ADDED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf).astype(
    np.float32
)


# In this order; each changes scores [m, vocab] in place.
EDITS: tuple[Callable[[Tensor, list[_Target]], None], ...] = (
    _apply_penalties,
    _apply_bias,
    _forbid_early_end,
    _apply_constraints,
)


def _cells(scores: Tensor, token_ids: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Index of the given tokens [num_tokens of the line] in the given lines of scores: two of [sum of num_tokens]."""
    lengths = torch.tensor([len(ids) for ids in token_ids.values()])
    lines = torch.tensor(list(token_ids)).repeat_interleave(lengths)
    return lines.to(scores.device), torch.cat(list(token_ids.values())).to(scores.device)


# ---------------------------------------------------------------------------------------- filters and draw


def _draw_batch(path: _Path, scores: Tensor, params: list[SamplingParams], uniforms: Tensor) -> Tensor:
    """Tokens [m], drawn from scores [m, vocab] with maximum 0."""
    if path is _Path.UNORDERED:
        weights = _weights(scores)  # [m, vocab]
        weights.masked_fill_(weights < _column(weights, [p.min_p for p in params]), 0)
        return draw(weights, uniforms)
    if path is _Path.TOP_P:
        return _draw_nucleus(scores, params, uniforms, NUM_CANDIDATES)
    token_ids, weights = candidates(scores, max(p.top_k for p in params), params)
    return _pick(token_ids, weights, uniforms)


def _weights(scores: Tensor) -> Tensor:
    """exp(scores) [m, vocab], of scores with maximum 0; 0 for what is out of reach of any noise.

    Where exp is not a normal number, or 0, it takes a CPU ten times as long: at low temperatures, and under masks.
    """
    return scores.clamp(min=OUT_OF_REACH).exp_().mul_(scores >= OUT_OF_REACH)


def _draw_nucleus(scores: Tensor, params: list[SamplingParams], uniforms: Tensor, width: int) -> Tensor:
    """Tokens [m] of rows with top_p and no top_k, looking at `width` candidates, and at more where need be."""
    vocab_size = scores.shape[1]
    width = min(width, vocab_size)
    token_ids, weights = candidates(scores, width, params)
    tokens = _pick(token_ids, weights, uniforms)
    # If the last candidate was kept, others behind it may belong to the nucleus too.
    wide = (weights[:, -1] > 0).nonzero().squeeze(1)
    if width < vocab_size and len(wide) > 0:
        wide_params = [params[i] for i in wide.tolist()]
        width *= CANDIDATE_GROWTH
        tokens[wide] = _draw_nucleus(scores[wide], wide_params, uniforms[wide], width)
    return tokens


def _pick(token_ids: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [m], drawn from candidates [m, width]."""
    return token_ids.gather(1, draw(weights, uniforms)[:, None]).squeeze(1)


def candidates(scores: Tensor, width: int, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The `width` most likely tokens in order, and their weights p / p_max; 0 for those that a filter drops.

    scores: [m, vocab], logits over temperature, maximum 0. Returns int64 and float64 [m, width].
    width: at least every top_k that is on; all of the vocabulary, or the result is right only where its last
    weight is 0.
    """
    vocab_size = scores.shape[1]
    token_ids = most_likely(scores, width)
    weights = scores.gather(1, token_ids).double().exp()
    limits = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    top_k = _column(weights, limits)
    weights.masked_fill_(torch.arange(width, device=scores.device) >= top_k, 0)
    cumulative = weights.cumsum(dim=1)
    # Of what top_k left, keep the tokens before which there is less than top_p of the mass.
    total = cumulative[:, -1:]
    if vocab_size in limits:
        everything = _weights(scores).sum(dim=1, keepdim=True, dtype=torch.float64)  # [m, 1]
        total = torch.where(top_k < vocab_size, total, everything)
    top_p = _column(weights, [p.top_p if p.top_p < 1 else torch.inf for p in params])
    # At least one: with a top_p of 0, or where a small one is lost to rounding, the most likely token.
    weights[:, 1:].masked_fill_((cumulative - weights >= top_p * total)[:, 1:], 0)
    return token_ids, weights.masked_fill_(weights < _column(weights, [p.min_p for p in params]), 0)


def most_likely(scores: Tensor, count: int) -> Tensor:
    """Ids [m, count] of the highest of scores [m, vocab] (float32), highest first; of equals the lower id first.

    topk alone leaves the order of equals open, and in bfloat16 equals are common. So each score becomes an int64
    that no other token has: the float's bits, which order as integers once those of negative numbers are flipped,
    above the id counted backwards.
    """
    bits = scores.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()  # [m, vocab]
    keys <<= 32
    keys -= torch.arange(scores.shape[1], device=scores.device)
    top = keys.topk(count, dim=1).values  # [m, count]
    return top.neg_().bitwise_and_(0xFFFFFFFF)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: for each row of weights [m, width], at least one above 0, the place [m] where uniforms [m] falls.

    First among the sums of blocks, then inside one block: the sums are float64, so that neither the length of the
    vocabulary nor the order of summation moves a boundary, and no long prefix sum is made. A place with weight 0
    adds nothing to the sum before it, and so is never the first to exceed a value.
    """
    padded = functional.pad(weights, (0, -weights.shape[1] % DRAW_BLOCK))
    blocks = padded.reshape(len(weights), -1, DRAW_BLOCK)
    ends = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # [m, num_blocks]
    target = uniforms[:, None] * ends[:, -1:]  # [m, 1], below the last end
    # The clamps hold rows of NaN, whose result nobody uses, within bounds.
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)  # [m, 1]
    start = functional.pad(ends, (1, 0)).gather(1, block)  # [m, 1]
    inside = blocks[torch.arange(len(block), device=block.device), block.squeeze(1)]
    inside = inside.cumsum(dim=1, dtype=torch.float64)  # [m, DRAW_BLOCK]
    # The two ways to sum a block may differ in the last bit: stay below the end.
    rest = torch.minimum(target - start, inside[:, -1:].nextafter(torch.zeros_like(target)))
    place = block * DRAW_BLOCK + torch.searchsorted(inside, rest, right=True)  # [m, 1]
    return place.clamp_(max=weights.shape[1] - 1).squeeze(1)


def uniform(seed: int, position: int) -> float:
    """The noise of one draw, in [0, 1): 53 bits of a hash of seed and position, and of nothing else."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """One value for each row: [m, 1]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# --------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(logits: Tensor, targets: list[int], num_top: int) -> Logprobs:
    """log-softmax of raw logits [k, vocab] at targets [k], each with the num_top most likely tokens.

    Always finite: what has no probability gets the least float32. The rank is 1 + the number of tokens that are
    more likely, so that equals share one. k is at least 1.
    """
    chunk = max(1, LOGPROB_CHUNK // logits.shape[1])
    starts = range(0, len(targets), chunk)
    return Logprobs.join(
        [_chunk_logprobs(logits[i : i + chunk].float(), targets[i : i + chunk], num_top) for i in starts]
    )


def _chunk_logprobs(logits: Tensor, targets: list[int], num_top: int) -> Logprobs:
    target = torch.tensor(targets, device=logits.device)[:, None]  # [k, 1]
    chosen = logits.gather(1, target)  # [k, 1]
    top_ids = most_likely(logits, min(num_top, logits.shape[1]))  # [k, num_top]
    top = logits.gather(1, top_ids)  # [k, num_top]
    rank = (logits > chosen).sum(dim=1, keepdim=True) + 1  # [k, 1]
    top_ranks = (top[:, None, :] > top[:, :, None]).sum(dim=2) + 1  # [k, num_top]
    logprobs = torch.cat([chosen, top], dim=1) - logits.logsumexp(dim=1, keepdim=True)
    logprobs = logprobs.nan_to_num(nan=FLOAT32.min, neginf=FLOAT32.min).clamp_(max=0)
    token_ids, ranks = torch.cat([target, top_ids], dim=1), torch.cat([rank, top_ranks], dim=1)  # [k, 1 + num_top]
    return Logprobs(token_ids.shape[1], _column_of("q", token_ids), _column_of("f", logprobs), _column_of("q", ranks))


def _column_of(code: str, values: Tensor) -> "array[Any]":
    column = array(code)
    column.frombytes(values.cpu().contiguous().numpy().tobytes())
    return column


def _results(states: list[_Row], logits: Tensor, token_ids: list[int]) -> list[SequenceResult]:
    """Pack what was drawn, one for each of the states."""
    num_top = {
        i: state.params.logprobs
        for i, (state, token_id) in enumerate(zip(states, token_ids, strict=True))
        if state.params.logprobs is not None and token_id >= 0
    }
    logprobs: dict[int, Logprobs] = {}
    if num_top:
        index = torch.tensor(list(num_top), device=logits.device)
        drawn = [token_ids[i] for i in num_top]
        entries = token_logprobs(logits.index_select(0, index), drawn, max(num_top.values()))
        for line, (i, count) in enumerate(num_top.items()):
            logprobs[i] = entries.cut(line, line + 1, min(1 + count, entries.width))
    return [
        SequenceResult(token_ids=[token_id], logprobs=logprobs.get(i, ()))
        if token_id >= 0
        else SequenceResult(failure=Failure.CORRUPT if token_id == _CORRUPT else Failure.NO_TOKEN)
        for i, token_id in enumerate(token_ids)
    ]
