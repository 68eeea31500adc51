"""What a step did, for those who watch: plain picklable data, made only if somebody does."""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple


class StepPart(NamedTuple):
    """The part of one sequence that a step computed. A tuple, because a step has many."""

    request_id: str
    # Of the sequence among the request's n.
    sequence_index: int
    # num_computed_tokens before the step.
    start: int
    # Known tokens; guesses are not among them.
    num_tokens: int
    # How many of them are of the prompt; the rest was generated.
    num_prompt_tokens: int
    # Appended to its block table; the whole table in its first step, and in the first after a preemption.
    new_block_ids: list[int]
    # How many of those were found in the cache.
    num_cached_blocks: int
    # Tokens that the step gave it: those that were guessed right, and mostly one behind them.
    num_new_tokens: int
    # Tokens that were guessed, and those of them that are among the new ones.
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Preemption:
    """A running sequence lost its row and blocks, and waits again."""

    request_id: str
    index: int
    # Whose turn it was. The sequence itself, if no other was left to yield.
    for_request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """A sequence gave its blocks back: it ended, was aborted or preempted; or the cache was reset."""

    # Empty = the cache was reset: the blocks were nobody's.
    request_id: str
    index: int
    # Those that hold nothing of use any more; its others are kept for their prefix, or owned by another sequence.
    freed_block_ids: list[int]


class WaitReason(enum.Enum):
    """Why the head of the queue did not run in a step."""

    BLOCKS = "blocks"  # too few KV blocks are free
    ROWS = "rows"  # max_num_seqs sequences run
    TOKENS = "tokens"  # the step's token budget was spent
    PREFIX = "prefix"  # another sequence of the step computes what its prompt begins with
    BATCH = "batch"  # static batching: the batch has begun
    CONSTRAINT = "constraint"  # its constraint is compiled
    ADAPTER = "adapter"  # its adapter is read, or waits for a slot


@dataclass(frozen=True, slots=True)
class Wait:
    """The head of the queue, and what it waits for."""

    request_id: str
    index: int
    reason: WaitReason
    # The running request that has most of it: of blocks, or of the step's tokens; for a row or the batch, the one that
    # is served first. Empty if none runs.
    behind_request_id: str


class AdapterUse(NamedTuple):
    """Sequences that are computed with an adapter."""

    name: str
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class AdapterCounts:
    """What adapters are used for, and what they cost."""

    # Those that have sequences; one that was replaced may be there twice.
    uses: tuple[AdapterUse, ...]
    # Since the start: how often weights were read, and how often a slot was taken from an adapter for another.
    num_loads: int
    num_evictions: int
    # Adapters that can be computed with in one step.
    num_slots: int


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """The scheduler's counts between two steps."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_owned_blocks: int
    num_cached_blocks: int
    block_size: int
    num_preemptions: int
    # None = no adapters are served.
    adapters: AdapterCounts | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for those who watch. Without parts: something was aborted, and no step followed."""

    # Counts from 1, since the start.
    number: int
    # time.monotonic(), the same clock for all processes of a machine.
    start_s: float
    end_s: float
    # Since the record before, until the parts had their blocks; those of the preempted too.
    early_releases: list[Release]
    preemptions: list[Preemption]
    # In the order of the plan.
    parts: list[StepPart]
    # When the tokens had come.
    late_releases: list[Release]
    # None = nobody waits.
    wait: Wait | None
    # After the step.
    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_cached_blocks: int
    num_owned_blocks: int
    # CPU threads that computed it: fewer while others want the CPUs. None = another device did, or nothing was.
    num_threads: int | None
    # The step raised: its requests were given up.
    has_failed: bool
    # After the step. None = no adapters are served.
    adapters: AdapterCounts | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes its parts travel as columns, in a third of the time."""
        others = {name: getattr(self, name) for name in self.__slots__ if name != "parts"}
        return _from_columns, (list(zip(*self.parts, strict=True)), others)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts that were computed."""
        return sum(part.num_prompt_tokens for part in self.parts)

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens that were computed, to go on from them."""
        return sum(part.num_tokens - part.num_prompt_tokens for part in self.parts)


def _from_columns(columns: list[tuple[Any, ...]], others: dict[str, Any]) -> StepRecord:
    return StepRecord(parts=[*map(StepPart._make, zip(*columns, strict=True))], **others)
