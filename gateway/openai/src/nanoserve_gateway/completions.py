"""/v1/completions: one prompt or several, text or token ids. Pure."""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from nanoserve_client import Completion as Sequence_
from nanoserve_client import Delta, GenerateOptions, Result, Started, TokenLogprob
from nanoserve_client.requests import generate_request
from nanoserve_client.v1 import generation_pb2 as pb
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from nanoserve_gateway.answer import (
    Chunks,
    Prompt,
    check,
    error_frame,
    finish_reason,
    model_of,
    naming,
    new_id,
    now,
    options,
    prompt_logprobs_of,
    stop_reason,
    stream_rules,
    tokenize_options,
    unchecked,
    usage_of,
)
from nanoserve_gateway.constraints import Constraint, outcome_of
from nanoserve_gateway.errors import Problem

MAX_PROMPTS = 128


class CompletionAnswer:
    """The answer to one completion request: an Answer. Choices are numbered through: n for each prompt, in order."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as COMPLETIONS.parse returns them. Raises BadRequest."""
        given, constraint = prompts_of(fields["prompt"]), Constraint(fields)
        check(
            *stream_rules(fields),
            *constraint.rules,
            (len(given) > MAX_PROMPTS, "prompt", f"has {len(given)} prompts; at most {MAX_PROMPTS}"),
        )
        self.is_streamed = bool(fields.get("stream"))
        self._echo = bool(fields.get("echo"))
        self._logprobs: int | None = fields.get("logprobs")
        self._prompt_logprobs: int | None = fields.get("prompt_logprobs")
        self._name = naming(fields, _name_of)
        self._has_token_ids = bool(fields.get("return_token_ids"))
        self.prompts = [
            Prompt(each, tokenize_options(fields), self._has_token_ids, None if isinstance(each, str) else each)
            for each in given
        ]
        chosen: GenerateOptions = {**options(fields), **constraint.options}
        chosen["logprobs"] = self._logprobs
        self.requests = [self._request(prompt, chosen) for prompt in self.prompts]
        self.names: Mapping[str, str] = {
            **constraint.names,
            "output.logprobs": "logprobs",
            "output.prompt_logprobs": "logprobs" if self._prompt_logprobs is None else "prompt_logprobs",
        }
        self._n = fields.get("n", 1)
        self._id, self._created = new_id("cmpl-"), now()
        self._chunks = Chunks("text_completion", self._id, self._created, fields, has_outcomes=bool(constraint))
        self._scribes: dict[int, _Scribe] = {}
        # Numbers of the prompts that are still to be echoed.
        self._unsaid = set(range(len(given))) if self._echo else set()

    def _request(self, prompt: Prompt, chosen: GenerateOptions) -> pb.GenerateRequest:
        wanted = [count for count in (self._prompt_logprobs, self._echoed(prompt)) if count is not None]
        given = cast(str | Sequence[int], prompt.given)
        return generate_request(given, {**chosen, "prompt_logprobs": max(wanted, default=None)})

    def _echoed(self, prompt: Prompt) -> int | None:
        """With how many alternatives the service has to tell the prompt's tokens so that they can be echoed; None if it
        need not."""
        is_told = self._echo and (self._logprobs is not None or not isinstance(prompt.given, str))
        return (self._logprobs or 0) if is_told else None

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        """A chunk for each choice whose prompt has something to tell already."""
        self._chunks.begin(starts)
        for number, prompt in enumerate(self.prompts):
            is_echoed = self._echo and self._echoed(prompt) is None
            fields: dict[str, Any] = {"text": prompt.given if is_echoed else "", "logprobs": None}
            if self._has_token_ids:
                fields |= {"token_ids": (), "prompt_token_ids": prompt.token_ids}
            if is_echoed:
                self._unsaid.discard(number)
            if is_echoed or self._has_token_ids:
                yield from self._for_each_choice(number, fields)

    def delta(self, prompt: int, delta: Delta) -> Iterator[bytes]:
        """A chunk with what is new, unless it is tokens whose text is still to come and that are not told themselves;
        and one with the end, because many clients read no text there."""
        if prompt in self._unsaid:
            self._unsaid.discard(prompt)
            yield from self._late_echo(prompt)
        self._chunks.count(delta)
        index = prompt * self._n + delta.index
        told: dict[str, Any] = {"token_ids": delta.token_ids} if self._has_token_ids else {}
        logprobs = self._scribe(index).write(delta.logprobs) if self._logprobs is not None and delta.logprobs else None
        if delta.text or logprobs or told.get("token_ids"):
            new = {"text": delta.text, "logprobs": logprobs, "finish_reason": None}
            yield self._chunks.chunk({"index": index, **new, **told})
        if delta.finish_reason is not None:
            end = {"finish_reason": finish_reason(delta.finish_reason), "stop_reason": stop_reason(delta)}
            told = {"token_ids": ()} if self._has_token_ids else {}
            last = {"index": index, "text": "", "logprobs": None, **end, **told}
            yield from self._chunks.last(prompt, delta.index, last)

    def _late_echo(self, number: int) -> Iterator[bytes]:
        """Of a prompt that the service told of when it had computed it."""
        tokens = self.prompts[number].logprobs
        fields: dict[str, Any] = {"text": self._prompt_text(number, tokens), "logprobs": None}
        if self._has_token_ids:
            fields["token_ids"] = ()
        for choice in range(self._n):
            if self._logprobs is not None:
                fields["logprobs"] = self._scribe(number * self._n + choice).write(tokens)
        yield from self._for_each_choice(number, fields)

    def _for_each_choice(self, number: int, fields: Mapping[str, Any]) -> Iterator[bytes]:
        """The same chunk for each choice of a prompt."""
        for index in range(number * self._n, (number + 1) * self._n):
            yield self._chunks.chunk({"index": index, "finish_reason": None, **fields})

    def _scribe(self, index: int) -> "_Scribe":
        return self._scribes.setdefault(index, _Scribe(self._logprobs or 0, self._name))

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
            model=model_of(results[0].started),
            choices=choices,
            usage=usage_of(results),
        )

    def _choice(self, prompt: int, result: Result, sequence: Sequence_) -> CompletionChoice:
        text, tokens = sequence.text, sequence.logprobs
        if self._echo:
            text = self._prompt_text(prompt, result.prompt_logprobs) + text
            tokens = result.prompt_logprobs + tokens
        logprobs = None if self._logprobs is None else _Scribe(self._logprobs, self._name).write(tokens)
        extra = outcome_of(result, sequence.index)
        if self._has_token_ids:
            extra |= {"token_ids": sequence.token_ids, "prompt_token_ids": self.prompts[prompt].token_ids}
        if self._prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs_of(result.prompt_logprobs, self._prompt_logprobs)
        return unchecked(
            CompletionChoice,
            index=prompt * self._n + sequence.index,
            text=text,
            finish_reason=finish_reason(sequence.finish_reason),
            stop_reason=stop_reason(sequence),
            logprobs=logprobs,
            **extra,
        )

    def _prompt_text(self, number: int, tokens: Sequence[TokenLogprob]) -> str:
        given = self.prompts[number].given
        if isinstance(given, str):
            return given
        return b"".join(token.token for token in tokens).decode("utf-8", "replace")


class _Scribe:
    """Writes the log-probabilities of one choice, and knows where in its text each token begins."""

    def __init__(self, count: int, name: Callable[[TokenLogprob], str]) -> None:
        """count: of alternatives. name: what a token is called."""
        # A token may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._count, self._name = count, name

    def write(self, tokens: Sequence[TokenLogprob]) -> Logprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return unchecked(
            Logprobs,
            tokens=[self._name(token) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The alternatives by name, and the token itself, as OpenAI has it: up to one more than were asked for. Of two
        tokens with one name the likelier stays. None for the prompt's first token, which nothing predicts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for each in (*token.top[: self._count], token):
            name, logprob = self._name(each), each.logprob or 0.0
            top[name] = max(logprob, top.get(name, logprob))
        return top


def _name_of(token: TokenLogprob) -> str:
    """As OpenAI's completions name tokens that are no text by themselves, so that they can be told apart."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + token.token.decode("utf-8", "backslashreplace")


def prompts_of(prompt: str | list[Any]) -> Sequence[str | list[int]]:
    """The prompts, one by one. An empty list is one empty prompt, which the server refuses."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return prompt
