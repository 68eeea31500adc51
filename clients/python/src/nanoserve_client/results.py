"""From the contract's responses to frozen Python values. Pure; both clients use it."""

import enum
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from nanoserve_client.requests import Sampling
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

_Value = TypeVar("_Value")
_Member = TypeVar("_Member", bound=enum.Enum)


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    # The model ended it.
    EOS = "eos"
    # A stop string or stop token.
    STOP = "stop"
    # max_tokens.
    LENGTH = "length"
    # The context window is full.
    CONTEXT = "context"
    # time_limit.
    TIME_LIMIT = "time_limit"
    # The constraint allows nothing more.
    COMPLETE = "complete"
    # A reason that a newer server gave, and this client does not know.
    UNKNOWN = "unknown"


def by_number(kind: type[_Member], contract: Any, prefix: str) -> dict[int, _Member]:
    """The members of an enum by their numbers in the contract, which calls them the same behind a prefix. It has no
    UNKNOWN, which stands for what a newer server says."""
    return {contract.Value(prefix + each.name): each for each in kind if each.name != "UNKNOWN"}


_FINISH_REASONS = by_number(FinishReason, pb.FinishReason, "FINISH_REASON_")


def finish_reason_of(value: "pb.FinishReason.ValueType") -> FinishReason | None:
    """None for a sequence that has not come to its end."""
    is_set = value != pb.FINISH_REASON_UNSPECIFIED
    return _FINISH_REASONS.get(value, FinishReason.UNKNOWN) if is_set else None


def same_fields(made: type, message: Message, *others: str) -> dict[str, Any]:
    """What a message says of the fields that a dataclass has under the same names; `others` are made otherwise."""
    return {each.name: getattr(message, each.name) for each in fields(made) if each.name not in others}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was: log-softmax of the raw logits, before temperature, penalties and bias."""

    token_id: int
    # The token's bytes, which need not be UTF-8 alone.
    token: bytes
    # Natural logarithm. None for the prompt's first token, which nothing predicts.
    logprob: float | None
    # 1 = the most likely token. 0 for the prompt's first token.
    rank: int
    # Alternatives, most likely first; their own `top` is empty.
    top: tuple["TokenLogprob", ...] = ()

    @classmethod
    def of(cls, message: pb.TokenLogprob) -> Self:
        return cls(
            token_id=message.token_id,
            token=message.token,
            logprob=message.logprob if message.HasField("logprob") else None,
            rank=message.rank,
            top=tuple(cls.of(alternative) for alternative in message.top),
        )


@dataclass(frozen=True, slots=True)
class Started:
    """The server has begun to run the request."""

    # The caller's `request_id`, or one that the server made.
    request_id: str
    # The model that serves it.
    model: str
    # When the request arrived.
    create_time: datetime
    # Length of the tokenized prompt.
    prompt_tokens: int
    # How many of them were read from the prefix cache.
    cached_tokens: int
    # The values in force, seed too, so that the run can be repeated. Floats have 32 bits.
    sampling: Sampling
    # The adapter that it is computed with, and the digest of its content. Empty = none.
    adapter: str
    adapter_revision: str

    @classmethod
    def of(cls, message: pb.Started) -> Self:
        return cls(
            **same_fields(cls, message, "create_time", "sampling"),
            create_time=message.create_time.ToDatetime(UTC),
            sampling=Sampling.of(message.sampling),
        )


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of a call of a tool."""

    # The call, 0 for the first of the sequence.
    index: int
    # In the call's first piece alone.
    id: str
    name: str
    # More of its arguments: joined, they are a JSON object.
    arguments: str
    # In the call's last piece alone. A call that never has it was cut off.
    is_complete: bool

    @classmethod
    def of(cls, message: pb.ToolCallDelta) -> Self:
        return cls(message.index, message.id, message.name, message.arguments_json, message.complete)


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A call of a tool that the model has made."""

    id: str
    name: str
    # JSON: an object, if is_complete.
    arguments: str
    # False = it was cut off, and is not to be made.
    is_complete: bool

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError if the call was cut off."""
        if not self.is_complete:
            raise ValueError(f"the call of {self.name} is cut off: {self.arguments[-80:]!r}")
        value: dict[str, Any] = json.loads(self.arguments)
        return value


def joined_calls(pieces: Iterable[CallPiece]) -> tuple[MadeCall, ...]:
    """Of one sequence, in order."""
    calls: dict[int, list[CallPiece]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return tuple(
        MadeCall(own[0].id, own[0].name, "".join(piece.arguments for piece in own), own[-1].is_complete)
        for own in calls.values()
    )


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one sequence since its previous Delta."""

    # The sequence, 0 to n - 1.
    index: int
    # Whole characters. May lag behind token_ids, but not in the sequence's last Delta.
    text: str
    # New tokens, those of a stop string or EOS too.
    token_ids: tuple[int, ...]
    # Aligned with token_ids if `logprobs` was asked for, else empty.
    logprobs: tuple[TokenLogprob, ...]
    # Set in the sequence's last Delta alone.
    finish_reason: FinishReason | None
    # What ended the sequence, with FinishReason.STOP; the token with EOS too.
    stop_string: str | None
    stop_token_id: int | None
    # With `parse`: of the new text, what is reasoning, what is content, and what are calls of tools.
    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[CallPiece, ...] = ()

    @classmethod
    def of(cls, message: pb.Delta) -> Self:
        return cls(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(TokenLogprob.of(logprob) for logprob in message.logprobs),
            finish_reason=finish_reason_of(message.finish_reason),
            stop_string=message.stop_string if message.HasField("stop_string") else None,
            stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
            reasoning=message.reasoning,
            content=message.content,
            tool_calls=tuple(map(CallPiece.of, message.tool_calls)),
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole sequence: its deltas joined."""

    # 0 to n - 1.
    index: int
    text: str
    token_ids: tuple[int, ...]
    # Aligned with token_ids if `logprobs` was asked for, else empty.
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    # What ended the sequence, with FinishReason.STOP; the token with EOS too.
    stop_string: str | None
    stop_token_id: int | None
    # Whether it is what the request's constraint asks for. None = there was no constraint.
    constraint_outcome: "ConstraintOutcome | None" = None
    # With `parse`: the parts of the text; None = they were not told apart.
    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[MadeCall, ...] = ()
    # What makes `parsed` of the answer.
    parse: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def parsed(self) -> Any:
        """The answer as what the request's constraint says it is: of a schema or json_object the JSON value, or an
        instance of the pydantic class; of anything else the text itself.

        Raises ValueError if the output was cut off before it was that, or if pydantic finds something wrong with it.
        """
        if self.constraint_outcome is ConstraintOutcome.TRUNCATED:
            raise ValueError(f"the output is cut off ({self.finish_reason.value}): {self.text[-80:]!r}")
        answer = self.text if self.content is None else self.content
        return answer if self.parse is None else self.parse(answer)


class ConstraintOutcome(enum.StrEnum):
    """Whether a completion is what its constraint asks for."""

    # It is.
    SATISFIED = "satisfied"
    # It ended before it could be: finish_reason says by what.
    TRUNCATED = "truncated"
    # It is: what was not enforced holds too.
    RELAXED_OK = "relaxed_ok"
    # What was not enforced does not hold.
    RELAXED_VIOLATED = "relaxed_violated"
    # One that a newer server knows, and this client does not.
    UNKNOWN = "unknown"


_OUTCOMES = by_number(ConstraintOutcome, pb.ConstraintOutcome, "CONSTRAINT_OUTCOME_")


def constraint_outcome_of(value: "pb.ConstraintOutcome.ValueType") -> ConstraintOutcome:
    return _OUTCOMES.get(value, ConstraintOutcome.UNKNOWN)


@dataclass(frozen=True, slots=True)
class UnenforcedKeyword:
    """A keyword of a relaxed schema that was only checked when the output was complete."""

    # JSON pointer to the subschema that has it; empty = the whole schema.
    pointer: str
    keyword: str
    # Why it cannot be enforced.
    why: str
    # Path of the schema in the request, such as "chat.tools[0].parameters_json".
    field: str = ""

    @classmethod
    def of(cls, message: pb.UnenforcedKeyword) -> Self:
        return cls(**same_fields(cls, message))


class DraftSource(enum.StrEnum):
    """Where a guess of the next tokens comes from. A text, so that a Usage can be written as JSON."""

    # Earlier in the text.
    NGRAM = "ngram"
    # What the model has said before to callers of the same API key and cache salt.
    SUFFIX = "suffix"
    # The option `prediction`.
    PREDICTION = "prediction"
    # A smaller model.
    DRAFT_MODEL = "draft_model"
    # What the constraint leaves no choice about.
    GRAMMAR = "grammar"
    # A source of a newer server, which this client does not know.
    UNKNOWN = "unknown"


_DRAFT_SOURCES = by_number(DraftSource, pb.DraftSource, "DRAFT_SOURCE_")


def draft_source_of(value: "pb.DraftSource.ValueType") -> DraftSource:
    return _DRAFT_SOURCES.get(value, DraftSource.UNKNOWN)


@dataclass(frozen=True, slots=True)
class DraftUsage:
    """What became of the guesses of one source."""

    # Guessed and checked.
    tokens: int
    # Those of them that were right.
    accepted_tokens: int


def drafts_of(usage: pb.Usage) -> dict[DraftSource, DraftUsage]:
    return {draft_source_of(each.source): DraftUsage(each.tokens, each.accepted_tokens) for each in usage.drafts}


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals over all n sequences."""

    # Length of the prompt, counted once.
    prompt_tokens: int
    # Part of prompt_tokens that was read from the prefix cache.
    cached_tokens: int
    completion_tokens: int
    # By source.
    drafts: Mapping[DraftSource, DraftUsage] = field(default_factory=dict)
    # Part of completion_tokens: those of the reasoning, if it is told apart.
    reasoning_tokens: int = 0

    @property
    def draft_tokens(self) -> int:
        """Tokens that were guessed, and checked."""
        return sum(draft.tokens for draft in self.drafts.values())

    @property
    def accepted_draft_tokens(self) -> int:
        """Those of them that were right: a part of completion_tokens."""
        return sum(draft.accepted_tokens for draft in self.drafts.values())


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went, in seconds."""

    # From arrival to first scheduled.
    queue_s: float
    # From first scheduled to first token.
    prefill_s: float
    # From first token to last.
    decode_s: float
    # How often a sequence was evicted from the KV cache and computed again.
    preemptions: int


@dataclass(frozen=True, slots=True)
class Result:
    """All that a stream said."""

    started: Started
    # By index, 0 to n - 1.
    completions: tuple[Completion, ...]
    usage: Usage
    timing: Timing
    # One for each prompt token if `prompt_logprobs` was asked for, else empty.
    prompt_logprobs: tuple[TokenLogprob, ...]
    # With `relaxed`: keywords of the schema that were only checked when the output was complete.
    unenforced: tuple[UnenforcedKeyword, ...] = ()

    @property
    def parsed(self) -> Any:
        """Of the first completion: see Completion.parsed."""
        return self.completions[0].parsed

    @property
    def text(self) -> str:
        """The first completion's text: the only one unless n was given."""
        return self.completions[0].text

    @property
    def content(self) -> str:
        """Of the first completion, without reasoning and calls of tools if these are told apart."""
        first = self.completions[0]
        return first.text if first.content is None else first.content

    @property
    def reasoning(self) -> str:
        """Of the first completion; empty if it is not told apart."""
        return self.completions[0].reasoning or ""

    @property
    def tool_calls(self) -> tuple[MadeCall, ...]:
        """Of the first completion."""
        return self.completions[0].tool_calls


@dataclass(frozen=True, slots=True)
class Model:
    """A served model, or an adapter of it."""

    name: str
    # Of an adapter: the model that it changes. Empty = it is that model.
    base_model: str
    # When it was loaded; of an adapter, when its model was.
    create_time: datetime
    # Most tokens of prompt and completion together.
    max_context_tokens: int
    # Token ids are below it.
    vocab_size: int
    # The tokens that end a completion.
    eos_token_ids: tuple[int, ...]
    # What an option that is not given takes.
    default_sampling: Sampling
    # Most tokens of a sequence that are guessed at once: what `max_draft_tokens` takes if it is not given.
    max_draft_tokens: int
    # In which ways the server guesses by itself; what a caller predicts is a guess in any case.
    draft_sources: tuple[DraftSource, ...]
    # Name of the smaller model that guesses. Empty = there is none.
    draft_model: str
    # How it writes its reasoning, such as "deepseek_r1", and calls of tools, such as "hermes". Empty = not known.
    reasoning_parser: str
    tool_call_parser: str
    # Of an adapter: the largest rank of its layers; 0 = it is no adapter, or was not read yet.
    lora_rank: int

    @classmethod
    def of(cls, message: model_pb2.Model) -> Self:
        return cls(
            **same_fields(cls, message, "create_time", "eos_token_ids", "default_sampling", "draft_sources"),
            create_time=message.create_time.ToDatetime(UTC),
            eos_token_ids=tuple(message.eos_token_ids),
            default_sampling=Sampling.of(message.default_sampling),
            draft_sources=tuple(map(draft_source_of, message.draft_sources)),
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt."""

    token_ids: tuple[int, ...]
    # The bytes of each token, aligned with token_ids.
    tokens: tuple[bytes, ...]
    # What was tokenized: of a chat, the rendered prompt.
    text: str

    @classmethod
    def of(cls, message: model_pb2.TokenizeResponse) -> Self:
        return cls(tuple(_in_slices(message.token_ids)), tuple(_in_slices(message.tokens)), message.text)


def _in_slices(values: Sequence[_Value]) -> Iterator[_Value]:
    """Of millions. In one call, to copy them would keep all other threads from running."""
    return itertools.chain.from_iterable(values[i : i + 10_000] for i in range(0, len(values), 10_000))


class KeywordTreatment(enum.Enum):
    """What becomes of a keyword of a schema."""

    # No output can break it.
    ENFORCED = "enforced"
    # It is checked when the output is complete.
    RELAXED = "relaxed"
    # It says nothing of the output.
    ANNOTATION = "annotation"
    # What a newer server does, and this client does not know.
    UNKNOWN = "unknown"


_TREATMENTS = by_number(KeywordTreatment, model_pb2.KeywordTreatment, "KEYWORD_TREATMENT_")


@dataclass(frozen=True, slots=True)
class KeywordUse:
    """One keyword at one place of a schema."""

    # JSON pointer to the subschema that has it. Empty = the whole schema.
    pointer: str
    keyword: str
    treatment: KeywordTreatment
    # Why it is relaxed. Empty for the others.
    why: str

    @classmethod
    def of(cls, message: model_pb2.KeywordUse) -> Self:
        treatment = _TREATMENTS.get(message.treatment, KeywordTreatment.UNKNOWN)
        return cls(**same_fields(cls, message, "treatment"), treatment=treatment)


@dataclass(frozen=True, slots=True)
class ConstraintCheck:
    """A constraint that can be used with the model."""

    # Every keyword of the schema is enforced, or an annotation. True for constraints that are no schema.
    enforced: bool
    # Of the schema, relaxed ones first; at most 1000.
    keywords: tuple[KeywordUse, ...]
    # How many there are.
    keyword_count: int
    # Length of the grammar that was compiled.
    grammar_bytes: int
    # Seconds that compiling took when it was done first, and the mask of the first token after that.
    compile_s: float
    first_mask_s: float

    @classmethod
    def of(cls, message: model_pb2.CheckConstraintResponse) -> Self:
        return cls(
            **same_fields(cls, message, "keywords", "compile_s", "first_mask_s"),
            keywords=tuple(map(KeywordUse.of, message.keywords)),
            compile_s=message.compile.ToTimedelta().total_seconds(),
            first_mask_s=message.first_mask.ToTimedelta().total_seconds(),
        )


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of scheduler and cache. used + cached + free blocks = total."""

    # Sequences that hold KV blocks, and that wait for their next step.
    running: int
    waiting: int
    kv_blocks_total: int
    # Referenced by running sequences.
    kv_blocks_used: int
    # Unreferenced, kept for their prefix, evictable.
    kv_blocks_cached: int
    # Tokens a block holds.
    kv_block_tokens: int
    # Cached prompt tokens / prompt tokens of the requests begun in the last minute; 0 if none.
    prefix_hit_ratio: float
    # Guessed tokens that were right / guessed tokens, over the last minute; 0 if none.
    draft_acceptance_ratio: float
    # Generated tokens a second, over the last 10 s.
    tokens_per_second: float
    # Seconds since the server was started.
    uptime_s: float
    # Times a sequence was preempted, since start.
    preemptions: int

    @classmethod
    def of(cls, message: admin_pb2.GetStatsResponse) -> Self:
        return cls(**same_fields(cls, message, "uptime_s"), uptime_s=message.uptime.ToTimedelta().total_seconds())


class AdapterResidency(enum.Enum):
    """Where an adapter's weights are."""

    # In its folder alone: they are read again when a request asks for them.
    DISK = "disk"
    # In main memory.
    HOST = "host"
    # In a slot, ready for the next step.
    ACTIVE = "active"
    # A place that a newer server knows, and this client does not.
    UNKNOWN = "unknown"


_RESIDENCIES = by_number(AdapterResidency, admin_pb2.AdapterResidency, "ADAPTER_RESIDENCY_")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was loaded."""

    name: str
    # Digest of its content, as in Started.adapter_revision.
    revision: str
    # The folder on the server that it was read from.
    path: str
    # The largest of its layers.
    rank: int
    # Of its weights in memory.
    bytes: int
    residency: AdapterResidency
    # It keeps its slot, also when nobody asks for it.
    pinned: bool
    # Sequences that run with it, and that wait.
    running: int
    waiting: int

    @classmethod
    def of(cls, message: admin_pb2.Adapter) -> Self:
        residency = _RESIDENCIES.get(message.residency, AdapterResidency.UNKNOWN)
        return cls(**same_fields(cls, message, "residency"), residency=residency)


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters that were loaded, and what they take."""

    # By name. Those in the server's folder that nobody asked for yet are not among them; `list_models` has them.
    adapters: tuple[Adapter, ...]
    # Of all weights in main memory, and the most that they may take.
    memory_bytes: int
    memory_limit_bytes: int
    # Adapters that can be computed with in one step.
    slots: int

    @classmethod
    def of(cls, message: admin_pb2.ListAdaptersResponse) -> Self:
        return cls(**same_fields(cls, message, "adapters"), adapters=tuple(map(Adapter.of, message.adapters)))
