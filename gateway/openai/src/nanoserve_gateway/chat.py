"""/v1/chat/completions. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import Completion, Delta, GenerateOptions, Result, Started, TokenizeOptions, TokenLogprob
from nanoserve_client.requests import Messages, chat_prompt, generate_request
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from nanoserve_gateway.answer import (
    Chunks,
    Prompt,
    chat_options,
    check,
    effort_names,
    effort_rules,
    error_frame,
    is_parsed,
    model_of,
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
from nanoserve_gateway.tools import Telling, Tools


class ChatAnswer:
    """The answer to one chat completion request: an Answer."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as CHAT.parse returns them. Raises BadRequest."""
        limit, other = fields.get("max_tokens"), fields.get("max_completion_tokens")
        constraint, tools = Constraint(fields), Tools(fields)
        check(
            *stream_rules(fields),
            *constraint.rules,
            *tools.rules,
            *effort_rules(fields),
            (None not in (limit, other) and limit != other, "max_tokens", "differs from max_completion_tokens"),
            (bool(fields.get("top_logprobs")) and not fields.get("logprobs"), "top_logprobs", "is for logprobs only"),
        )
        chosen: GenerateOptions = {**options(fields), **constraint.options, "parse": is_parsed(fields)}
        if other is not None:
            chosen["max_tokens"] = other
        if fields.get("logprobs"):
            chosen["logprobs"] = fields.get("top_logprobs", 0)
        if (prediction := fields.get("prediction")) is not None:
            content = prediction["content"]
            chosen["prediction"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
        messages = messages_of(fields["messages"])
        prompt = chat_prompt(messages, {**chat_options(fields), **tools.options})
        tools.choose(prompt)
        self.requests = [generate_request(prompt, chosen)]
        self._has_token_ids = bool(fields.get("return_token_ids"))
        as_prompt: TokenizeOptions = {**tokenize_options(fields), **tools.tokenize_options}
        self.prompts = [Prompt(messages, as_prompt, self._has_token_ids)]
        self.is_streamed = bool(fields.get("stream"))
        self._fields, self._constraint, self._tools = fields, constraint, tools
        self._telling = Telling(
            is_parsed=is_parsed(fields),
            has_reasoning=fields.get("include_reasoning", True),
            are_functions=tools.are_functions,
        )
        self._name = naming(fields, text_of)
        self._has_logprobs = bool(fields.get("logprobs"))
        self._prompt_logprobs: int | None = fields.get("prompt_logprobs")
        self._metadata = fields.get("metadata")
        self._id, self._created = new_id("chatcmpl-"), now()
        kind = "chat.completion.chunk"
        has_outcomes = bool(constraint or tools)
        self._chunks = Chunks(kind, self._id, self._created, fields, has_outcomes=has_outcomes)

    @property
    def names(self) -> Mapping[str, str]:
        is_newer = "max_completion_tokens" in self._fields
        return {
            **self._constraint.names,
            **self._tools.names,
            **effort_names(self._fields),
            **names_of_functions(self._fields["messages"]),
            "output.logprobs": "top_logprobs",
            "output.prompt_logprobs": "prompt_logprobs",
            "output.parse": "skip_special_tokens",
            "stopping.max_tokens": "max_completion_tokens" if is_newer else "max_tokens",
            "prompt": "messages",
            "predicted_text": "prediction",
        }

    def begin(self, starts: Sequence[Started]) -> Iterator[bytes]:
        self._chunks.begin(starts)
        told = self._prompt_token_ids()
        for index in range(self.requests[0].n or 1):
            delta = {"role": "assistant", "content": ""}
            yield self._chunks.chunk({"index": index, "delta": delta, "finish_reason": None}, told)

    def delta(self, prompt: int, delta: Delta) -> Iterator[bytes]:
        """Chunks with what is new, one for each part, unless it is tokens whose text is still to come and that are not
        told themselves; and one with the end, because many clients read no text there."""
        self._chunks.count(delta)
        told: dict[str, Any] = {}
        if self._has_logprobs and delta.logprobs:
            tokens = [logprob_of(token, self._name) for token in delta.logprobs]
            told["logprobs"] = {"content": tokens, "refusal": None}
        if self._has_token_ids and delta.token_ids:
            told["token_ids"] = delta.token_ids
        pieces = list(self._telling.pieces(delta)) or ([{"content": ""}] if told else [])
        for piece in pieces:
            yield self._chunks.chunk({"index": delta.index, "delta": piece, "finish_reason": None, **told})
            told = {"token_ids": ()} if self._has_token_ids else {}
        if delta.finish_reason is not None:
            reason = self._telling.finish_reason(delta, delta.finish_reason)
            end = {"finish_reason": reason, "stop_reason": stop_reason(delta)}
            told = {"token_ids": ()} if self._has_token_ids else {}
            yield from self._chunks.last(prompt, delta.index, {"index": delta.index, "delta": {}, **end, **told})

    def end(self, results: Sequence[Result]) -> Iterator[bytes]:
        return self._chunks.end(results, self.names)

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
            model=model_of(result.started),
            choices=[self._choice(completion, result) for completion in result.completions],
            usage=usage_of(results),
            **extra,
        )

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompts[0].token_ids} if self._has_token_ids else {}

    def _choice(self, completion: Completion, result: Result) -> Choice:
        tokens = [logprob_of(token, self._name) for token in completion.logprobs]
        extra = outcome_of(result, completion.index, self.names)
        if self._has_token_ids:
            extra["token_ids"] = completion.token_ids
        return Choice(
            index=completion.index,
            finish_reason=self._telling.finish_reason_of(completion),  # type: ignore[arg-type]
            message=self._telling.message(completion),
            logprobs=ChoiceLogprobs(content=tokens, refusal=None) if self._has_logprobs else None,
            stop_reason=stop_reason(completion),  # type: ignore[call-arg]
            **extra,
        )


def messages_of(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Checked messages of the API as the client takes them."""
    taken = []
    # Ids of calls by OpenAI's older name, which have none there, until they are answered: by the function's name.
    waiting: dict[str, str] = {}
    for place, message in enumerate(messages):
        if (call := message.get("function_call")) is not None:
            waiting[call["name"]] = id = f"call_{place}"
            message = {**message, "tool_calls": [*message.get("tool_calls", ()), {"id": id, "function": call}]}
        elif message["role"] == "function":
            message = {**message, "role": "tool", "tool_call_id": waiting.pop(message["name"], None)}
        taken.append(_message(message))
    return taken


def names_of_functions(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What callers call the contract's fields of the calls that they make by the older name."""
    names = {}
    for place, message in enumerate(messages):
        if message.get("function_call") is not None:
            call = f"chat.messages[{place}].tool_calls[{len(message.get('tool_calls', ()))}]"
            names[f"{call}.arguments_json"] = f"messages[{place}].function_call.arguments"
            names[call] = f"messages[{place}].function_call"
    return names


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    taken = {key: message[key] for key in ("role", "name", "tool_call_id") if message.get(key) is not None}
    taken["tool_calls"] = [_tool_call(call) for call in message.get("tool_calls") or ()]
    taken["content"] = content_of(message.get("content"))
    # As Telling writes it.
    taken["reasoning"] = message.get("reasoning", message.get("reasoning_content"))
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
