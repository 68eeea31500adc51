"""What a benchmark asks for: how many requests, how long their prompts are, and how many tokens each wants.

Prompts are random token ids, so no tokenizer has a say in their length. They depend on the workload's text and the
model's vocabulary alone: every run, and every engine that follows the same rule, gets the same work.
"""

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from nanoserve.config import ConfigError

# Prompt tokens are drawn from here, or up to the vocabulary's end: low ids are often special.
FIRST_TOKEN_ID, END_TOKEN_ID = 10, 8000

# ShareGPT's conversations, in tokens. The means are those of figure 11 in "Efficient Memory Management for Large
# Language Model Serving with PagedAttention" (Kwon et al., SOSP 2023).
SHAREGPT_MEAN_IN, SHAREGPT_MEAN_OUT = 161.31, 337.99
# The paper shows the spread as a picture only: many short, a few very long. This one is our choice: of log-normal
# lengths with it, one in two is below 0.6 times the mean, and one in a thousand above 13 times.
SHAREGPT_SIGMA = 1.0
# A pair of lengths beyond these is drawn again, as serving benchmarks commonly drop such conversations.
SHAREGPT_SHORTEST, SHAREGPT_LONGEST_IN, SHAREGPT_LONGEST = 4, 1024, 2048


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A request to send; its completion ends at `num_out` tokens and not before."""

    prompt: list[int]
    num_out: int


@dataclass(frozen=True, slots=True)
class FixedWorkload:
    """N:IN:OUT[:SHARED]: N requests of IN prompt tokens, the first SHARED of them the same in all, and OUT new ones."""

    text: str
    num_requests: int
    num_in: int
    num_out: int
    num_shared: int = 0

    @classmethod
    def parse(cls, text: str) -> "FixedWorkload":
        """Raises ArgumentTypeError."""
        parts = text.split(":")
        if len(parts) not in (3, 4) or not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no workload; write N:IN:OUT or N:IN:OUT:SHARED, as in 8:128:64"
            )
        workload = cls(text, *map(int, parts))
        if 0 in (workload.num_requests, workload.num_in, workload.num_out):
            raise argparse.ArgumentTypeError(
                f"{text!r} asks for nothing; requests, prompt and new tokens are at least 1"
            )
        if workload.num_shared > workload.num_in:
            raise argparse.ArgumentTypeError(f"{text!r} shares more tokens than a prompt has")
        return workload

    def requests(self, vocab_size: int, max_context_tokens: int) -> list[BenchRequest]:
        """Raises ConfigError if such a model cannot run them."""
        if self.num_in + self.num_out > max_context_tokens:
            raise ConfigError(
                f"{self.text} needs a context of {self.num_in + self.num_out} tokens; "
                f"the model has one of {max_context_tokens}"
            )
        rng = random.Random(self.num_requests * 1000 + self.num_in)
        shared = random_tokens(rng, self.num_shared, vocab_size)
        own = self.num_in - self.num_shared
        return [
            BenchRequest(shared + random_tokens(rng, own, vocab_size), self.num_out) for _ in range(self.num_requests)
        ]


WARM_UP = FixedWorkload.parse("2:16:4")


@dataclass(frozen=True, slots=True)
class ShareGPTWorkload:
    """sharegpt:N: N requests of lengths like those of people's conversations with ChatGPT.

    Both lengths are log-normal and independent. Without what is drawn again, their means are about 150 and 300 tokens.
    """

    text: str
    num_requests: int

    def requests(self, vocab_size: int, max_context_tokens: int) -> list[BenchRequest]:
        """Lengths that the model's context cannot hold are drawn again too."""
        longest = min(SHAREGPT_LONGEST, max_context_tokens)
        if longest < 2 * SHAREGPT_SHORTEST:
            raise ConfigError(f"{self.text} needs a context of {2 * SHAREGPT_SHORTEST} tokens or more")
        rng = random.Random(self.num_requests)
        lengths = _sharegpt_lengths(rng, longest)
        drawn = [next(lengths) for _ in range(self.num_requests)]
        return [BenchRequest(random_tokens(rng, num_in, vocab_size), num_out) for num_in, num_out in drawn]


Workload = FixedWorkload | ShareGPTWorkload


def _sharegpt_lengths(rng: random.Random, longest: int) -> Iterator[tuple[int, int]]:
    """Prompt and new tokens of one conversation after the other; `longest` holds for both together."""
    # The mean of a log-normal is exp(mu + sigma² / 2).
    mu_in, mu_out = (math.log(mean) - SHAREGPT_SIGMA**2 / 2 for mean in (SHAREGPT_MEAN_IN, SHAREGPT_MEAN_OUT))
    while True:
        num_in = round(rng.lognormvariate(mu_in, SHAREGPT_SIGMA))
        num_out = round(rng.lognormvariate(mu_out, SHAREGPT_SIGMA))
        if min(num_in, num_out) >= SHAREGPT_SHORTEST and num_in <= SHAREGPT_LONGEST_IN and num_in + num_out <= longest:
            yield num_in, num_out


def parse_workload(text: str) -> Workload:
    """Raises ArgumentTypeError."""
    name, _, count = text.partition(":")
    if name != "sharegpt":
        return FixedWorkload.parse(text)
    if not count.isdecimal() or int(count) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no workload; write sharegpt:N, as in sharegpt:100")
    return ShareGPTWorkload(text, int(count))


def random_tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Raises ConfigError for a vocabulary that has none to draw."""
    if vocab_size <= FIRST_TOKEN_ID:
        raise ConfigError(f"prompts are drawn from token {FIRST_TOKEN_ID} on; the model's vocabulary has {vocab_size}")
    return [rng.randrange(FIRST_TOKEN_ID, min(END_TOKEN_ID, vocab_size)) for _ in range(count)]
