"""The scheduler's account of one completion, which its notes read too."""

from dataclasses import dataclass, field

from nanoserve.request import Grammar, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n completions. Only the scheduler changes it."""

    request: Request
    index: int
    # Order of service, the smallest first: priority, then arrival, then index.
    rank: tuple[int, int, int]
    # Prompt, then completion.
    token_ids: list[int]
    # Tokens behind these that planned steps draw, and whose names are not known yet.
    num_unknown_tokens: int = 0
    # Keys and values of so many tokens are in the blocks of block_ids, once the planned steps are computed.
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    # Of these blocks, those that the model side knows of; 0 = it does not know yet that the row is this sequence's.
    num_told_blocks: int = 0
    # Of the full blocks, as far as they were needed.
    block_hashes: list[bytes] = field(default_factory=list)
    # The place on the model side; None = not running.
    row: int | None = None
    # The start of its request was reported.
    has_started: bool = False
    num_preemptions: int = 0
    # Places that the model side would fill with guesses.
    num_drafts: int = 0
    # What its completion must be; None = anything, or it is still compiled.
    grammar: Grammar | None = None
    # Tokens that the completion had when its grammar was worn; -1 = it never was.
    num_worn_tokens: int = -1
    # The completion so far satisfies its constraint.
    satisfies: bool = False
    # Of the prompt's tokens, the first included, which has none.
    num_prompt_logprobs: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_completion_tokens(self) -> int:
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def gap(self) -> int:
        """Tokens to compute. Not above 0 while drafts are computed: how many were right is not known."""
        return self.num_tokens - self.num_computed_tokens
