"""/v1/chat/completions. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import Completion, Delta, GenerateOptions, Result, Started, TokenLogprob
from nanoserve_client.requests import Messages, chat_prompt, generate_request
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from nanoserve_gateway.answer import (
    Chunks,
    Prompt,
    chat_options,
    check,
    error_frame,
    finish_reason,
    naming,
    new_id,
    now,
    options,
    prompt_logprobs_of,
    stop_reason,
    stream_rules,
    text_of,
    tokenize_options,
    usage_of,
)
from nanoserve_gateway.constraints import Constraint, outcome_of
from nanoserve_gateway.errors import Problem


class ChatAnswer:
    """The answer to one chat completion request: an Answer."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as CHAT.parse returns them. Raises BadRequest."""
        limit, other = fields.get("max_tokens"), fields.get("max_completion_tokens")
        constraint = Constraint(fields)
        check(
            *stream_rules(fields),
            *constraint.rules,
            (None not in (limit, other) and limit != other, "max_tokens", "differs from max_completion_tokens"),
            (bool(fields.get("top_logprobs")) and not fields.get("logprobs"), "top_logprobs", "is for logprobs only"),
        )
        chosen: GenerateOptions = {**options(fields), **constraint.options}
        if other is not None:
            chosen["max_tokens"] = other
        if fields.get("logprobs"):
            chosen["logprobs"] = fields.get("top_logprobs", 0)
        if (prediction := fields.get("prediction")) is not None:
            content = prediction["content"]
            chosen["prediction"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
        messages, template = messages_of(fields["messages"]), chat_options(fields)
        self.requests = [generate_request(chat_prompt(messages, template), chosen)]
        self._has_token_ids = bool(fields.get("return_token_ids"))
        self.prompts = [Prompt(messages, tokenize_options(fields), self._has_token_ids)]
        self.is_streamed = bool(fields.get("stream"))
        self.names = {
            **constraint.names,
            "output.logprobs": "top_logprobs",
            "output.prompt_logprobs": "prompt_logprobs",
            "stopping.max_tokens": "max_tokens" if other is None else "max_completion_tokens",
            "prompt": "messages",
            "predicted_text": "prediction",
        }
        self._name = naming(fields, text_of)
        self._has_logprobs = bool(fields.get("logprobs"))
        self._prompt_logprobs: int | None = fields.get("prompt_logprobs")
        self._metadata = fields.get("metadata")
        self._id, self._created = new_id("chatcmpl-"), now()
        kind = "chat.completion.chunk"
        self._chunks = Chunks(kind, self._id, self._created, fields, has_outcomes=bool(constraint))

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._chunks.begin(starts)
        told = self._prompt_token_ids()
        for index in range(self.requests[0].n or 1):
            delta = {"role": "assistant", "content": ""}
            yield self._chunks.chunk({"index": index, "delta": delta, "finish_reason": None}, told)

    def delta(self, prompt: int, delta: Delta) -> Iterator[bytes]:
        """A chunk with what is new, unless it is tokens whose text is still to come and that are not told themselves;
        and one with the end, because many clients read no text there."""
        self._chunks.count(delta)
        told: dict[str, Any] = {}
        if self._has_logprobs and delta.logprobs:
            tokens = [logprob_of(token, self._name) for token in delta.logprobs]
            told["logprobs"] = {"content": tokens, "refusal": None}
        if self._has_token_ids and delta.token_ids:
            told["token_ids"] = delta.token_ids
        if delta.text or told:
            content = {"content": delta.text}
            yield self._chunks.chunk({"index": delta.index, "delta": content, "finish_reason": None, **told})
        if delta.finish_reason is not None:
            end = {"finish_reason": finish_reason(delta.finish_reason), "stop_reason": stop_reason(delta)}
            told = {"token_ids": ()} if self._has_token_ids else {}
            yield from self._chunks.last(prompt, delta.index, {"index": delta.index, "delta": {}, **end, **told})

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        return self._chunks.end(results)

    def fail(self, problem: Problem) -> Iterator[bytes]:
        yield error_frame(problem)

    def whole(self, results: Sequence[Result]) -> ChatCompletion:
        [result] = results
        extra = self._prompt_token_ids()
        if self._metadata is not None:
            extra["metadata"] = self._metadata
        if self._prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs_of(result.prompt_logprobs, self._prompt_logprobs)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=result.started.model,
            choices=[self._choice(completion, result) for completion in result.completions],
            usage=usage_of(results),
            **extra,
        )

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompts[0].token_ids} if self._has_token_ids else {}

    def _choice(self, completion: Completion, result: Result) -> Choice:
        tokens = [logprob_of(token, self._name) for token in completion.logprobs]
        extra = outcome_of(result, completion.index)
        if self._has_token_ids:
            extra["token_ids"] = completion.token_ids
        return Choice(
            index=completion.index,
            finish_reason=finish_reason(completion.finish_reason),  # type: ignore[arg-type]
            message=ChatCompletionMessage(role="assistant", content=completion.text, refusal=None),
            logprobs=ChoiceLogprobs(content=tokens, refusal=None) if self._has_logprobs else None,
            stop_reason=stop_reason(completion),  # type: ignore[call-arg]
            **extra,
        )


def messages_of(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Checked messages of the API as the client takes them."""
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    taken = {key: message[key] for key in ("role", "name", "tool_call_id") if message.get(key) is not None}
    taken["tool_calls"] = [_tool_call(call) for call in message.get("tool_calls") or ()]
    taken["content"] = content_of(message.get("content"))
    if taken["content"] is None and not taken["tool_calls"]:
        # An assistant who said nothing; the service wants a text of whoever makes no calls.
        taken["content"] = ""
    return taken


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Models and clients write no arguments as an empty text, which is no JSON."""
    function = call["function"]
    arguments = function["arguments"] if function["arguments"].strip() else "{}"
    return {"id": call["id"], "name": function["name"], "arguments": arguments}


def content_of(content: str | Sequence[Mapping[str, Any]] | None) -> str | list[str] | None:
    """The text of a message, or its parts: what stands between them is for the model's template to say."""
    if isinstance(content, str) or content is None:
        return content
    texts = [part["text"] for part in content]
    return texts if len(texts) > 1 else "".join(texts)


def logprob_of(token: TokenLogprob, name: Callable[[TokenLogprob], str]) -> ChatCompletionTokenLogprob:
    top = [TopLogprob(token=name(t), bytes=list(t.token), logprob=t.logprob or 0.0) for t in token.top]
    return ChatCompletionTokenLogprob(
        token=name(token), bytes=list(token.token), logprob=token.logprob or 0.0, top_logprobs=top
    )
