"""What the operator is told of the last seconds: rates and ratios, summed up on the event loop."""

import time
from collections import deque
from dataclasses import dataclass

from nanoserve.request import DraftCounts
from nanoserve.step_record import SchedulerStats

# Window of Stats.tokens_per_s and of its ratios.
THROUGHPUT_WINDOW_S = 10
RATIO_WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot for the operator."""

    scheduler: SchedulerStats
    # Cached / prompt tokens of the requests begun in the last minute; 0 if none.
    prefix_hit_ratio: float
    # Guessed tokens that were right / guessed tokens, in the last minute; 0 if none.
    draft_acceptance_ratio: float
    # Generated, over the last 10 s.
    tokens_per_s: float
    uptime_s: float


class RollingSum:
    """A sum over the last `window_s` seconds, kept by the second."""

    def __init__(self, window_s: int) -> None:
        self._window_s = window_s
        # (second, sum), oldest first; of at most so many seconds as are in the window.
        self._buckets: deque[tuple[int, int]] = deque(maxlen=window_s)

    def add(self, value: int) -> None:
        """Count `value` now."""
        second = int(time.monotonic())
        if self._buckets and self._buckets[-1][0] == second:
            value += self._buckets.pop()[1]
        self._buckets.append((second, value))

    @property
    def total(self) -> int:
        start = int(time.monotonic()) - self._window_s
        return sum(value for second, value in self._buckets if second > start)


class Statistics:
    """Counts what requests are given. Event loop only."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._generated_tokens = RollingSum(THROUGHPUT_WINDOW_S)
        self._prompt_tokens = RollingSum(RATIO_WINDOW_S)
        self._cached_tokens = RollingSum(RATIO_WINDOW_S)
        self._drafted_tokens = RollingSum(RATIO_WINDOW_S)
        self._accepted_tokens = RollingSum(RATIO_WINDOW_S)

    def add_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A request begins to run."""
        self._prompt_tokens.add(num_tokens)
        self._cached_tokens.add(num_cached_tokens)

    def add_output(self, num_tokens: int, draft: DraftCounts | None) -> None:
        """Tokens were generated."""
        self._generated_tokens.add(num_tokens)
        if draft is not None:
            self._drafted_tokens.add(draft.num_drafted)
            self._accepted_tokens.add(draft.num_accepted)

    def snapshot(self, scheduler: SchedulerStats) -> Stats:
        """scheduler: its counts as of the last step."""
        num_prompt_tokens, num_drafted = self._prompt_tokens.total, self._drafted_tokens.total
        return Stats(
            scheduler=scheduler,
            prefix_hit_ratio=self._cached_tokens.total / num_prompt_tokens if num_prompt_tokens else 0.0,
            draft_acceptance_ratio=self._accepted_tokens.total / num_drafted if num_drafted else 0.0,
            tokens_per_s=self._generated_tokens.total / THROUGHPUT_WINDOW_S,
            uptime_s=time.monotonic() - self._started_s,
        )
