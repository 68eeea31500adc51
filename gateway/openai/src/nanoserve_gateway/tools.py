"""Tools that the model may call, and the calls that it makes, as OpenAI has them. Pure.

    tools · tool_choice · parallel_tool_calls · functions · function_call  ─▶ Tools ─▶ the contract's Chat
    Delta, Completion ─▶ Telling ─▶ what of a chat's message is reasoning, content, and calls

Nothing is executed here: who asks makes the calls, and sends their answers in the next request.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoserve_client import ChatOptions, Completion, Delta, FinishReason, MadeCall, TokenizeOptions
from nanoserve_client.v1 import generation_pb2 as pb
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion_message import FunctionCall
from openai.types.chat.chat_completion_message_function_tool_call import Function

from nanoserve_gateway.answer import WHOLE

_MODES = {
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
# What chooses among which tools. The second pair is OpenAI's older one.
_CHOICES = {"tool_choice": "tools", "function_call": "functions"}


class Tools:
    """What a request says of tools, in any of the APIs."""

    def __init__(self, fields: Mapping[str, Any], *, strict: bool = False) -> None:
        """fields: as Schema.parse returns them. strict: what a tool is that does not say it."""
        self._fields, self._strict = fields, strict
        # OpenAI's older names, of which the answer has them too.
        self.are_functions = bool(fields.get("functions"))
        self._given: Sequence[Mapping[str, Any]] = fields.get("tools") or fields.get("functions") or ()
        self._list = "functions" if self.are_functions else "tools"
        self._field = "function_call" if self.are_functions else "tool_choice"
        # The names that are chosen, each with its place in the request.
        self._mode, self._named = _chosen(self._field, fields.get(self._field))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._given)

    @property
    def rules(self) -> Sequence[tuple[bool, str, str]]:
        """For `check`."""
        fields = self._fields
        keeps_marks = not fields.get("skip_special_tokens", True)
        allowed = self._mode is not None and isinstance(fields.get(self._field), Mapping)
        return (
            (bool(fields.get("tools")) and self.are_functions, "functions", "are given beside tools"),
            *((self._is_stray(name), name, f"is for {its} only") for name, its in _CHOICES.items()),
            (allowed and not self._named, self._field, "allows no tool"),
            (
                bool(self) and keeps_marks,
                "skip_special_tokens",
                f"must be true with {self._list}: else calls are not told from text",
            ),
        )

    def _is_stray(self, name: str) -> bool:
        """A choice without its tools; of none at all none may be chosen, or whatever there is."""
        asked = self._fields.get(name)
        if asked is None or self._fields.get(_CHOICES[name]):
            return False
        return bool(self) or asked not in ("none", "auto")

    @property
    def options(self) -> ChatOptions:
        """For the client; the choice goes by `choose`."""
        if not self:
            return {}
        # There is room for one function_call in an answer.
        parallel = False if self.are_functions else self._fields.get("parallel_tool_calls")
        return {"tools": [self._tool(given) for given in self._given], "parallel_tool_calls": parallel}

    @property
    def tokenize_options(self) -> TokenizeOptions:
        """For the client: what of it is part of the prompt."""
        return {} if self._mode == "none" or not self else {"tools": self.options["tools"]}

    def choose(self, chat: pb.Chat) -> None:
        """Put the choice into a conversation. The client's options have no word for each that there is here, and none
        for a tool that is called `auto`."""
        if self and self._mode is not None:
            names = [name for name, _ in self._named]
            chat.tool_choice.CopyFrom(pb.ToolChoice(mode=_MODES[self._mode], names=names))

    @property
    def names(self) -> Mapping[str, str]:
        """What the caller calls the contract's fields."""
        places = {"chat.tools": self._list, "chat.tool_choice": self._field}
        for number, given in enumerate(self._given):
            place = f"{self._list}[{number}]" + (".function" if "function" in given else "")
            places[f"chat.tools[{number}].parameters_json"] = f"{place}.parameters"
            places[f"chat.tools[{number}]"] = place
        chosen = {f"chat.tool_choice.names[{number}]": place for number, (_, place) in enumerate(self._named)}
        return {**places, "chat.tool_choice.mode": self._field, **chosen}

    def _tool(self, given: Mapping[str, Any]) -> dict[str, Any]:
        asked = given.get("function", given)
        tool = {name: asked[name] for name in ("name", "description", "parameters") if asked.get(name) is not None}
        strict = asked.get("strict")
        return {**tool, "strict": self._strict if strict is None else strict}


def _chosen(field: str, asked: str | Mapping[str, Any] | None) -> tuple[str | None, list[tuple[str, str]]]:
    """The mode, and names with their places."""
    if asked is None or isinstance(asked, str):
        return asked, []
    if asked.get("type") != "allowed_tools":
        return "required", [_named(field, asked)]
    place, allowed = field, asked
    if "allowed_tools" in asked:  # chat has an object within, responses have not
        place, allowed = f"{field}.allowed_tools", asked["allowed_tools"]
    return allowed["mode"], [_named(f"{place}.tools[{i}]", tool) for i, tool in enumerate(allowed["tools"])]


def _named(place: str, tool: Mapping[str, Any]) -> tuple[str, str]:
    return (
        (tool["function"]["name"], f"{place}.function.name") if "function" in tool else (tool["name"], f"{place}.name")
    )


class Telling:
    """What becomes of the parts of a chat's output. It knows which calls of which choice are complete."""

    def __init__(self, *, is_parsed: bool, has_reasoning: bool, are_functions: bool) -> None:
        """is_parsed: the service tells the parts apart. has_reasoning: the answer has it too. are_functions: calls go
        by OpenAI's older name."""
        self._is_parsed, self._has_reasoning, self._are_functions = is_parsed, has_reasoning, are_functions
        # By choice and call.
        self._is_complete: defaultdict[int, dict[int, bool]] = defaultdict(dict)

    def pieces(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """What chunks say of new output, in the order in which the model wrote it."""
        if delta.reasoning and self._has_reasoning:
            yield _reasoning(delta.reasoning)
        if content := (delta.content if self._is_parsed else delta.text):
            yield {"content": content}
        for piece in delta.tool_calls:
            calls = self._is_complete[delta.index]
            if piece.index not in calls:
                head = {"index": piece.index, "id": piece.id, "type": "function"}
                yield self._call(head, {"name": piece.name, "arguments": ""})
            calls[piece.index] = piece.is_complete
            if piece.arguments:
                yield self._call({"index": piece.index}, {"arguments": piece.arguments})

    def _call(self, head: Mapping[str, Any], function: Mapping[str, str]) -> dict[str, Any]:
        if self._are_functions:
            return {"function_call": function}
        return {"tool_calls": [{**head, "function": function}]}

    def finish_reason(self, delta: Delta, reason: FinishReason) -> str:
        """Of a choice whose last delta was told."""
        return self._reason(reason, list(self._is_complete[delta.index].values()))

    def finish_reason_of(self, completion: Completion) -> str:
        return self._reason(completion.finish_reason, [call.is_complete for call in completion.tool_calls])

    def _reason(self, reason: FinishReason, are_complete: Sequence[bool]) -> str:
        """A call that was cut off is none to be made, whatever cut it off. OpenAI says `stop` of the calls of one
        certain tool that was asked for; clients that wait for `tool_calls` would not make them."""
        if reason not in WHOLE:
            return "length"
        if not are_complete or not all(are_complete):
            return "stop"
        return "function_call" if self._are_functions else "tool_calls"

    def message(self, completion: Completion) -> ChatCompletionMessage:
        """The whole of a choice."""
        parts: dict[str, Any] = {}
        if completion.reasoning and self._has_reasoning:
            parts |= _reasoning(completion.reasoning)
        if completion.tool_calls and self._are_functions:
            [call, *_] = completion.tool_calls
            parts["function_call"] = FunctionCall(name=call.name, arguments=call.arguments)
        elif completion.tool_calls:
            parts["tool_calls"] = [_made(call) for call in completion.tool_calls]
        content: str | None = completion.text if completion.content is None else completion.content
        if completion.tool_calls and not content:
            content = None
        return ChatCompletionMessage(role="assistant", content=content, refusal=None, **parts)


def _reasoning(text: str) -> dict[str, str]:
    """vLLM calls it by the second name today; the first is DeepSeek's, and was vLLM's. Clients look for either."""
    return {"reasoning_content": text, "reasoning": text}


def _made(call: MadeCall) -> ChatCompletionMessageFunctionToolCall:
    function = Function(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=call.id, type="function", function=function)
