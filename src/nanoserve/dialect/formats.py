"""The table: how each family writes its reasoning and its calls, and how it is known by its chat template.

A call stands in a frame, and has its arguments in one of four styles:

    opens  begin ── the call ── end  between  begin ── the call ── end  closes

    JsonBody          {"name": "f", "arguments": {"a": 1}}
    JsonArguments     f  after_names  {"a": 1}
    TaggedArguments   f  after_name   key a value 1 end   key b value 2 end
    KeywordArguments  f(a=1, b=2)

Texts in the table are as the template writes them. Whitespace in them may be missing or be more in what a model writes.
Next to a tagged value it is one line break, which is not part of the value. OPEN stands for a number or an identifier.
"""

import re
from dataclasses import dataclass, fields

OPEN = "…"
# What stands behind a block that a prompt has left open has none of these: they are the markers of another turn.
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


# -------------------------------------------------------------------------------------------------------- reasoning


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Where the reasoning of a model begins and ends. A block comes before anything else."""

    # What users call it; the first is its own.
    names: tuple[str, ...]
    start: str
    end: str
    # A template that has all of these is of this format.
    signs: tuple[str, ...]
    # Of formats that put everything into a channel: what begins another message, and what an answer's begins with.
    turn: str = ""
    answer: str = ""
    # What else stands around messages, and says nothing.
    frames: tuple[str, ...] = ()
    # Blocks may also follow content or calls.
    is_repeated: bool = False

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside of a block."""
        _, start, inside = prompt.rpartition(self.start)
        return start != "" and self.end not in inside and not _MARKER.search(inside)


REASONING = (
    ReasoningFormat(
        names=("deepseek_r1", "qwen3", "glm45", "kimi_k2", "minimax_m2", "olmo3", "step3"),
        start="<think>",
        end="</think>",
        signs=("</think>",),
    ),
    ReasoningFormat(names=("mistral",), start="[THINK]", end="[/THINK]", signs=("[THINK]", "[/THINK]")),
    ReasoningFormat(names=("seed_oss",), start="<seed:think>", end="</seed:think>", signs=("</seed:think>",)),
    ReasoningFormat(
        names=("granite",),
        start="Here is my thought process:",
        end="Here is my response:",
        signs=("Here is my thought process:", "Here is my response:"),
    ),
    ReasoningFormat(
        names=("openai_gptoss",),
        start="<|channel|>analysis<|message|>",
        end="<|end|>",
        signs=("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
        turn="<|start|>assistant",
        answer="<|channel|>final<|message|>",
        frames=(
            "<|channel|>commentary<|message|>",
            "<|channel|>final <|constrain|>json<|message|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ),
        is_repeated=True,
    ),
)


# ------------------------------------------------------------------------------------------------------------ calls


@dataclass(frozen=True, slots=True)
class JsonBody:
    """An object with the name and the arguments. It may have further members, which say nothing."""

    # The key of the arguments. Those of other formats are understood as well.
    arguments: str = "arguments"


@dataclass(frozen=True, slots=True)
class JsonArguments:
    """The name, and the arguments as an object."""

    # Between them. The first is what the grammar writes, the others are understood as well.
    after_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """The name, and each argument between tags of its own: a text as it is, anything else as JSON or in Python."""

    after_name: str
    # Before an argument's name, between its name and its value, and after its value.
    key: str
    value: str
    end: str


@dataclass(frozen=True, slots=True)
class KeywordArguments:
    """A call as Python writes it, with keywords only."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How calls are written."""

    # What users call it; the first is its own.
    names: tuple[str, ...]
    # A template that has all texts of one of these is of this format.
    signs: tuple[tuple[str, ...], ...]
    style: JsonBody | JsonArguments | TaggedArguments | KeywordArguments
    # Before the first call and after the last: one of these texts.
    opens: tuple[str, ...] = ("",)
    closes: tuple[str, ...] = ("",)
    # Before and after each call, and between two. None = there can be only one.
    begin: str = ""
    end: str = ""
    between: str | None = "\n"
    # A line break before the first call, if the format puts one there.
    lead: str = ""
    # What opens a call may well stand in a text, and so counts only before any content.
    is_at_start: bool = False

    @property
    def triggers(self) -> tuple[str, ...]:
        """What a call begins with, for each of `opens`."""
        return tuple((each.split() or self.begin.split() or ["{"])[0] for each in self.opens)


# The first whose signs are there is taken, so what is more special comes before what is less.
CALLS = (
    # <tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>
    CallFormat(
        names=("qwen3_coder", "qwen3_xml"),
        signs=(("<tool_call>", "<function=", "<parameter="),),
        style=TaggedArguments(after_name=">\n", key="<parameter=", value=">\n", end="\n</parameter>"),
        begin="<tool_call>\n<function=",
        end="\n</function>\n</tool_call>",
        lead="\n",
    ),
    CallFormat(
        names=("seed_oss",),
        signs=(("<seed:tool_call>", "<function=", "<parameter="),),
        style=TaggedArguments(after_name=">\n", key="<parameter=", value=">", end="</parameter>"),
        begin="<seed:tool_call>\n<function=",
        end="\n</function>\n</seed:tool_call>",
        lead="\n",
    ),
    # <tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>
    CallFormat(
        names=("glm45", "glm47"),
        signs=(("<tool_call>", "<arg_key>", "<arg_value>"),),
        style=TaggedArguments(after_name="\n", key="<arg_key>", value="</arg_key>\n<arg_value>", end="</arg_value>"),
        begin="<tool_call>",
        end="\n</tool_call>",
        lead="\n",
    ),
    CallFormat(
        names=("minimax_m2",),
        signs=(("<minimax:tool_call>", "<invoke name="),),
        style=TaggedArguments(after_name='">\n', key='<parameter name="', value='">', end="</parameter>"),
        opens=("<minimax:tool_call>\n",),
        begin='<invoke name="',
        end="\n</invoke>",
        closes=("\n</minimax:tool_call>",),
        lead="\n",
    ),
    # <tool_calls>[{"name": "f", "arguments": {"a": 1}}]</tool_calls>
    CallFormat(
        names=("hunyuan_a13b", "jamba", "apriel"),
        signs=(("<tool_calls>[", "</tool_calls>"),),
        style=JsonBody(),
        opens=("<tool_calls>[",),
        between=", ",
        closes=("]</tool_calls>",),
        lead="\n",
    ),
    CallFormat(
        names=("nemotron_json",),
        signs=(("<TOOLCALL>[", "]</TOOLCALL>"),),
        style=JsonBody(),
        opens=("<TOOLCALL>[",),
        between=", ",
        closes=("]</TOOLCALL>",),
        lead="\n",
    ),
    CallFormat(
        names=("granite",),
        signs=(("<|tool_call|>", "<|start_of_role|>"),),
        style=JsonBody(),
        opens=("<|tool_call|>[",),
        between=", ",
        closes=("]",),
    ),
    CallFormat(
        names=("phi4_mini_json",),
        signs=(("functools[",),),
        style=JsonBody(),
        opens=("functools[",),
        between=", ",
        closes=("]",),
    ),
    # <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>
    CallFormat(
        names=("hermes",),
        signs=(("<tool_call>", "</tool_call>", '"name": ', '"arguments": '),),
        style=JsonBody(),
        begin="<tool_call>\n",
        end="\n</tool_call>",
        lead="\n",
    ),
    # [TOOL_CALLS]f[ARGS]{"a": 1}
    CallFormat(
        names=("mistral",),
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        style=JsonArguments(after_names=("[ARGS]", f"[CALL_ID]{OPEN}[ARGS]", "")),
        begin="[TOOL_CALLS]",
        between="",
    ),
    # [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]
    CallFormat(
        names=("mistral_list",),
        signs=(("[TOOL_CALLS] [",), ("[TOOL_CALLS][",)),
        style=JsonBody(),
        opens=("[TOOL_CALLS] [",),
        between=", ",
        closes=("]",),
    ),
    # <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>…
    CallFormat(
        names=("deepseek_v3",),
        signs=(("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"),),
        style=JsonArguments(after_names=("\n```json\n",)),
        opens=("<｜tool▁calls▁begin｜>",),
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        end="\n```<｜tool▁call▁end｜>",
        closes=("<｜tool▁calls▁end｜>",),
    ),
    # <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>…
    CallFormat(
        names=("deepseek_v31",),
        signs=(("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),),
        style=JsonArguments(after_names=("<｜tool▁sep｜>",)),
        opens=("<｜tool▁calls▁begin｜>",),
        begin="<｜tool▁call▁begin｜>",
        end="<｜tool▁call▁end｜>",
        between="",
        closes=("<｜tool▁calls▁end｜>",),
    ),
    # <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>…
    CallFormat(
        names=("kimi_k2",),
        signs=(("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),),
        style=JsonArguments(after_names=(f":{OPEN}<|tool_call_argument_begin|>", "<|tool_call_argument_begin|>")),
        opens=("<|tool_calls_section_begin|>",),
        begin="<|tool_call_begin|>functions.",
        end="<|tool_call_end|>",
        between="",
        closes=("<|tool_calls_section_end|>",),
    ),
    # <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}
    CallFormat(
        names=("openai",),
        signs=(("<|channel|>commentary", "functions."),),
        style=JsonArguments(
            after_names=(
                " <|constrain|>json<|message|>",
                "<|channel|>commentary <|constrain|>json<|message|>",
                "<|channel|>commentary json<|message|>",
                "<|channel|>commentary<|message|>",
                " json<|message|>",
                "<|message|>",
            )
        ),
        opens=("<|channel|>commentary to=functions.", "to=functions."),
        between=None,
        is_at_start=True,
    ),
    # <function_calls>\nf(a=1)\ng()\n</function_calls>
    CallFormat(
        names=("olmo3",),
        signs=(("<function_calls>", "</function_calls>"),),
        style=KeywordArguments(),
        opens=("<function_calls>\n", "<function_calls>"),
        closes=("\n</function_calls>",),
        lead="\n",
    ),
    CallFormat(
        names=("lfm2",),
        signs=(("<|tool_call_start|>", "<|tool_call_end|>"),),
        style=KeywordArguments(),
        opens=("<|tool_call_start|>[",),
        between=", ",
        closes=("]<|tool_call_end|>",),
    ),
    # [f(a=1, b="x"), g()]
    CallFormat(
        names=("llama4_pythonic",),
        signs=(("<|header_start|>", "[func_name1("),),
        style=KeywordArguments(),
        opens=("[", "<|python_start|>["),
        between=", ",
        closes=("]", "]<|python_end|>"),
        is_at_start=True,
    ),
    CallFormat(
        names=("pythonic",),
        signs=(("[func_name1(",),),
        style=KeywordArguments(),
        opens=("[",),
        between=", ",
        closes=("]",),
        is_at_start=True,
    ),
    # {"name": "f", "parameters": {"a": 1}}
    CallFormat(
        names=("llama3_json", "llama4_json"),
        signs=(
            ("<|start_header_id|>", '{"name": ', '"parameters": '),
            ("<|header_start|>", '{"name": ', '"parameters": '),
        ),
        style=JsonBody(arguments="parameters"),
        opens=("", "<|python_tag|>"),
        between="; ",
        is_at_start=True,
    ),
    # ```json\n{"name": "f", "parameters": {"a": 1}}\n```
    CallFormat(
        names=("gemma_json",),
        signs=(("<start_of_turn>", "```json"), ("<start_of_turn>", "```tool_code")),
        style=JsonBody(arguments="parameters"),
        opens=("```json\n", "```tool_code\n"),
        between=", ",
        closes=("\n```",),
        is_at_start=True,
    ),
)
# Formats that share their signs with one above, and are none of the table.
_OTHERS = ("<tool_sep>", "<｜DSML｜", "<|/tool_call|>")


# -------------------------------------------------------------------------------------------------------- a dialect


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model writes. Either half may be missing."""

    reasoning: ReasoningFormat | None = None
    calls: CallFormat | None = None

    @property
    def texts(self) -> list[str]:
        """All that the model writes to mark reasoning and calls."""
        texts: list[str] = []
        if reasoning := self.reasoning:
            texts += [reasoning.start, reasoning.end, reasoning.turn, reasoning.answer, *reasoning.frames]
        if calls := self.calls:
            texts += [*calls.opens, *calls.closes, calls.begin, calls.end, calls.between or ""]
            for each in fields(calls.style):
                value = getattr(calls.style, each.name)
                texts += [value] if isinstance(value, str) else value
        return [text for text in texts if text]

    def describe(self) -> str:
        """In a line."""
        reasoning = f"reasons like {self.reasoning.names[0]}" if self.reasoning else "no reasoning is known"
        return f"{reasoning}, " + (f"calls tools like {self.calls.names[0]}" if self.calls else "no calls of tools are")


def reasoning_format(name: str) -> ReasoningFormat:
    """By one of its names. Raises ValueError."""
    for each in REASONING:
        if name in each.names:
            return each
    raise ValueError(f"reasoning format {name!r} is not known; known: {_known(REASONING)}")


def call_format(name: str) -> CallFormat:
    """By one of its names. Raises ValueError."""
    for each in CALLS:
        if name in each.names:
            return each
    raise ValueError(f"format of tool calls {name!r} is not known; known: {_known(CALLS)}")


def detect(template: str) -> Dialect:
    """The dialect of a chat template, each half of it None unless the template shows the format's own signs."""
    reasoning = next((each for each in REASONING if all(sign in template for sign in each.signs)), None)
    if any(other in template for other in _OTHERS):
        return Dialect(reasoning, None)
    # In some templates the examples are within strings, with their quotes escaped.
    plain = template.replace('\\"', '"')
    calls = next((each for each in CALLS if any(all(i in plain for i in signs) for signs in each.signs)), None)
    return Dialect(reasoning, calls)


def _known(formats: tuple[ReasoningFormat, ...] | tuple[CallFormat, ...]) -> str:
    return ", ".join(sorted(name for each in formats for name in each.names))
