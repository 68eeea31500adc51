"""Reads calls: their names, and their arguments as JSON, in each style of the table."""

import json
import re
from collections.abc import Callable, Sequence

from nanoserve.dialect.formats import CallFormat, JsonArguments, JsonBody, KeywordArguments, TaggedArguments
from nanoserve.dialect.literals import in_string, scalar, string, value
from nanoserve.dialect.parameters import Parameter, parameters
from nanoserve.dialect.source import Markers, Over, Source, Steps, Unread
from nanoserve.dialect.tools import NAME, Tool

# Keys of the arguments in an object with both.
_ARGUMENTS = ("arguments", "parameters")
_NAME_CHARS = re.compile(r"[A-Za-z0-9_./\-]+")
# Of a parameter, between tags and before "=".
_TAGGED_KEY = re.compile(r'[^<>"]+')
_KEYWORD = re.compile(r"[^\s=,()\[\]{}\"']+")
_BARE = re.compile(r"[^,)]+")


class CallReader:
    """Reads the calls of one output, one after another, in three steps: first or next, then arguments."""

    def __init__(self, calls: CallFormat, tools: Sequence[Tool] | None, source: Source) -> None:
        """tools: None = any name is a tool's."""
        self._format = calls
        self._source = source
        self._opens = sorted(calls.opens, key=len, reverse=True)
        self._closes = [f" {each}" for each in sorted(filter(None, calls.closes), key=len, reverse=True)]
        self._names = None if tools is None else [tool.name for tool in tools]
        self._tools = {tool.name: tool for tool in tools or ()}
        # What stands behind the arguments, as far as the style has not read it.
        self._end = calls.end
        # Of the call that is read: its parameters, and arguments that came before its name.
        self._parameters: dict[str, Parameter] = {}
        self._early: str | None = None

    @property
    def has_markers(self) -> bool:
        """What opens a call opens nothing else."""
        return not self._format.is_at_start

    def first(self) -> Steps[str]:
        """Read up to the name of the first call, and return it. Raises Unread if there is no call."""
        yield from self._source.first_of(self._opens)
        return (yield from self._opening())

    def next(self) -> Steps[str | None]:
        """Read what ends a call, and up to the name of the next. None if there is none. What is cut off within is read
        too."""
        for texts in (self._end,), self._closes:
            try:
                yield from self._source.first_of(texts)
            except Unread as wrong:
                if self._source.is_cut_off_by(wrong):
                    return None
                continue
            if texts is self._closes:
                return None
        if self._format.between is None:
            return None
        with self._source.held() as mark:
            try:
                yield from self._source.literal(f" {self._format.between}")
                return (yield from self._opening())
            except Unread as wrong:
                if not self._source.is_cut_off_by(wrong):
                    self._source.back(mark)
                return None

    def arguments(self, write: Callable[[str], None]) -> Steps[None]:
        """Read the arguments of the call whose name was read. Raises Unread if they are none."""
        match self._format.style:
            case JsonBody():
                yield from self._rest_of_body(write)
            case JsonArguments():
                yield from value(self._source, write)
            case TaggedArguments() as style:
                yield from self._tagged(style, write)
            case KeywordArguments():
                yield from self._keywords(write)

    # ---------------------------------------------------------------------------------------------------- names

    def _opening(self) -> Steps[str]:
        """Read up to where it is certain which tool is called."""
        self._early = None
        source = self._source
        yield from source.literal(f" {self._format.begin}")
        match self._format.style:
            case JsonBody():
                name = yield from self._name_in_body()
            case JsonArguments() as style:
                name = yield from self._name()
                yield from source.first_of(style.after_names)
                if (yield from source.peek()) != "{":
                    raise Unread
            case TaggedArguments() as style:
                name = yield from self._name()
                yield from source.literal(style.after_name)
                with source.held() as mark:
                    yield from source.first_of((style.key, self._format.end.split()[0]))
                    source.back(mark)
            case KeywordArguments():
                name = yield from self._name()
                yield from source.literal(" (")
        tool = self._tools.get(name)
        self._parameters = {each.name: each for each in parameters(tool)} if tool else {}
        return name

    def _name(self) -> Steps[str]:
        source = self._source
        with source.held() as mark:
            name = ""
            while (yield from source.more()) and (part := source.run(_NAME_CHARS)):
                name += part
                if not self._may_begin(name):
                    source.back(mark)
                    raise Unread
            if not (yield from source.more()):
                raise Over
            if not NAME.fullmatch(name) or (self._names is not None and name not in self._names):
                source.back(mark)
                raise Unread
        return name

    def _may_begin(self, text: str) -> bool:
        if self._names is None:
            return NAME.fullmatch(text) is not None
        return any(name.startswith(text) for name in self._names)

    # ---------------------------------------------------------------------------------------------- JSON bodies

    def _name_in_body(self) -> Steps[str]:
        """Read an object up to its "name", and keep arguments that come before it."""
        source = self._source
        yield from source.literal(" {")
        while True:
            key = yield from self._key()
            if key == "name":
                yield from source.literal('"')
                name = yield from self._name()
                yield from source.literal('"')
                return name
            parts: list[str] = []
            yield from value(source, parts.append)
            if key in _ARGUMENTS and self._early is None:
                self._early = "".join(parts)
                if not self._early.startswith("{"):
                    raise Unread
            yield from source.literal(" ,")

    def _rest_of_body(self, write: Callable[[str], None]) -> Steps[None]:
        """Read the same object to its end."""
        source = self._source
        if has_arguments := self._early is not None:
            write(self._early or "")
        try:
            while (yield from source.first_of((" ,", " }"))) == " ,":
                key = yield from self._key()
                if key in _ARGUMENTS and not has_arguments:
                    yield from self._object(write)
                    has_arguments = True
                else:
                    yield from value(source, lambda _: None)
        except Over:
            # It forgot to close what is otherwise complete.
            if not (source.is_complete and has_arguments):
                raise
        if not has_arguments:
            write("{}")

    def _object(self, write: Callable[[str], None]) -> Steps[None]:
        """Read arguments; null is none."""
        match (yield from self._source.peek()):
            case "{":
                yield from value(self._source, write)
            case "n":
                yield from self._source.literal("null")
                write("{}")
            case _:
                raise Unread

    def _key(self) -> Steps[str]:
        """Read a key and the colon, and the space around."""
        parts: list[str] = []
        yield from self._source.literal(" ")
        yield from string(self._source, parts.append)
        yield from self._source.literal(" : ")
        return str(json.loads("".join(parts)))

    # ------------------------------------------------------------------------------------------------- tags

    def _tagged(self, style: TaggedArguments, write: Callable[[str], None]) -> Steps[None]:
        source = self._source
        # The call is complete with the first of its closing tags.
        end = self._format.end.split()[0]
        self._end = self._format.end.partition(end)[2]
        before = "{"
        while (yield from source.first_of((f" {style.key}", f" {end}"))) != f" {end}":
            name = (yield from source.whole_run(_TAGGED_KEY)).strip()
            yield from source.literal(style.value.removesuffix("\n"))
            if style.value.endswith("\n") and (yield from source.peek()) == "\n":
                yield from source.take()
            write(f'{before}"{in_string(name)}": ')
            before = ", "
            yield from self._tagged_value(self._parameter(name), style.end, write)
        write("{}" if before == "{" else "}")

    def _tagged_value(self, parameter: Parameter, end: str, write: Callable[[str], None]) -> Steps[None]:
        source = self._source
        if parameter.is_container and (yield from self._opens_container()):
            yield from value(source, write)
            yield from source.literal(f" {end}")
            return
        if not parameter.is_text:
            # Undecided until all of it is there.
            parts: list[str] = []
            has_ended = False
            with source.held() as mark:
                try:
                    yield from value(source, parts.append)
                    yield from source.literal(f" {end}")
                    is_value = parameter.allows("".join(parts))
                except Unread as wrong:
                    is_value, has_ended = False, isinstance(wrong, Over)
                if not is_value:
                    source.back(mark)
            if is_value:
                write("".join(parts).strip())
                return
            if has_ended:
                # A quote in a text may have looked like the beginning of a string.
                parts.clear()
                yield from self._text_value(end, parts.append)
                write("".join(parts))
                return
        yield from self._text_value(end, write)

    def _text_value(self, end: str, write: Callable[[str], None]) -> Steps[None]:
        write('"')
        if not (yield from self._source.until(Markers((end, end.lstrip())), lambda text: write(in_string(text)))):
            raise Over
        write('"')

    def _opens_container(self) -> Steps[bool]:
        with self._source.held() as mark:
            yield from self._source.literal(" ")
            char = yield from self._source.peek()
            self._source.back(mark)
        return char in "{[("

    # --------------------------------------------------------------------------------------------- keywords

    def _keywords(self, write: Callable[[str], None]) -> Steps[None]:
        source = self._source
        before = "{"
        yield from source.space()
        while (yield from source.peek()) != ")":
            name = yield from source.whole_run(_KEYWORD)
            yield from source.literal(" = ")
            write(f'{before}"{in_string(name)}": ')
            before = ", "
            yield from self._keyword_value(self._parameter(name), write)
            if (yield from source.first_of((" ,", " )"))) == " )":
                break
            yield from source.space()
        else:
            yield from source.take()
        write("{}" if before == "{" else "}")

    def _keyword_value(self, parameter: Parameter, write: Callable[[str], None]) -> Steps[None]:
        source = self._source
        char = yield from source.peek()
        if char in "\"'" or (char in "{[(" and not parameter.is_text):
            yield from value(source, write)
            return
        if char in "{[(":
            # A text that looks like something else.
            with source.held() as mark:
                yield from value(source, lambda _: None)
                text = source.since(mark)
            write(f'"{in_string(text)}"')
            return
        bare = (yield from source.whole_run(_BARE)).rstrip()
        if not (yield from source.more()):
            raise Over
        if not bare:
            raise Unread
        plain = None if parameter.is_text else scalar(bare)
        write(f'"{in_string(bare)}"' if plain is None or not parameter.allows(plain) else plain)

    def _parameter(self, name: str) -> Parameter:
        return self._parameters.get(name) or Parameter(name, {}, is_required=False)
