"""Grammars of dialects over a small vocabulary: what they accept, and what is drawn from them at random."""

import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from nanoserve.constraint.checker import LIMITS
from nanoserve.constraint.matcher import Matcher, make_masks
from nanoserve.constraint.vocabulary import Vocabulary as Tokens
from nanoserve.dialect.formats import (
    CALLS,
    OPEN,
    REASONING,
    CallFormat,
    Dialect,
    JsonArguments,
    JsonBody,
    KeywordArguments,
    TaggedArguments,
    reasoning_format,
)
from nanoserve.dialect.grammar import Skeleton, skeleton
from nanoserve.dialect.parser import Arguments, CallBegun, CallEnded, Content, Event, OutputParser, Reasoning
from nanoserve.dialect.tools import Choosing, Tool, ToolChoice

# As constraint/grammar.py sets them for every schema.
OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\r\t]{1,16}",
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'bfnrt"\\',
    "json_allow_general_unicode_escapes": False,
}
SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def texts_of(calls: CallFormat) -> list[str]:
    """All that the table says of a format."""
    style = [getattr(calls.style, name) for name in type(calls.style).__dataclass_fields__]
    after = [text for each in style for text in ([each] if isinstance(each, str) else each)]
    return [*calls.opens, *calls.closes, calls.begin, calls.end, calls.between or "", *after]


class Vocabulary:
    """Single characters, what ends values, the texts of the table, and EOS. Tests say which texts are special."""

    def __init__(self, *, has_special: bool) -> None:
        """has_special: all markers of the table are special tokens; otherwise EOS alone is."""
        texts = [text.replace(OPEN, "7") for each in CALLS for text in texts_of(each)]
        texts += [text for each in REASONING for text in (each.start, each.end, each.turn, each.answer, *each.frames)]
        markers = sorted({marker for text in texts for marker in SPECIAL.findall(text)})
        special = ["<eos>", *(markers if has_special else [])]
        ends = ['",', '"}', '"\n', "}}", "\n</", '")', '"]']
        longer = {*ends, *(text.strip() for text in texts if len(text.strip()) > 1), *markers} - {*special}
        tokens = [bytes([byte]) for byte in sorted({*string.printable.strip().encode(), *"é｜▁ \n".encode()})]
        tokens += [text.encode() for text in sorted(longer)]
        self.texts = [*tokens, *(text.encode() for text in special)]
        self.ids = {text: len(tokens) + i for i, text in enumerate(special)}
        self.eos_id = self.ids["<eos>"]
        self._singles = {token: i for i, token in enumerate(tokens) if len(token) == 1}
        vocabulary = Tokens(tuple(self.texts), tuple(self.ids.values()), (self.eos_id,))
        self.tokenizer: LLTokenizer = vocabulary.tokenizer(
            lambda text: [self._singles[bytes([byte])] for byte in text.encode()]
        )

    def special_id(self, text: str) -> int | None:
        return self.ids.get(text)

    def encode(self, text: str) -> list[int]:
        """Special tokens as such, all else byte by byte."""
        token_ids = []
        for part in re.split("(" + "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) + ")", text):
            token_ids += [self.ids[part]] if part in self.ids else [self._singles[bytes([i])] for i in part.encode()]
        return token_ids

    def matcher(self, made: Skeleton, answer: Mapping[str, Any] | None = None) -> Matcher:
        schemas = {name: json.loads(text) for name, text in made.schemas.items()}
        if answer is not None:
            schemas["answer"] = dict(answer)
        parts = [{"name": name, "json_schema": {**each, "x-guidance": OPTIONS}} for name, each in schemas.items()]
        grammar = json.dumps({"grammars": [{"lark_grammar": made.lark}, *parts]})
        parser = LLMatcher(self.tokenizer, grammar, log_level=0, limits=LIMITS)
        assert not parser.get_error(), f"{parser.get_error()}\n{made.lark}"
        return Matcher(parser, lambda: None)

    def accepts(self, matcher: Matcher, text: str) -> bool:
        token_ids = self.encode(text)
        return matcher.read(token_ids) == len(token_ids) and matcher.may_end

    def draw(self, matcher: Matcher, seed: int, max_tokens: int, begin: str = "") -> tuple[str, bool]:
        """A text of tokens drawn evenly from what is allowed, and whether it came to its end.

        begin: a part of it, as long as the seed says, comes before.
        """
        drawn = random.Random(seed)
        masks = make_masks(1, len(self.texts))
        first = self.encode(begin)
        first = first[: seed % (len(first) + 1)]
        assert matcher.read(first) == len(first), begin
        tokens = [self.texts[token_id] for token_id in first]
        for _ in range(max_tokens):
            matcher.fill(masks)
            bits = np.unpackbits(masks[0].view(np.uint8), bitorder="little")
            token_id = int(drawn.choice(np.nonzero(bits)[0]))
            if token_id == self.eos_id:
                assert matcher.may_end, tokens
                return b"".join(tokens).decode(), True
            assert matcher.read([token_id]) == 1
            tokens.append(self.texts[token_id])
        return b"".join(tokens).decode("utf-8", "ignore"), False


def dialect_of(calls: CallFormat) -> Dialect:
    """With the reasoning that goes with a format of calls."""
    name = {"openai": "openai_gptoss", "mistral": "mistral", "seed_oss": "seed_oss"}.get(calls.names[0], "qwen3")
    return Dialect(reasoning_format(name), calls)


def grammar_of(
    dialect: Dialect,
    tools: Sequence[Tool],
    vocabulary: Vocabulary,
    choosing: Choosing = Choosing.REQUIRED,
    *,
    names: Sequence[str] | None = None,
    parallel: bool = True,
    is_reasoning: bool = False,
    may_reason: bool = False,
    answer: bool = False,
) -> Skeleton:
    return skeleton(
        dialect,
        tools,
        ToolChoice(choosing, None if names is None else frozenset(names)),
        parallel=parallel,
        is_reasoning=is_reasoning,
        may_reason=may_reason,
        answer=answer,
        special_id=vocabulary.special_id,
    )


def read(
    dialect: Dialect,
    text: str,
    tools: Sequence[Tool] | None,
    *,
    cuts: Sequence[int] = (),
    is_reasoning: bool = False,
    is_complete: bool = True,
) -> list[Event]:
    """All events of a text that comes cut at some places."""
    parser = OutputParser(dialect, tools, is_reasoning=is_reasoning)
    events: list[Event] = []
    start = 0
    for stop in [*cuts, len(text)]:
        events += parser.push(text[start:stop])
        start = stop
    return events + parser.finish(is_complete=is_complete)


class Told:
    """What events tell, joined. Asserts that they come in order."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.reasoning = ""
        self.content = ""
        # Of each call: its name, its arguments as text, and whether it ended.
        self.calls: list[tuple[str, str, bool]] = []
        for event in events:
            match event:
                case Reasoning(text):
                    assert text
                    self.reasoning += text
                case Content(text):
                    assert text
                    self.content += text
                case CallBegun(index, name):
                    assert index == len(self.calls)
                    self.calls.append((name, "", False))
                case Arguments(index, text):
                    assert index == len(self.calls) - 1
                    assert text
                    name, before, ended = self.calls[index]
                    assert not ended
                    self.calls[index] = (name, before + text, False)
                case CallEnded(index):
                    assert index == len(self.calls) - 1
                    name, text, ended = self.calls[index]
                    assert not ended
                    assert isinstance(json.loads(text), dict)
                    self.calls[index] = (name, text, True)

    @property
    def complete(self) -> list[tuple[str, Any]]:
        """Calls that ended, with their arguments."""
        return [(name, json.loads(text, parse_float=_number)) for name, text, ended in self.calls if ended]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Told) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))

    __hash__ = None  # type: ignore[assignment]


def _number(text: str) -> float:
    """A float: what is drawn at random has exponents that are larger."""
    return min(max(float(text), -1e300), 1e300)


def render(calls: CallFormat, made: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Calls as a chat template writes them."""
    written = []
    for i, (name, arguments) in enumerate(made):
        match calls.style:
            case JsonBody(key):
                body = json.dumps({"name": name, key: arguments})
            case JsonArguments(after_names):
                body = name + after_names[0].replace(OPEN, str(i)) + json.dumps(arguments)
            case TaggedArguments(after_name, key, value, end):
                parts = [
                    f"{key}{each}{value}{text if isinstance(text, str) else json.dumps(text)}{end}"
                    for each, text in arguments.items()
                ]
                body = name + after_name + "\n".join(parts)
            case KeywordArguments():
                body = f"{name}({', '.join(f'{each}={json.dumps(text)}' for each, text in arguments.items())})"
        written.append(calls.begin + body + (calls.end if body[-1] != "\n" else calls.end.lstrip("\n")))
    return calls.opens[0] + (calls.between or "").join(written) + calls.closes[0]
