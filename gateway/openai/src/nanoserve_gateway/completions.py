"""/v1/completions: one prompt or several, text or token ids. Pure."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import Completion as Sequence_
from nanoserve_client import Delta, Result, Started, TokenLogprob
from nanoserve_client.requests import generate_request
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from nanoserve_gateway.answer import (
    Chunks,
    check,
    error_frame,
    finish_reason,
    new_id,
    now,
    options,
    stream_rules,
    text_of,
    unchecked,
    usage_of,
)
from nanoserve_gateway.errors import Problem

MAX_PROMPTS = 128


class CompletionAnswer:
    """The answer to one completion request: an Answer. Choices are numbered through: n for each prompt, in order."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as COMPLETIONS.parse returns them. Raises BadRequest."""
        self._prompts = prompts_of(fields["prompt"])
        self._echo = bool(fields.get("echo"))
        self._has_logprobs = "logprobs" in fields
        self.is_streamed = bool(fields.get("stream"))
        # Then the prompt comes back as tokens, which the server tells of when it has computed them.
        is_echo_told = self._echo and (self._has_logprobs or not isinstance(self._prompts[0], str))
        check(
            stream_rules(fields),
            (len(self._prompts) > MAX_PROMPTS, "prompt", f"has {len(self._prompts)} prompts; at most {MAX_PROMPTS}"),
            (is_echo_told and self.is_streamed, "echo", "of token ids, or with logprobs, is not streamed"),
        )
        chosen = options(fields)
        if self._has_logprobs:
            chosen["logprobs"] = fields["logprobs"]
        if is_echo_told:
            chosen["prompt_logprobs"] = fields.get("logprobs", 0)
        self.requests = [generate_request(prompt, chosen) for prompt in self._prompts]
        self.names: Mapping[str, str] = {"output.logprobs": "logprobs"}
        self._n = fields.get("n", 1)
        self._has_token_ids = bool(fields.get("return_token_ids"))
        self._id, self._created = new_id("cmpl-"), now()
        self._chunks = Chunks("text_completion", self._id, self._created, fields)
        self._scribes: dict[tuple[int, int], _Scribe] = {}

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._chunks.begin(starts[0])
        for number, prompt in enumerate(self._prompts if self._echo else ()):
            for index in range(self._n):
                place = number * self._n + index
                yield self._chunks.chunk({"index": place, "text": prompt, "logprobs": None, "finish_reason": None})

    def delta(self, prompt: int, delta: Delta) -> Iterator[bytes]:
        """One chunk; none for tokens whose text is still to come, unless they are told themselves."""
        fields: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        if self._has_logprobs and delta.logprobs:
            scribe = self._scribes.setdefault((prompt, delta.index), _Scribe())
            fields["logprobs"] = scribe.write(delta.logprobs)
        if self._has_token_ids:
            fields["token_ids"] = delta.token_ids
        if delta.finish_reason is not None:
            fields["finish_reason"] = finish_reason(delta.finish_reason)
        if delta.text or any(value is not None for value in fields.values()):
            index = prompt * self._n + delta.index
            yield self._chunks.chunk({"index": index, "text": delta.text, **fields})

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        return self._chunks.end(results)

    def fail(self, problem: Problem) -> Iterator[bytes]:
        yield error_frame(problem)

    def whole(self, results: Sequence[Result]) -> Completion:
        choices = [
            self._choice(prompt, result, sequence)
            for prompt, result in enumerate(results)
            for sequence in result.completions
        ]
        return unchecked(
            Completion,
            id=self._id,
            object="text_completion",
            created=self._created,
            model=results[0].started.model,
            choices=choices,
            usage=usage_of(results),
        )

    def _choice(self, prompt: int, result: Result, sequence: Sequence_) -> CompletionChoice:
        text, tokens = sequence.text, sequence.logprobs
        if self._echo:
            text = self._prompt_text(prompt, result) + text
            tokens = result.prompt_logprobs + tokens
        extra: dict[str, Any] = {"token_ids": sequence.token_ids} if self._has_token_ids else {}
        return unchecked(
            CompletionChoice,
            index=prompt * self._n + sequence.index,
            text=text,
            finish_reason=finish_reason(sequence.finish_reason),
            logprobs=_Scribe().write(tokens) if self._has_logprobs else None,
            **extra,
        )

    def _prompt_text(self, prompt: int, result: Result) -> str:
        given = self._prompts[prompt]
        if isinstance(given, str):
            return given
        return b"".join(token.token for token in result.prompt_logprobs).decode("utf-8", "replace")


class _Scribe:
    """Writes the log-probabilities of one choice, and knows where in its text each token begins."""

    def __init__(self) -> None:
        # A token may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, tokens: Sequence[TokenLogprob]) -> Logprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return unchecked(
            Logprobs,
            tokens=[text_of(token) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_alternatives(token) for token in tokens],
            text_offset=offsets,
        )


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """By text. None for the prompt's first token, which nothing predicts."""
    return None if token.logprob is None else {text_of(other): other.logprob or 0.0 for other in token.top}


def prompts_of(prompt: str | list[Any]) -> Sequence[str | list[int]]:
    """The prompts, one by one. An empty list is one empty prompt, which the server refuses."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]
