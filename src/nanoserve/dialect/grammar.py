"""What a model may write in its dialect, as a Lark grammar in which the arguments of each tool are references.

    [block of reasoning]  text without a trigger
                          text, trigger ── call ── call …     "auto"
                          call ── call …                      "required"

    start: think body                                    Skeleton.lark
    call_0: "get" … @tool_0 … "</tool_call>"     @tool_0 ──▶ Skeleton.schemas["tool_0"], a JSON Schema

A text may not contain what the parser would take for a marker, not even where the marker is a special token: the parser
cannot tell one from the letters that spell it. Whitespace of the format may be missing, and is at most MAX_SPACE long.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanoserve.dialect.formats import CallFormat, Dialect, JsonArguments, JsonBody, KeywordArguments, TaggedArguments
from nanoserve.dialect.lark import ANY_SPACES, SPACE, SPACES, Lark, quoted
from nanoserve.dialect.parameters import Parameter, ignored_keywords, loosened, parameters, schema_of
from nanoserve.dialect.tools import Choosing, Tool, ToolChoice
from nanoserve.errors import ConstraintInvalid, ConstraintProblem
from nanoserve.request import BEGUN, REASONED


@dataclass(frozen=True, slots=True)
class Unenforced:
    """A keyword of a tool's schema that this dialect's grammar does not hold the model to."""

    tool: str
    # JSON pointer of the subschema that has it.
    pointer: str
    keyword: str


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A grammar, less the schemas that it refers to."""

    # May refer to "answer" besides, which is the caller's.
    lark: str
    # JSON Schemas, as text, by the names under which the grammar refers to them.
    schemas: Mapping[str, str]
    unenforced: tuple[Unenforced, ...]


def skeleton(
    dialect: Dialect,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    is_reasoning: bool,
    may_reason: bool,
    answer: bool,
    special_id: Callable[[str], int | None],
    closes_reasoning: bool = False,
) -> Skeleton:
    """The grammar of an output.

    parallel: there may be more than one call. is_reasoning: the prompt has opened a block of reasoning, which has to be
    closed; may_reason: the model may open one. answer: what is no call is to satisfy the grammar "answer".
    special_id: of a special token, by its text; None = it is written as text. closes_reasoning: a block that is open is
    closed at once.

    Left to the model, a tool that is not strict takes any arguments. Raises ConstraintInvalid if a call that is
    required, or an argument of one, cannot be written.
    """
    writer = _Writer(dialect, tools, special_id)
    has_calls = writer.add_calls(choice, parallel=parallel)
    has_text = writer.add_body(choice, has_calls=has_calls, answer=answer)
    writer.add_start(is_reasoning=is_reasoning, may_reason=may_reason, closes=closes_reasoning, has_text=has_text)
    return Skeleton(writer.lark.text(), writer.schemas, tuple(writer.unenforced))


class _Writer:
    """Writes the rules of one grammar: `calls` where no text may stand, `called` where one may, `body`, `start`."""

    def __init__(self, dialect: Dialect, tools: Sequence[Tool], special_id: Callable[[str], int | None]) -> None:
        self._reasoning = dialect.reasoning
        self._format = dialect.calls
        self._tools = tools
        self.lark = Lark(special_id)
        self.schemas: dict[str, str] = {}
        self.unenforced: list[Unenforced] = []

    # ----------------------------------------------------------------------------------- reasoning, text, calls

    def add_start(self, *, is_reasoning: bool, may_reason: bool, closes: bool, has_text: bool) -> None:
        """The reasoning, and what follows it. has_text: that may be a text, which has whitespace of its own."""
        lark, block, space = self.lark, "", "" if has_text else f"{SPACE}?"
        if (reasoning := self._reasoning) and (is_reasoning or may_reason):
            text = lark.up_to("think", reasoning.end, lark.without([reasoning.end]))
            if closes:
                text = f"{SPACE}? {lark.literal(reasoning.end)}"
            block = f"{lark.rule(f'{REASONED}[capture]', text)} {lark.literal(reasoning.turn)}"
            if not is_reasoning:
                start = lark.opening("thinking", reasoning.start) if has_text else lark.literal(reasoning.start)
                start = lark.rule(f"{BEGUN}[capture]", start)
                block = f"{space} ({start} {block} {space})?"
                space = ""
        lark.rule("start", f"{block} {space} body")

    def add_body(self, choice: ToolChoice, *, has_calls: bool, answer: bool) -> bool:
        """What follows the reasoning. Returns whether that may be a text."""
        lark = self.lark
        channel = lark.literal(self._reasoning.answer) if self._reasoning else ""
        if choice.choosing is Choosing.REQUIRED:
            lark.rule("body", "calls")
            return False
        if answer:
            before = f"{channel} {SPACE}?" if channel else ""
            lark.rule("body", f"{before} @answer" + (" | calls" if has_calls else ""))
            return False
        text = self._text()
        body = f"{channel} {lark.rule('TEXT', text)}"
        if has_calls and self._format:
            is_at_start = self._format.is_at_start
            before = "" if is_at_start else lark.up_to("before", self._format.triggers[0], text)
            body += f" | {before} called"
        lark.rule("body", body)
        return True

    def _text(self) -> str:
        """A terminal for text in which the parser will see no marker."""
        anywhere: list[str] = []
        first: list[str] = []
        if reasoning := self._reasoning:
            (anywhere if reasoning.is_repeated else first).append(reasoning.start)
            anywhere += filter(None, [*reasoning.frames, reasoning.turn, reasoning.answer])
        first = [*map(quoted, first)]
        if (calls := self._format) and self._tools:
            if not calls.is_at_start:
                anywhere += calls.triggers
            elif isinstance(calls.style, KeywordArguments):
                # A list of anything else may well begin a text.
                names = " | ".join(quoted(tool.name) for tool in self._tools)
                first += [f'{quoted(trigger)} {ANY_SPACES} ({names}) {ANY_SPACES} "("' for trigger in calls.triggers]
            else:
                first += map(quoted, calls.triggers)
        return self.lark.without(anywhere, first)

    def add_calls(self, choice: ToolChoice, *, parallel: bool) -> bool:
        """Rules for calls of the tools that may be called. Returns whether there are any."""
        calls, allowed = self._format, choice.allowed(self._tools)
        if not (calls and allowed):
            if choice.choosing is Choosing.REQUIRED:
                why = "no tool may be called" if calls else "how the model writes calls of tools is not known"
                raise ConstraintInvalid("tool_choice", [ConstraintProblem("", "", why)])
            return False
        names = []
        for i in allowed:
            is_loose = choice.choosing is Choosing.AUTO and not self._tools[i].is_strict
            tool = loosened(self._tools[i]) if is_loose else self._tools[i]
            names.append(self.lark.rule(f"call_{i}", self._call(calls, i, tool)))
        begin = calls.begin + ('{ "name" : "' if isinstance(calls.style, JsonBody) else "")
        more = ""
        if parallel and calls.between is not None:
            more += f" ({self.lark.literal(f'{calls.end}{calls.between}{begin}')} call)*"
        if closes := " | ".join(filter(None, (self.lark.literal(calls.end + each) for each in calls.closes))):
            more += f" ({closes})"
        self.lark.rule("call", " | ".join(names))
        opens = [f"{each} {begin}" if each and calls.begin else each + begin for each in calls.opens]
        self.lark.rule("calls", f"({' | '.join(map(self.lark.literal, opens))}) call{more}")
        self.lark.rule("called", f"({self._called(calls, opens, allowed)}){more}")
        return True

    def _called(self, calls: CallFormat, opens: list[str], allowed: list[int]) -> str:
        """The first call where a text might stand instead; other than at the start, without the trigger."""
        lark = self.lark
        after = [lark.literal(each.removeprefix(trigger)) for each, trigger in zip(opens, calls.triggers, strict=True)]
        if not calls.is_at_start:
            return f"{after[0]} call"
        ways: list[str] = []
        for i, (trigger, rest) in enumerate(zip(calls.triggers, after, strict=True)):
            if not isinstance(calls.style, KeywordArguments) or lark.is_special(trigger):
                ways.append(f"{lark.opening(f'opening_{i}', trigger)} {rest} call")
                continue
            # A list of anything else is a text: only with the bracket of a call it is none.
            for j in allowed:
                head = f'{SPACES} {quoted(trigger)} {SPACES} {quoted(self._tools[j].name)} {SPACES} "("'
                opening = lark.rule(f"opening_{i}_{j}[lazy]", lark.rule(f"OPENING_{i}_{j}", head))
                ways.append(f'{opening} first_{j}_0 ")"')
        return " | ".join(ways)

    def _call(self, calls: CallFormat, i: int, tool: Tool) -> str:
        """From the name of a tool to the end of its arguments."""
        lark, name = self.lark, quoted(tool.name)
        match calls.style:
            case JsonBody(key):
                before = lark.literal(f'" , "{key}" : ')
                return f"{name} {before} {self._schema(f'tool_{i}', schema_of(tool))} {lark.literal(' }')}"
            case JsonArguments(after_names):
                return f"{name} {lark.literal(after_names[0])} {self._schema(f'tool_{i}', schema_of(tool))}"
            case TaggedArguments() as style:
                return f"{name} {lark.literal(style.after_name.rstrip())} {self._tagged(style, i, tool)}"
            case KeywordArguments():
                return f'{name} "(" {self._keywords(i, tool)} ")"'

    def _schema(self, name: str, schema: str) -> str:
        self.schemas[name] = schema
        return f"@{name}"

    # -------------------------------------------------------------------------------------- arguments one by one

    def _written(self, i: int, tool: Tool, is_writable: Callable[[Parameter], bool]) -> list[Parameter]:
        """The parameters that can be written. Raises ConstraintInvalid if one that is required cannot."""
        self.unenforced += [Unenforced(tool.name, "", keyword) for keyword in ignored_keywords(tool)]
        found = parameters(tool)
        if wrong := [each for each in found if each.is_required and not is_writable(each)]:
            why = "is required, and cannot be written in the format of the model's tool calls"
            problems = [ConstraintProblem(each.pointer, "", why) for each in wrong]
            raise ConstraintInvalid(f"tools[{i}].parameters", problems)
        return [each for each in found if is_writable(each)]

    def _tagged(self, style: TaggedArguments, i: int, tool: Tool) -> str:
        marker = style.end.strip()
        written = self._written(
            i, tool, lambda each: each.is_tag and (each.texts is None or each.texts_without(marker) != [])
        )
        end = self.lark.literal(style.end, is_exact=True)
        parts = []
        for j, each in enumerate(written):
            before = self.lark.literal(f" {style.key}") + quoted(each.name)
            before += self.lark.literal(style.value.removesuffix("\n"))
            if style.value.endswith("\n"):
                before += quoted("\n")
            if each.texts is not None:
                value = f"({' | '.join(map(quoted, each.texts_without(marker)))}) {end}"
            elif each.is_text or each.allows_any_text:
                value = self._tagged_text(style.end, each)
                self.unenforced += [Unenforced(tool.name, each.pointer, keyword) for keyword in each.ignored_keywords]
            else:
                value = f"{self._value(i, j, each)} {end}"
            rule = self.lark.rule(f"call_{i}_{j}", f"{before} {value}")
            parts.append(rule if each.is_required else f"{rule}?")
        return " ".join(parts)

    def _tagged_text(self, end: str, parameter: Parameter) -> str:
        """A value that is a text as it is, and what ends it."""
        lark, marker = self.lark, end.lstrip()
        gap = end.removesuffix(marker)
        text = lark.without([marker])
        name = "value"
        if (lengths := parameter.lengths) is not None:
            least, most = lengths
            text = f"/(?s:.{{{least},{'' if most is None else most}}})/ & {text}"
            name = f"value_{least}_{'' if most is None else most}"
        if gap:
            text = f"({text}) {quoted(gap)}"
        return lark.up_to(name, marker, text)

    def _keywords(self, i: int, tool: Tool) -> str:
        """All parameters in their order, with commas between those that are there."""
        written = self._written(i, tool, lambda each: each.is_keyword)
        for j, each in enumerate(written):
            this = f"{quoted(f'{each.name}=')} {self._value(i, j, each)} more_{i}_{j + 1}"
            skip = "" if each.is_required else f" | {{}}_{i}_{j + 1}"
            self.lark.rule(f"first_{i}_{j}", this + skip.format("first"))
            self.lark.rule(f"more_{i}_{j}", f'"," {SPACE}? {this}' + skip.format("more"))
        for name in ("first", "more"):
            self.lark.rule(f"{name}_{i}_{len(written)}", '""')
        return f"first_{i}_0"

    def _value(self, i: int, j: int, parameter: Parameter) -> str:
        """A value as JSON, or as Python writes what both know."""
        if parameter.is_truth:
            return self.lark.rule("truth", '"true" | "false" | "True" | "False"')
        return self._schema(f"tool_{i}_param_{j}", parameter.text)
