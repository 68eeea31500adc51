"""Times what a guess out of a text costs: microseconds a token, of one caller with a long text.

    python benchmarks/lookup.py [--context N] [--tokens N]

Each drafter follows a text of N tokens, indexed before, and then token by token one that repeats passages of it: it
takes in the token, and proposes sixteen. Medians of all tokens; the engine does this once a step and sequence.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator

from nanoserve.speculation.drafter import Drafter
from nanoserve.speculation.ngram import NgramDrafter
from nanoserve.speculation.prediction import PredictionDrafter
from nanoserve.speculation.suffix import SuffixCounts, SuffixDrafter

NUM_GUESSES = 16
VOCAB_SIZE = 50_000


def passages(text: list[int], chance: random.Random) -> Iterator[int]:
    """Endless: parts of the text, with a token of their own in between."""
    while True:
        start = chance.randrange(len(text))
        yield from text[start : start + chance.randrange(5, 60)]
        yield chance.randrange(VOCAB_SIZE)


def suffix_drafter(text: list[int]) -> Drafter:
    """The text is what the model has said before to the same caller."""
    counts = SuffixCounts()
    SuffixDrafter(counts, "caller", []).extend(text)
    return SuffixDrafter(counts, "caller", text)


DRAFTERS: dict[str, Callable[[list[int]], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": suffix_drafter,
    "prediction": PredictionDrafter,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=5_000)
    arguments = parser.parse_args()
    chance = random.Random(0)
    text = [chance.randrange(VOCAB_SIZE) for _ in range(arguments.context)]
    for name, make in DRAFTERS.items():
        drafter = make(text)
        for _ in range(arguments.context // 1000):  # long texts are indexed a part at a time
            drafter.extend([])
        took_s, num_guesses = [], 0
        for token_id, _ in zip(passages(text, chance), range(arguments.tokens), strict=False):
            start_s = time.perf_counter()
            drafter.extend([token_id])
            draft = drafter.propose(NUM_GUESSES)
            took_s.append(time.perf_counter() - start_s)
            num_guesses += draft is not None
        share = num_guesses / arguments.tokens
        print(f"{name:12}{1e6 * statistics.median(took_s):6.1f} us a token, a draft at {share:.0%} of them")


if __name__ == "__main__":
    main()
