"""A conversation as the prompt that the model was trained on, by the checkpoint's own chat template.

    Chat ── messages in the template's words, spelled tokens marked ──▶ template ──▶ text ──▶ pieces

Templates differ in what they read: a message's text, or its parts, or both; some know no developer, some fail at a
message without text. What this one reads is found out by rendering small conversations with it.

Text of a conversation stays text. What spells a special token in it, such as <|im_end|>, is marked before the template
is rendered, and so can be told from what the template itself writes: nobody can end their message and begin another
within it.
"""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nanoserve.dialect.tools import ToolUse
from nanoserve.errors import InvalidRequest, Violation

# Around what spells a token. Unicode keeps these two for such uses, and no text has them. Some templates write them as
# Python and JSON escape them.
BEGIN, END = "\ufdd0", "\ufdd1"
_BEGIN, _END = r"(?:\ufdd0|\\ufdd0)", r"(?:\ufdd1|\\ufdd1)"
_MARK = re.compile(rf"{_BEGIN}|{_END}")
_ESCAPED = re.compile(r"\\(?=ufdd[01])")
# What templates call it.
_NAMES_OF_REASONING = ("reasoning", "reasoning_content", "thinking")
# What is looked for in a rendered conversation, and what comes out of a template that reads text and was given parts.
PROBE = "nanoserve-probe"
_SPELLED_OUT = re.compile(rf"""["']text["']: *["']{PROBE}""")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the model's chat template."""

    # As templates know them: {"role": ..., "content": ..., "name", "tool_call_id", "tool_calls", "reasoning"},
    # where what is missing is left out; content is a text, or a list of its parts; arguments of a tool call are a dict.
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
    # What `tools` are, and how they may be called.
    tool_use: ToolUse = field(default_factory=ToolUse)

    @property
    def begins_message(self) -> bool:
        """The completion is a message from its beginning."""
        return not self.continue_final_message and self.add_generation_prompt is not False


class ChatTemplate:
    """Renders conversations. Any thread."""

    def __init__(self, tokenizer: Any, special_tokens: Iterable[str]) -> None:
        """`tokenizer` is one of transformers."""
        self._tokenizer = tokenizer
        # Some tokenizers have a line break or a word among them, which are no way to end a message.
        names = any_of(name for name in special_tokens if not (name.isspace() or name.isidentifier() or name == ""))
        # In capitals too: a template, or a tokenizer that reads what is special like all else, may write them small.
        spelled = f"(?i:{names})"
        self._special = re.compile(spelled)
        # A template may have cut off one of the marks.
        marked = f"{_BEGIN}(?P<text>{spelled})|(?P<rest>{spelled}){_END}"
        self._marked_or_special = re.compile(f"{marked}|(?P<token>{names})|{_MARK.pattern}")
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_kwargs = {*parameters, "messages", "conversations"} - {"documents"}
        self._reads = cache(self._find_what_it_reads)

    def render(self, chat: Chat) -> str:
        """The prompt as text, in which what the conversation spells is marked. Raises InvalidRequest."""
        if reserved := sorted(self._reserved_kwargs & chat.template_kwargs.keys()):
            names = ", ".join(reserved)
            raise InvalidRequest([Violation("chat.template_kwargs_json", f"{names}: cannot be set here")])
        try:
            template: str = self._tokenizer.get_chat_template(tools=chat.tools or None)
        except ValueError as error:
            why = "the model has no chat template; send the prompt as text or token_ids"
            raise InvalidRequest([Violation("chat", why)]) from error
        known = set(re.findall(r"\w+", template))
        if unread := sorted(chat.template_kwargs.keys() - known):
            why = f"{', '.join(map(repr, unread))}: not a variable of the model's chat template"
            raise InvalidRequest([Violation("chat.template_kwargs_json", why)])
        try:
            given = chat if chat.parse_special_tokens else self._marked(chat)
            text: str = self._tokenizer.apply_chat_template(
                [self._in_its_words(message, template) for message in given.messages],
                tools=given.tools or None,
                tokenize=False,
                add_generation_prompt=chat.begins_message,
                continue_final_message=chat.continue_final_message,
                **given.template_kwargs,
            )
            # JSON can spell a character that no text has.
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest([Violation("chat", f"the prompt is not Unicode text: {error}")]) from error
        except Exception as error:
            # A template raises what it likes, at a conversation that it cannot render.
            why = f"the chat template refuses it: {without_marks(str(error))}"
            raise InvalidRequest([Violation("chat", why)]) from error
        return text

    def in_halves(self, text: str) -> list[str]:
        """A text, cut in the middle of what spells a special token."""
        cuts = [0, *((match.start() + match.end() + 1) // 2 for match in self._special.finditer(text)), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    def pieces(self, text: str) -> tuple[list[str], list[str]]:
        """A rendered text as it alternates: text, token, text, ..., token, text. Returns texts, without marks, and the
        special tokens between them."""
        texts: list[str] = []
        tokens: list[str] = []
        parts: list[str] = []
        start = 0
        for match in self._marked_or_special.finditer(text):
            parts += [text[start : match.start()], match["text"] or match["rest"] or ""]
            start = match.end()
            if match["token"] is not None:
                tokens.append(match["token"])
                texts.append("".join(parts))
                parts = []
        return [*texts, "".join([*parts, text[start:]])], tokens

    def _marked(self, chat: Chat) -> Chat:
        """With marks around all that spells a special token."""
        return dataclasses.replace(
            chat,
            messages=[self._mark({**each, "content": self._apart(each.get("content"))}) for each in chat.messages],
            tools=self._mark(chat.tools),
            template_kwargs=self._mark(chat.template_kwargs),
        )

    def _mark(self, value: Any) -> Any:
        """A value of JSON."""
        if isinstance(value, str):
            # A mark within what looks like an escaped one: it stays what it is.
            own = _ESCAPED.sub(rf"\\{END}", value.replace(BEGIN, "").replace(END, ""))
            return self._special.sub(rf"{BEGIN}\g<0>{END}", own)
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(child) for key, child in value.items()}
        return [self._mark(child) for child in value] if isinstance(value, list) else value

    def _in_its_words(self, message: Mapping[str, Any], template: str) -> dict[str, Any]:
        # Templates concatenate the content or search in it, also where there are only tool calls.
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else content
        reads_text, reads_parts = self._reads(template, message["role"])
        if reads_parts and (len(parts) > 1 or not reads_text):
            content = [{"type": "text", "text": part} for part in parts]
        else:
            content = "\n".join(parts)
        thought = {name: message["reasoning"] for name in _NAMES_OF_REASONING if "reasoning" in message}
        is_unknown = message["role"] == "developer" and "developer" not in template
        return {**message, **thought, "content": content, "role": "system" if is_unknown else message["role"]}

    def _apart(self, content: str | list[str] | None) -> str | list[str] | None:
        """A content; its parts as one text if they would spell a token together where nothing is put between them."""
        if not isinstance(content, list):
            return content
        num_spelled = sum(len(self._special.findall(part)) for part in content)
        return content if len(self._special.findall("".join(content))) == num_spelled else "\n".join(content)

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


def has_marks(text: str) -> bool:
    """Something in a rendered text is not what it looks like."""
    return _MARK.search(text) is not None


def without_marks(text: str) -> str:
    """A rendered text as whoever wrote the conversation knows it."""
    return _MARK.sub("", text)


def any_of(names: Iterable[str]) -> str:
    """A regular expression for the longest of some names, as a tree of their letters: where it fails, it does so after
    one letter and not after one for each name."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}  # here one ends
    return _branches(tree) if tree else "(?!)"


def _branches(node: dict[str, Any]) -> str:
    longer = "|".join(re.escape(letter) + _branches(child) for letter, child in node.items() if letter)
    if "" not in node:
        return f"(?:{longer})" if len(node) > 1 else longer
    return f"(?:{longer})?" if longer else ""
