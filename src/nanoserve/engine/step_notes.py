"""What the scheduler notes down of a step, for those who watch: it keeps these notes only if somebody does."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nanoserve.engine.sequence import Sequence
from nanoserve.request import ScheduledSequence, SequenceOutput
from nanoserve.step_record import Preemption, Release, SchedulerStats, StepPart, StepRecord, Wait, WaitReason


@dataclass(slots=True)
class StepNotes:
    """From the end of one step to the end of the next. Engine thread only."""

    # When it was planned. None = it is not yet.
    start_s: float | None = None
    parts: list[StepPart] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    # Before the step was planned and while it was; then, after it was computed.
    early_releases: list[Release] = field(default_factory=list)
    late_releases: list[Release] = field(default_factory=list)
    wait: Wait | None = None
    num_threads: int | None = None

    def preempted(self, sequence: Sequence, beneficiary: Sequence) -> None:
        """`sequence` made place for `beneficiary`."""
        self.preemptions.append(Preemption(sequence.request.id, sequence.index, beneficiary.request.id))

    def released(self, sequence: Sequence, freed_block_ids: list[int]) -> None:
        """`sequence` gave up its blocks."""
        releases = self.early_releases if self.start_s is None else self.late_releases
        releases.append(Release(sequence.request.id, sequence.index, freed_block_ids))

    def cache_was_reset(self, freed_block_ids: list[int]) -> None:
        """These blocks, which nobody owned, were cached and are free."""
        self.early_releases.append(Release("", 0, freed_block_ids))

    def computed(
        self, sequence: Sequence, planned: ScheduledSequence, output: SequenceOutput | None, block_size: int
    ) -> None:
        """The next entry of the plan was. output: what `sequence` got of it; None = nothing."""
        num_left_of_prompt = max(0, len(sequence.request.prompt_token_ids) - planned.start)
        draft = output.draft if output else None
        self.parts.append(
            StepPart(
                sequence.request.id,
                sequence.index,
                planned.start,
                planned.num_known,
                num_prompt_tokens=min(planned.num_known, num_left_of_prompt),
                new_block_ids=planned.new_block_ids,
                num_cached_blocks=planned.start // block_size if planned.admission else 0,
                num_new_tokens=len(output.token_ids) if output else 0,
                num_drafted=draft.num_drafted if draft else 0,
                num_accepted=draft.num_accepted if draft else 0,
            )
        )

    def waits(
        self, head: Sequence, reason: WaitReason, running: Iterable[Sequence], step: Mapping[Sequence, int]
    ) -> None:
        """`head` of the queue is not in the step."""
        match reason:
            case WaitReason.BLOCKS:
                behind = max(running, key=lambda s: len(s.block_ids), default=None)
            case WaitReason.TOKENS | WaitReason.PREFIX:
                behind = max(step, key=lambda s: step[s], default=None)
            case WaitReason.ROWS | WaitReason.BATCH:
                behind = min(running, key=lambda s: s.rank, default=None)
            case WaitReason.ADAPTER:
                # If it is not just read: whoever runs in a slot, the first of them.
                with_adapter = (s for s in running if s.adapter is not None)
                is_slotless = head.adapter is not None and head.adapter.wants_slot_since_s is not None
                behind = min(with_adapter, key=lambda s: s.rank, default=None) if is_slotless else None
            case WaitReason.CONSTRAINT:
                behind = None
        self.wait = Wait(head.request.id, head.index, reason, behind.request.id if behind else "")

    def record(self, number: int, end_s: float, after: SchedulerStats, *, has_failed: bool) -> StepRecord:
        """`after`: the scheduler's counts at the end of the step."""
        return StepRecord(
            number=number,
            start_s=end_s if self.start_s is None else self.start_s,
            end_s=end_s,
            early_releases=self.early_releases,
            preemptions=self.preemptions,
            parts=self.parts,
            late_releases=self.late_releases,
            wait=self.wait,
            num_waiting=after.num_waiting,
            num_running=after.num_running,
            num_free_blocks=after.num_blocks - after.num_owned_blocks - after.num_cached_blocks,
            num_cached_blocks=after.num_cached_blocks,
            num_owned_blocks=after.num_owned_blocks,
            num_threads=self.num_threads,
            has_failed=has_failed,
            adapters=after.adapters,
        )
