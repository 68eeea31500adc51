"""/v1/chat/completions. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import Completion, Delta, Result, Started, TokenLogprob
from nanoserve_client.requests import Messages, chat_prompt, generate_request
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from nanoserve_gateway.answer import (
    DONE,
    check,
    error_frame,
    finish_reason,
    frame,
    includes_usage,
    new_id,
    now,
    options,
    stream_rules,
    text_of,
    usage_of,
)
from nanoserve_gateway.errors import Problem


class ChatAnswer:
    """The answer to one chat completion request: an Answer."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as CHAT.parse returns them. Raises BadRequest."""
        limit, other = fields.get("max_tokens"), fields.get("max_completion_tokens")
        check(
            stream_rules(fields),
            (None not in (limit, other) and limit != other, "max_tokens", "differs from max_completion_tokens"),
            ("top_logprobs" in fields and not fields.get("logprobs"), "top_logprobs", "is for logprobs only"),
        )
        chosen = options(fields)
        if other is not None:
            chosen["max_tokens"] = other
        if fields.get("logprobs"):
            chosen["logprobs"] = fields.get("top_logprobs", 0)
        prompt = chat_prompt(messages_of(fields["messages"]), (), None, False)
        self.requests = [generate_request(prompt, chosen)]
        self.is_streamed = bool(fields.get("stream"))
        self.names = {
            "output.logprobs": "top_logprobs",
            "stopping.max_tokens": "max_tokens" if other is None else "max_completion_tokens",
        }
        self._has_logprobs = bool(fields.get("logprobs"))
        self._has_token_ids = bool(fields.get("return_token_ids"))
        self._has_usage = includes_usage(fields)
        self._metadata = fields.get("metadata")
        self._id, self._created, self._model = new_id("chatcmpl-"), now(), fields["model"]

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._model = starts[0].model
        for index in range(self.requests[0].n or 1):
            yield self._chunk(ChunkChoice(index=index, delta=ChoiceDelta(role="assistant", content="")))

    def delta(self, _prompt: int, delta: Delta) -> Iterator[bytes]:
        """One chunk; none for tokens whose text is still to come, unless they are told themselves."""
        fields: dict[str, Any] = {}
        if self._has_logprobs and delta.logprobs:
            fields["logprobs"] = ChunkLogprobs(content=[logprob_of(token) for token in delta.logprobs])
        if self._has_token_ids:
            fields["token_ids"] = delta.token_ids
        if delta.finish_reason is not None:
            fields["finish_reason"] = finish_reason(delta.finish_reason)
        if delta.text or fields:
            content = ChoiceDelta(content=delta.text) if delta.text else ChoiceDelta()
            yield self._chunk(ChunkChoice(index=delta.index, delta=content, **fields))

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        if self._has_usage:
            yield self._chunk(usage=usage_of(results))
        yield DONE

    def fail(self, problem: Problem) -> Iterator[bytes]:
        yield error_frame(problem)

    def whole(self, results: Sequence[Result]) -> ChatCompletion:
        labels = {} if self._metadata is None else {"metadata": self._metadata}
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=results[0].started.model,
            choices=[self._choice(completion) for completion in results[0].completions],
            usage=usage_of(results),
            **labels,
        )

    def _choice(self, completion: Completion) -> Choice:
        tokens = [logprob_of(token) for token in completion.logprobs]
        extra: dict[str, Any] = {"token_ids": completion.token_ids} if self._has_token_ids else {}
        return Choice(
            index=completion.index,
            finish_reason=finish_reason(completion.finish_reason),  # type: ignore[arg-type]
            message=ChatCompletionMessage(role="assistant", content=completion.text, refusal=None),
            logprobs=ChoiceLogprobs(content=tokens) if self._has_logprobs else None,
            **extra,
        )

    def _chunk(self, *choices: ChunkChoice, **fields: Any) -> bytes:
        if self._has_usage:
            fields.setdefault("usage", None)
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
            **fields,
        )
        return frame(chunk)


def messages_of(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Checked messages of the API as the client takes them."""
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    taken = {key: message[key] for key in ("role", "name", "tool_call_id") if message.get(key) is not None}
    taken["content"] = content_text(message.get("content"))
    calls = message.get("tool_calls") or ()
    taken["tool_calls"] = [{"id": call["id"], **call["function"]} for call in calls]
    return taken


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str | None:
    """The text of a message; parts are joined as they are."""
    return content if isinstance(content, str) or content is None else "".join(part["text"] for part in content)


def logprob_of(token: TokenLogprob) -> ChatCompletionTokenLogprob:
    top = [TopLogprob(token=text_of(t), bytes=list(t.token), logprob=t.logprob or 0.0) for t in token.top]
    return ChatCompletionTokenLogprob(
        token=text_of(token), bytes=list(token.token), logprob=token.logprob or 0.0, top_logprobs=top
    )
