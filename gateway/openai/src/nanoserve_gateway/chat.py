"""/v1/chat/completions. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import Completion, Delta, Result, Started, TokenLogprob
from nanoserve_client.requests import Messages, chat_prompt, generate_request
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

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
        self._metadata = fields.get("metadata")
        self._id, self._created = new_id("chatcmpl-"), now()
        self._chunks = Chunks("chat.completion.chunk", self._id, self._created, fields)

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._chunks.begin(starts[0])
        for index in range(self.requests[0].n or 1):
            yield self._chunks.chunk(
                {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            )

    def delta(self, _prompt: int, delta: Delta) -> Iterator[bytes]:
        """One chunk; none for tokens whose text is still to come, unless they are told themselves."""
        fields: dict[str, Any] = {}
        if self._has_logprobs and delta.logprobs:
            fields["logprobs"] = {"content": [logprob_of(token) for token in delta.logprobs], "refusal": None}
        if self._has_token_ids:
            fields["token_ids"] = delta.token_ids
        reason = None if delta.finish_reason is None else finish_reason(delta.finish_reason)
        if delta.text or reason or fields:
            content = {"content": delta.text} if delta.text else {}
            yield self._chunks.chunk({"index": delta.index, "delta": content, "finish_reason": reason, **fields})

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        return self._chunks.end(results)

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
