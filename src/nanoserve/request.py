"""The vocabulary that the parts of the engine share: plain picklable data, no behaviour, no torch.

    caller ── Request ──▶ scheduler ── StepPlan ──▶ model side ── StepResult ──▶ scheduler ── events ──▶ caller

`StepPlan` (what to compute) and `StepResult` (what came out) are all that the engine and the model know of each
other. The protocols at the end are the seams that `build.py` fills.
"""

import enum
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, Protocol, overload

from nanoserve.adapter.vocabulary import Adapter, AdapterAnswer, AdapterMessage, AdaptersServed
from nanoserve.errors import Rejection, RequestError
from nanoserve.step_record import StepRecord


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    EOS = "eos"  # the model ended it
    STOP = "stop"  # a stop string or stop token
    LENGTH = "length"  # max_tokens
    CONTEXT = "context"  # the context window is full
    TIME_LIMIT = "time_limit"  # the soft time limit
    COMPLETE = "complete"  # its constraint allows nothing more


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that are allowed. NaN never is."""

    low: float
    high: float
    # `low` itself is refused.
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.is_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{f'above {self.low}, up to' if self.is_open else f'{self.low} to'} {self.high}"


def ranged(default: Any, low: float, high: float, *, is_open: bool = False) -> Any:
    """A field of SamplingParams whose value must lie in a Range."""
    return field(default=default, metadata={"range": Range(low, high, is_open)})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the tokens of a request depend on besides its prompt, and what is reported of them.

    Those of the contract's Sampling have the same names here: what carries them to the sampler loops over the fields.
    """

    # Sequences to generate.
    n: int = 1
    # 0 = greedy.
    temperature: float = ranged(1.0, 0, 100)
    # The most likely token is always kept; 1 = off.
    top_p: float = ranged(1.0, 0, 1)
    # 0 = off.
    top_k: int = ranged(0, 0, 2**32 - 1)
    # 0 = off.
    min_p: float = ranged(0.0, 0, 1)
    # Of generated tokens, by count.
    frequency_penalty: float = ranged(0.0, -2, 2)
    # Of generated tokens, once.
    presence_penalty: float = ranged(0.0, -2, 2)
    # Of prompt and generated tokens; 1 = off.
    repetition_penalty: float = ranged(1.0, 0, 100, is_open=True)
    # Sequence i draws with seed + i (mod 2**64). None = the engine picks one at admission.
    seed: int | None = ranged(None, 0, 2**64 - 1)
    # Token id -> what is added to its logit.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Of each sequence; 0 = only the prompt is computed. None = what the context leaves, filled in at admission.
    max_tokens: int | None = None
    # No EOS, stop token or stop string ends the sequence before.
    min_tokens: int = 0
    # Then its reasoning is closed, if it still goes on. None = no limit.
    max_reasoning_tokens: int | None = None
    # Stop strings; they may span tokens.
    stop: tuple[str, ...] = ()
    # Stop tokens besides EOS.
    stop_token_ids: frozenset[int] = frozenset()
    # EOS is a token like any other.
    ignore_eos: bool = False
    # The text keeps the stop string or stop token.
    include_stop: bool = False
    # Soft limit in seconds from arrival.
    time_limit_s: float | None = None
    # Report log-probabilities with this many alternatives. None = off.
    logprobs: int | None = None
    # The same for the prompt's tokens.
    prompt_logprobs: int | None = None
    # False = token ids only.
    detokenize: bool = True
    # Special tokens are left out of the text.
    skip_special_tokens: bool = True
    # Most tokens that may be guessed in a step. 0 = none. None = as many as the server does.
    max_draft_tokens: int | None = None
    # What the completion is expected to be, as a text, or its tokens once it is encoded. Empty = nothing is expected.
    prediction: str | tuple[int, ...] = ""


# Of numbers in SamplingParams, whoever chooses them: a caller, or a checkpoint's generation_config.json.
SAMPLING_RANGES: dict[str, Range] = {
    each.name: each.metadata["range"] for each in fields(SamplingParams) if "range" in each.metadata
}
# What callers of the service call a field of SamplingParams, where that is another name. A switch that is on by default
# is called by its opposite.
CALLERS_NAMES = {
    "time_limit_s": "time_limit",
    "detokenize": "omit_text",
    "skip_special_tokens": "keep_special_tokens",
}


class ConstraintKind(enum.Enum):
    """What the text of a constraint is. The values are the names of the contract's fields."""

    JSON_SCHEMA = "json_schema"  # a JSON Schema
    JSON_OBJECT = "json_object"  # nothing: any JSON object is allowed
    REGEX = "regex"  # a regular expression in the syntax of Rust's regex crate, for the whole of the output
    GRAMMAR = "grammar"  # a Lark grammar, as llguidance reads them
    CHOICES = "choices"  # a JSON array of texts, of which the output is one
    DIALECT = "dialect"  # a Lark grammar of reasoning, text and calls, which refers to `parts`: no field of its own


# In the grammar of a DIALECT, what is captured when a block of reasoning begins, unless the prompt begins it, and when
# it ends.
BEGUN, REASONED = "begun", "reasoned"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must be."""

    kind: ConstraintKind
    text: str = ""
    # What of a schema cannot be enforced is left out of the grammar, and checked when the output is complete.
    is_relaxed: bool = False
    # Path in the contract of what it was made of, if that is not `constraint`.
    field: str = ""
    # Of a DIALECT: what its grammar refers to as "@name".
    parts: "tuple[tuple[str, Constraint], ...]" = ()
    # Of a DIALECT whose reasoning may be cut short: the same where the open block is to be closed at once; and
    # whether it is the prompt that opens the block.
    closing_text: str = ""
    is_reasoning: bool = False

    @property
    def path(self) -> str:
        """Where callers are told that it is."""
        return self.field or f"constraint.{self.kind.value}"

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> "Constraint":
        """The output is one of these texts."""
        return cls(ConstraintKind.CHOICES, json.dumps(list(choices)))


class Treatment(enum.Enum):
    """What became of a keyword."""

    ENFORCED = "enforced"  # the grammar holds to it
    RELAXED = "relaxed"  # left out of the grammar, as the caller allowed
    ANNOTATION = "annotation"  # it says nothing of the value
    REFUSED = "refused"  # it cannot be enforced, and the caller did not allow to leave it out


@dataclass(frozen=True, slots=True)
class KeywordUse:
    """One keyword at one place of a schema."""

    # Of the schema that has it, from the root on.
    pointer: str
    keyword: str
    treatment: Treatment
    # Why it is relaxed or refused; else empty.
    why: str = ""
    # Path in the contract of the schema.
    field: str = "constraint.json_schema"


@dataclass(frozen=True, slots=True)
class ConstraintReport:
    """What is told of a constraint that was compiled."""

    # What became of each keyword of its schema; empty for the other kinds.
    keywords: tuple[KeywordUse, ...]
    # Of the grammar as llguidance takes it.
    num_grammar_bytes: int
    # Seconds to make it, and to compute the mask of the first token.
    compile_s: float
    first_mask_s: float

    @property
    def relaxed(self) -> tuple[KeywordUse, ...]:
        """Keywords that are checked when the output is complete, and not before."""
        return tuple(use for use in self.keywords if use.treatment is Treatment.RELAXED)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the scheduler takes it: tokenized, every default filled in."""

    # The engine's own, unique.
    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    # The model's EOS ids; empty if the caller ignores EOS.
    eos_token_ids: frozenset[int] = frozenset()
    # Higher runs first.
    priority: int = 0
    # time.monotonic() at arrival, at the hard deadline, and at the soft time limit.
    arrival_s: float = 0.0
    deadline_s: float | None = None
    time_limit_s: float | None = None
    # Prefixes are shared only within one salt.
    cache_salt: str = ""
    # Of the prompt's blocks, from the first on: as many as are made already. The scheduler makes the others.
    block_hashes: list[bytes] = field(default_factory=list)
    skip_cache_read: bool = False
    # What the output must be. None = anything.
    constraint: Constraint | None = None
    # Weights besides the model's. None = no others. Until the scheduler has it, the revision is a guess, for which the
    # block_hashes were made; empty = none.
    adapter: Adapter | None = None


class DraftSource(enum.Enum):
    """Where a guess of the next tokens comes from."""

    # What followed the last tokens earlier in the text.
    NGRAM = "ngram"
    # What the model has said to the same caller.
    SUFFIX = "suffix"
    # What the caller expects.
    PREDICTION = "prediction"
    # What a smaller model would say.
    DRAFT_MODEL = "draft_model"
    # What a constraint leaves no choice about.
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What became of one guess."""

    source: DraftSource
    # Tokens that were computed, and those of them that became the sequence's.
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class DraftTotals:
    """What became of all guesses of one source."""

    # At most one a step and sequence.
    num_drafts: int = 0
    # Of their tokens.
    num_tokens: int = 0
    # How often the token at place 0, 1, 2, ... of a draft was right, up to the last place where one was.
    accepted_per_position: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        """Tokens that callers got."""
        return sum(self.accepted_per_position)

    def plus(self, num_tokens: int, num_accepted: int) -> "DraftTotals":
        """With one draft more."""
        per_position = zip_longest(self.accepted_per_position, [1] * num_accepted, fillvalue=0)
        return DraftTotals(
            self.num_drafts + 1,
            self.num_tokens + num_tokens,
            tuple(map(sum, per_position)),
        )


# ---------------------------------------------------------------------------------------- what to compute


@dataclass(frozen=True, slots=True)
class Admission:
    """What the model side must know of a sequence that takes a row, told once."""

    params: SamplingParams
    # Of this sequence: the request's seed + its index.
    seed: int
    # Prompt and, after a preemption, the completion so far. To these the model side adds what it draws. The scheduler's
    # own list, which does not change before the step is committed: a copy of a long one takes time.
    token_ids: list[int]
    num_prompt_tokens: int
    # EOS and stop tokens, not drawn before min_tokens.
    end_token_ids: frozenset[int]
    # Whose text may be used to guess this one's: the request's cache_salt, and its adapter's revision.
    owner: tuple[str, str] = ("", "")
    # What the completion must be; None = anything. It lives in this process alone.
    grammar: "Grammar | None" = None
    # Where the weights of its adapter are, for as long as it has the row. None = the model's alone.
    adapter_slot: int | None = None


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The part of one sequence that a step computes: positions start to start + num_known - 1, and drafts behind.

    It counts tokens and names none: the model side has them, from the admission or because it drew them.
    """

    # The sequence's place in the model side's state, 0 to max_num_seqs - 1, kept while it runs.
    row: int
    # num_computed_tokens before this step.
    start: int
    # Tokens that the model side has and computes, at least one.
    num_known: int
    # Appended to the row's block table; the whole table if `admission` is set.
    new_block_ids: list[int]
    # The step reaches the last token that there is, so its logits give the next one.
    samples: bool
    # Set in the first step after the row changed hands.
    admission: Admission | None = None
    # Prompt tokens whose log-probabilities are wanted: so many of those that follow positions start, start + 1, ...
    num_prompt_logprobs: int = 0
    # Places behind the known tokens, in the row's blocks, for tokens that the model side guesses and computes along
    # with them. Only of one that samples: what it then draws says how many of the guesses were right.
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work. Sequences that compute fewer tokens come first."""

    sequences: list[ScheduledSequence]


# ------------------------------------------------------------------------------------------ what came out


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log-softmax of the raw logits at one token."""

    token_id: int
    # None for the prompt's first token, which nothing predicts.
    logprob: float | None
    # 1 = most likely.
    rank: int
    # Alternatives, most likely first; their own `top` is empty.
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs(Sequence[TokenLogprob]):
    """TokenLogprobs kept as columns, of which thousands travel to another process in no time."""

    # Of each line: a token, and its alternatives.
    width: int
    # Line by line.
    token_ids: "array[int]"
    logprobs: "array[float]"
    ranks: "array[int]"

    def __len__(self) -> int:
        return len(self.token_ids) // self.width

    @overload
    def __getitem__(self, index: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, index: slice) -> "Logprobs": ...
    def __getitem__(self, index: int | slice) -> "TokenLogprob | Logprobs":
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return self.cut(start, max(start, stop), self.width)
        line = range(len(self))[index]
        one = self.cut(line, line + 1, self.width)
        token, *top = map(TokenLogprob, one.token_ids, one.logprobs, one.ranks)
        return replace(token, top=tuple(top))

    def cut(self, start: int, stop: int, width: int) -> "Logprobs":
        """The lines from start to stop - 1; if it is only one, the first `width` of it."""
        part = slice(start * self.width, (stop - 1) * self.width + width if stop > start else start * self.width)
        return Logprobs(width, self.token_ids[part], self.logprobs[part], self.ranks[part])

    @classmethod
    def join(cls, parts: Sequence["Logprobs"]) -> "Logprobs":
        """One behind the other; at least one, all of the same width."""
        first, *others = parts
        joined = cls(first.width, first.token_ids[:], first.logprobs[:], first.ranks[:])
        for other in others:
            joined.token_ids.extend(other.token_ids)
            joined.logprobs.extend(other.logprobs)
            joined.ranks.extend(other.ranks)
        return joined


class Failure(enum.Enum):
    """Why nothing came of a sequence in a step, or of a whole request."""

    # The model made a NaN or an infinity: what it wrote into the cache cannot be used either.
    CORRUPT = "corrupt"
    # What the request asks for leaves no token that could be drawn. The cache is right.
    NO_TOKEN = "no token"
    # Following the request's constraint takes more than its limits allow. The cache is right.
    CONSTRAINT = "constraint"
    # The step raised: it has no results at all.
    STEP = "step"
    # The request's hard deadline passed.
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a step made of one sequence."""

    # Sampled tokens: empty unless `samples`; the drafts that were right, and one more.
    token_ids: list[int] = field(default_factory=list)
    # Aligned with token_ids if the request asked for them, else empty.
    logprobs: Sequence[TokenLogprob] = ()
    # As many as `num_prompt_logprobs`.
    prompt_logprobs: Sequence[TokenLogprob] = ()
    # CORRUPT, NO_TOKEN or CONSTRAINT; then all of the above is empty.
    failure: Failure | None = None
    # The completion satisfies its constraint, if it ends here.
    satisfies: bool = False
    # Its constraint allows no further token.
    is_over: bool = False
    # Drafts that were computed, and their source.
    num_drafted: int = 0
    draft_source: DraftSource | None = None
    # How many places for drafts the model side could use in the next step.
    num_drafts_next: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made of its sequences."""

    # Aligned with StepPlan.sequences.
    sequences: list[SequenceResult]
    # CPU threads that computed its last layer. None = another device did.
    num_threads: int | None = None


# ------------------------------------------------------------------------------ what the scheduler reports


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """The request is scheduled for the first time."""

    request_id: str
    time_s: float
    # Prompt tokens read from the prefix cache.
    num_cached_tokens: int
    # Keywords of its constraint that are checked at the end alone.
    relaxed: tuple[KeywordUse, ...] = ()
    # That it is computed with. Its revision is empty if it ends before that is known.
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence, and its end."""

    request_id: str
    index: int
    time_s: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None
    # The EOS or stop token that ended it.
    stop_token_id: int | None = None
    # Of the sequence so far; set with finish_reason.
    num_preemptions: int = 0
    # None = nothing was guessed.
    draft: DraftCounts | None = None
    # What was generated so far satisfies the request's constraint.
    satisfies: bool = False


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended without a result: a failure, or it was turned away because of its constraint."""

    request_id: str
    reason: Failure | Rejection


@dataclass(frozen=True, slots=True)
class CacheReset:
    """Answers a ResetCache."""

    num_freed_blocks: int


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """The step loop is gone: nothing that was posted, or will be, is answered any more."""


@dataclass(frozen=True, slots=True)
class ConstraintCompiled:
    """Answers a CompileConstraint."""

    number: int
    result: ConstraintReport | RequestError


Event = (
    RequestStarted
    | SequenceOutput
    | RequestFailed
    | CacheReset
    | ConstraintCompiled
    | AdapterAnswer
    | AdaptersServed
    | StepRecord
    | EngineEnded
)


# ------------------------------------------------------------------- what the scheduler is told besides requests


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request, or one of its sequences that has begun to generate. Idempotent; no event answers it."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached prefix, between two steps. Each is answered by one CacheReset, in their order."""


@dataclass(frozen=True, slots=True)
class ObserveSteps:
    """Report a StepRecord of each step from now on."""


@dataclass(frozen=True, slots=True)
class CompileConstraint:
    """Say what a constraint comes to. Answered by one ConstraintCompiled of the same number."""

    number: int
    constraint: Constraint


Message = Request | Abort | ResetCache | CompileConstraint | AdapterMessage | ObserveSteps


# ---------------------------------------------------------------------------------------- how the start goes


@dataclass(frozen=True, slots=True)
class Stage:
    """What is being done."""

    name: str
    # How much of it is, 0 to 1, if that is known.
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to know of what was built."""

    name: str
    # May have several lines.
    value: str


# ----------------------------------------------------------------------------------------------- the seams


class Executor(Protocol):
    """The model side: one model on one device, or one rank of many. Engine thread only.

    Steps are computed in the order of their plans, so that a plan may name what an earlier one has yet to compute.
    """

    # How many plans it takes before the first must be collected: with 2, one step is planned while another runs.
    depth: int

    def submit(self, plan: StepPlan) -> None:
        """Take a plan."""

    def collect(self) -> StepResult:
        """Wait for the oldest plan's result. Raises if that whole step failed; those behind it go on."""

    def close(self) -> None:
        """End what works for it in the background. Nothing is called after this."""


class Grammar(Protocol):
    """A compiled constraint, ready for any number of completions: see constraint/compiler.py."""

    @property
    def report(self) -> ConstraintReport: ...

    def matcher(self, token_ids: Sequence[int], max_reasoning_tokens: int | None) -> Any:
        """A constraint.matcher.Matcher that has read these tokens of the completion."""


# Who is told how the start goes. Called on any thread.
Report = Callable[[Stage | Fact], None]
