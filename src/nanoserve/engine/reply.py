"""What a reply in a conversation may be, and what is read out of it.

    tools, choice, constraint ──┐                       ┌──▶ Constraint of the whole output ──▶ the step loop
    dialect of the model ───────┼── Reply ── prompt ────┤
    what the caller wants told ─┘                       └──▶ Reader of each sequence's text ──▶ Parts, Outcome

A conversation's constraint holds for the answer: reasoning comes before it, and calls of tools may come instead.
"""

import functools
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanoserve.constraint.outcome import Outcome, Validator
from nanoserve.dialect.formats import Dialect
from nanoserve.dialect.grammar import Skeleton, skeleton
from nanoserve.dialect.parser import Arguments, CallBegun, CallEnded, Content, Event, OutputParser, Reasoning
from nanoserve.dialect.tools import Choosing, ToolChoice, ToolUse
from nanoserve.errors import ConstraintInvalid, ConstraintProblem, InvalidRequest, Violation
from nanoserve.request import Constraint, ConstraintKind, KeywordUse, Treatment

# Of a schema that a grammar of calls refers to by name.
_NOT_IN_FORMAT = "cannot be enforced in the way that the model writes calls"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants of the output, besides the prompt and the parameters. The default is nothing."""

    # Of the answer; of the whole output if is_from_start, or if the prompt is no conversation.
    constraint: Constraint | None = None
    is_from_start: bool = False
    # Reasoning, content and calls are told apart.
    parse: bool = False


@dataclass(slots=True)
class CallPiece:
    """More of a call."""

    index: int
    # In the first piece alone.
    id: str = ""
    name: str = ""
    arguments: str = ""
    # In the last piece alone.
    is_complete: bool = False


@dataclass(slots=True)
class Parts:
    """What a text adds to the parts of an output, in this order if it was not joined against it."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def may_precede(self, other: "Parts") -> bool:
        """Whether the two can be joined, and still stand in their order."""
        return not (self.calls and (other.content or other.reasoning)) and not (self.content and other.reasoning)

    def add(self, other: "Parts") -> None:
        self.reasoning += other.reasoning
        self.content += other.content
        for piece in other.calls:
            last = self.calls[-1] if self.calls else None
            if last is not None and last.index == piece.index:
                last.arguments += piece.arguments
                last.is_complete = piece.is_complete
            else:
                self.calls.append(replace(piece))


@dataclass(frozen=True, slots=True)
class Reply:
    """What is known of a reply once its prompt is rendered."""

    wanted: Wanted
    tool_use: ToolUse
    dialect: Dialect
    # The prompt has opened a block of reasoning.
    is_reasoning: bool
    # What the step loop holds all of the output to.
    constraint: Constraint | None
    # Keywords of tools' schemas that the grammar of their calls leaves out.
    relaxed: tuple[KeywordUse, ...] = ()
    # Special tokens that mark its parts.
    marks: frozenset[int] = frozenset()

    @property
    def is_read(self) -> bool:
        """The parts of the output are wanted, or needed to check it in the end: a tool that is not strict, or a relaxed
        answer, may turn out to be."""
        is_loose = self.constraint is not None and any(part.is_relaxed for _, part in self.constraint.parts)
        return self.wanted.parse or is_loose or bool(self.relaxed)

    def reader(self) -> "Reader":
        return Reader(self)


def plan_reply(
    wanted: Wanted,
    tool_use: ToolUse,
    dialect: Dialect,
    prompt: str,
    *,
    begins_message: bool,
    max_reasoning_tokens: int | None,
    special_id: Callable[[str], int | None],
) -> Reply:
    """prompt: the rendered conversation. begins_message: the output is a message from its beginning.
    special_id: of a special token, by its text.

    Raises ConstraintInvalid, and InvalidRequest if what is wanted takes a dialect that is not known.
    """
    _check_known(dialect, tool_use, max_reasoning_tokens)
    reasoning = dialect.reasoning
    is_reasoning = reasoning is not None and reasoning.is_open(prompt)
    has_closed = reasoning is not None and prompt.rstrip().endswith(reasoning.end)
    may_reason = reasoning is not None and begins_message and not has_closed
    answer = wanted.constraint
    may_call = bool(tool_use.allowed) and dialect.calls is not None
    needs_grammar = (
        (may_call and tool_use.is_held)
        or (answer is not None and (is_reasoning or may_reason or may_call))
        or (max_reasoning_tokens is not None and (is_reasoning or may_reason))
    )
    if answer is not None and wanted.is_from_start:
        return Reply(wanted, ToolUse(), dialect, is_reasoning=False, constraint=answer)
    if not needs_grammar:
        return Reply(wanted, tool_use, dialect, is_reasoning, answer)
    write = functools.partial(
        skeleton,
        dialect,
        tool_use.tools if may_call else (),
        tool_use.choice if may_call else ToolChoice(Choosing.NONE),
        parallel=tool_use.parallel,
        is_reasoning=is_reasoning,
        # Of no tokens there is no block to be closed.
        may_reason=may_reason and max_reasoning_tokens != 0,
        answer=answer is not None,
        special_id=special_id,
    )
    try:
        whole = write()
    except ConstraintInvalid as error:
        raise ConstraintInvalid(_path_in_contract(error.field), error.problems) from error
    constraint = Constraint(
        ConstraintKind.DIALECT,
        whole.lark,
        field="chat.tools" if answer is None else answer.path,
        parts=_parts(whole, tool_use, answer),
        closing_text="" if max_reasoning_tokens is None else write(closes_reasoning=True).lark,
        is_reasoning=is_reasoning,
    )
    return Reply(wanted, tool_use, dialect, is_reasoning, constraint, _relaxed(whole, tool_use))


def _check_known(dialect: Dialect, tool_use: ToolUse, max_reasoning_tokens: int | None) -> None:
    """Raise InvalidRequest if what is wanted takes a dialect that is not known."""
    if max_reasoning_tokens is not None and dialect.reasoning is None:
        why = "how the model writes its reasoning is not known; the server's --reasoning-parser says it"
        raise InvalidRequest([Violation("stopping.max_reasoning_tokens", why)])
    if tool_use.allowed and dialect.calls is None and tool_use.is_held:
        why = "how the model writes calls of tools is not known; the server's --tool-call-parser says it"
        raise InvalidRequest([Violation("chat.tool_choice", why)])


def _path_in_contract(field_: str) -> str:
    """tool_choice, or tools[2].parameters."""
    return f"chat.{field_}_json" if field_.endswith("parameters") else f"chat.{field_}"


def _tool_path(number: int) -> str:
    return f"chat.tools[{number}].parameters_json"


def _parts(whole: Skeleton, tool_use: ToolUse, answer: Constraint | None) -> tuple[tuple[str, Constraint], ...]:
    parts = []
    for name, schema in whole.schemas.items():
        # tool_2, or tool_2_param_0.
        number = int(name.split("_")[1])
        is_relaxed = not tool_use.tools[number].is_strict
        parts.append((name, Constraint(ConstraintKind.JSON_SCHEMA, schema, is_relaxed, _tool_path(number))))
    if answer is not None:
        parts.append(("answer", replace(answer, field=answer.path)))
    return tuple(parts)


def _relaxed(whole: Skeleton, tool_use: ToolUse) -> tuple[KeywordUse, ...]:
    """Raises ConstraintInvalid if something of a strict tool's schema cannot be enforced."""
    numbers = {tool.name: number for number, tool in enumerate(tool_use.tools)}
    uses = []
    for each in whole.unenforced:
        number = numbers[each.tool]
        if tool_use.tools[number].is_strict:
            problem = ConstraintProblem(each.pointer, each.keyword, _NOT_IN_FORMAT)
            raise ConstraintInvalid(_tool_path(number), [problem])
        uses.append(KeywordUse(each.pointer, each.keyword, Treatment.RELAXED, _NOT_IN_FORMAT, _tool_path(number)))
    return tuple(uses)


class Reader:
    """Reads the text of one sequence, special tokens spelled out. Event loop only, but for `outcome`."""

    def __init__(self, reply: Reply) -> None:
        self._answer = reply.wanted.constraint
        self._tools = reply.tool_use.tools
        tools = [self._tools[i] for i in reply.tool_use.allowed]
        self._parser = OutputParser(reply.dialect, tools, is_reasoning=reply.is_reasoning)
        # All that was read.
        self.parts = Parts()
        # Tokens that were read while the model reasoned.
        self.num_reasoning_tokens = 0

    def push(self, text: str, *, num_tokens: int) -> list[Parts]:
        """The text of one token, or of none, and of what was held before it. Several parts where one would lose the
        order."""
        if self._parser.is_reasoning:
            self.num_reasoning_tokens += num_tokens
        return self._note(self._parser.push(text))

    def finish(self, *, is_complete: bool) -> list[Parts]:
        """No more will come. is_complete: nothing cut it off."""
        return self._note(self._parser.finish(is_complete=is_complete))

    def _note(self, events: Sequence[Event]) -> list[Parts]:
        noted: list[Parts] = []
        for parts in map(_parts_of, events):
            self.parts.add(parts)
            if noted and noted[-1].may_precede(parts):
                noted[-1].add(parts)
            else:
                noted.append(parts)
        return noted

    def outcome(self, relaxed: Sequence[KeywordUse]) -> Outcome:
        """Of an output that its grammar lets end, from which some keywords were left out. Off the loop."""
        fields = {use.field for use in relaxed}
        if self.parts.calls:
            schemas = {tool.name: tool.parameters for tool in self._tools}
            names = {tool.name: _tool_path(number) for number, tool in enumerate(self._tools)}
            checked = [
                Validator(json.dumps(schemas[call.name])).accepts(call.arguments)
                for call in self.parts.calls
                if names[call.name] in fields
            ]
        elif self._answer is not None and self._answer.path in fields:
            checked = [Validator(self._answer.text).accepts(self.parts.content)]
        else:
            checked = []
        return Outcome.RELAXED_OK if all(checked) else Outcome.RELAXED_VIOLATED


def _parts_of(event: Event) -> Parts:
    match event:
        case Reasoning(text):
            return Parts(reasoning=text)
        case Content(text):
            return Parts(content=text)
        case CallBegun(index, name):
            return Parts(calls=[CallPiece(index, f"call_{secrets.token_hex(12)}", name)])
        case Arguments(index, text):
            return Parts(calls=[CallPiece(index, arguments=text)])
        case CallEnded(index):
            return Parts(calls=[CallPiece(index, is_complete=True)])
