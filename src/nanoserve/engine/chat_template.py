"""A conversation as the prompt that the model was trained on, by the checkpoint's own chat template.

    Chat ── messages in the template's words ──▶ text ──▶ token ids

Templates differ in what they read: a message's text, or its parts, or both; some know no developer, some fail at a
message without text. What this one reads is found out by rendering small conversations with it.

Text of a conversation stays text. If it spells a special token, such as <|im_end|>, then transformers encodes it apart,
so that nobody can end their message and begin another within it; what the template itself writes is not touched.
"""

import copy
import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nanoserve.request import InvalidRequest, Violation

# What is looked for in a rendered conversation, and what comes out of a template that reads text and was given parts.
PROBE = "nanoserve-probe"
_SPELLED_OUT = re.compile(rf"""["']text["']: *["']{PROBE}""")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the model's chat template."""

    # As templates know them: {"role": ..., "content": ..., "name", "tool_call_id", "tool_calls"}, the last three and
    # a missing content left out; content is a text, or a list of its parts; the arguments of a tool call are a dict.
    messages: list[dict[str, Any]]
    # {"type": "function", "function": {"name", "description", "parameters"}}
    tools: list[dict[str, Any]] = field(default_factory=list)
    # Further variables of the template.
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # The completion extends the last message.
    continue_final_message: bool = False
    # The prompt ends with the beginning of the assistant's message. None = unless the last message is continued.
    add_generation_prompt: bool | None = None
    # What spells a special token becomes one.
    parse_special_tokens: bool = False

    @property
    def begins_message(self) -> bool:
        """The completion is a message from its beginning."""
        return not self.continue_final_message and self.add_generation_prompt is not False

    @property
    def num_chars(self) -> int:
        """Of the messages: what encoding them takes depends on it."""
        contents = (message.get("content") or "" for message in self.messages)
        return sum(len(content) if isinstance(content, str) else sum(map(len, content)) for content in contents)


class ChatTemplate:
    """Renders conversations. Any thread."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers."""
        self._tokenizer = tokenizer
        # transformers changes settings of a tokenizer to encode text apart; this one is a copy, made when it is needed.
        self._careful: Any = None
        self._lock = threading.Lock()
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        names = sorted((name for name in added if not name.isspace()), key=len, reverse=True)
        self._added_tokens = re.compile("|".join(map(re.escape, names)) or "(?!)")
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_kwargs = {*parameters, "messages", "conversations"} - {"documents"}
        self._reads = cache(self._find_what_it_reads)

    def render(self, chat: Chat) -> str:
        """The prompt as text. Raises InvalidRequest."""
        text: str = self._apply(self._tokenizer, chat, tokenize=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell a character that no text has.
            raise InvalidRequest([Violation("chat", f"the prompt is not Unicode text: {error}")]) from error
        return text

    def spells_tokens(self, chat: Chat) -> bool:
        """Something in the conversation is spelled like a token that stands for itself."""
        given = _strings((chat.messages, chat.tools, chat.template_kwargs))
        return any(self._added_tokens.search(text) for text in given)

    def encode_as_text(self, chat: Chat) -> list[int]:
        """Token ids of the prompt, in which what the conversation spells is no special token. Raises InvalidRequest."""
        with self._lock:
            if self._careful is None:
                self._careful = copy.deepcopy(self._tokenizer)
            token_ids = self._apply(self._careful, chat, tokenize=True, return_dict=False, sanitize_control_tokens=True)
        return list(token_ids)

    def _apply(self, tokenizer: Any, chat: Chat, **how: Any) -> Any:
        if reserved := sorted(self._reserved_kwargs & chat.template_kwargs.keys()):
            names = ", ".join(reserved)
            raise InvalidRequest([Violation("chat.template_kwargs_json", f"{names}: cannot be set here")])
        try:
            template = tokenizer.get_chat_template(tools=chat.tools or None)
        except ValueError as error:
            why = "the model has no chat template; send the prompt as text or token_ids"
            raise InvalidRequest([Violation("chat", why)]) from error
        try:
            return tokenizer.apply_chat_template(
                [self._in_its_words(message, template) for message in chat.messages],
                tools=chat.tools or None,
                add_generation_prompt=chat.begins_message,
                continue_final_message=chat.continue_final_message,
                **how,
                **chat.template_kwargs,
            )
        except Exception as error:
            # A template raises what it likes, at a conversation that it cannot render.
            raise InvalidRequest([Violation("chat", f"the chat template refuses it: {error}")]) from error

    def _in_its_words(self, message: Mapping[str, Any], template: str) -> dict[str, Any]:
        # Templates concatenate the content or search in it, also where there are only tool calls.
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else self._apart(content)
        reads_text, reads_parts = self._reads(template, message["role"])
        if reads_parts and (len(parts) > 1 or not reads_text):
            content = [{"type": "text", "text": part} for part in parts]
        else:
            content = "\n".join(parts)
        is_unknown = message["role"] == "developer" and "developer" not in template
        return {**message, "content": content, "role": "system" if is_unknown else message["role"]}

    def _apart(self, parts: list[str]) -> list[str]:
        """The parts; as one if they would spell a token together in a template that puts nothing between them."""
        num_spelled = sum(len(self._added_tokens.findall(part)) for part in parts)
        return parts if len(self._added_tokens.findall("".join(parts))) == num_spelled else ["\n".join(parts)]

    def _find_what_it_reads(self, template: str, role: str) -> tuple[bool, bool]:
        """Of a message of this role: whether the template reads the text, and whether it reads the parts."""

        def renders(content: Any) -> bool:
            messages = [{"role": role, "content": content}]
            if role != "user":
                question = {"role": "user", "content": "?" if content == PROBE else [{"type": "text", "text": "?"}]}
                messages = [messages[0], question] if role in ("system", "developer") else [question, messages[0]]
            try:
                text = self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            except Exception:  # as it likes
                return False
            return PROBE in text and not _SPELLED_OUT.search(text)

        reads_parts = renders([{"type": "text", "text": PROBE}])
        return renders(PROBE) or not reads_parts, reads_parts


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield key
            yield from _strings(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _strings(child)
