"""Proto to domain: what a request asks for, or everything that is wrong with it.

Every rule of the contract that needs no engine is here, most of them in tables. A function reports all violations of a
message at once, each by the path of its field, and refuses what it does not know: proto3 would drop a field of a newer
client without a word, and the caller would believe that it had counted. messages.py is the way back.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

from nanoserve.adapter.folders import name_problem
from nanoserve.dialect.tools import NAME as TOOL_NAME
from nanoserve.dialect.tools import Choosing, Tool, ToolChoice, ToolUse
from nanoserve.engine.chat_template import Chat
from nanoserve.engine.engine import ServedModel
from nanoserve.engine.reply import Wanted
from nanoserve.errors import InvalidRequest, ModelNotFound, Violation
from nanoserve.request import SAMPLING_RANGES, Constraint, ConstraintKind, Range, SamplingParams

# Checking stops here: a message of 16 MiB has room for millions of violations.
MAX_VIOLATIONS = 1000
MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKENS = 1024
MAX_SALT_CHARS = 256
MAX_TOOLS = 128
LOGIT_BIAS_RANGE = Range(-100, 100)
SEQUENCES_RANGE = Range(1, 128)
PRIORITY_RANGE = Range(-100, 100)
ALTERNATIVES_RANGE = Range(0, 20)
DRAFT_TOKENS_RANGE = Range(0, 64)
# Of WatchEngine's snapshots, in seconds.
INTERVAL_RANGE_S = Range(0.05, 60)
DEFAULT_INTERVAL_S = 1.0
# How long the requests of an adapter that is unloaded may take, in seconds.
DRAIN_RANGE_S = Range(0, 3600)
DEFAULT_DRAIN_S = 30.0
MAX_PATH_CHARS = 4096

CHOOSING = {generation_pb2.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{each.name}"): each for each in Choosing}
# As chat templates know them. 0 is ROLE_UNSPECIFIED.
ROLES = {value: name.removeprefix("ROLE_").lower() for name, value in generation_pb2.Role.items() if value != 0}


# Whether there is an adapter of a name.
IsAdapter = Callable[[str], bool]


def _is_none(_name: str) -> bool:
    return False


class Violations:
    """What is wrong with one message, as far as it was checked."""

    def __init__(self, request: Message) -> None:
        self._found: list[Violation] = []
        for path, description in _unknown_fields(request, ""):
            self.add(path, description)

    def add(self, path: str, description: str) -> None:
        self._found.append(Violation(path, description))
        if len(self._found) == MAX_VIOLATIONS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        if self._found:
            raise InvalidRequest(self._found)

    def number(self, path: str, value: float, allowed: Range) -> None:
        if value not in allowed:
            # A float came as one of 32 bits, whose further digits nobody wrote.
            shown = value if isinstance(value, int) else f"{value:g}"
            self.add(path, f"{shown} is not allowed; allowed: {allowed}")

    def required(self, path: str, value: str) -> None:
        if not value:
            self.add(path, "is required")

    def adapter_name(self, path: str, name: str, model: ServedModel) -> None:
        if (problem := name_problem(name, model.name)) is not None:
            self.add(path, problem)

    def count(self, path: str, values: Collection[Any], most: int) -> bool:
        """Whether there are at most `most`, so that each is worth a look."""
        if len(values) > most:
            self.add(path, f"has {len(values)} entries; at most {most} are allowed")
        return len(values) <= most

    def seconds(self, path: str, value: Duration) -> float | None:
        """The length of a duration; None, and a violation, if it is none."""
        try:
            value.ToJsonString()
        except ValueError as error:
            self.add(path, f"is no valid google.protobuf.Duration: {error}")
            return None
        return value.seconds + value.nanos / 1e9

    def token_ids(self, path: str, ids: Sequence[int], vocab_size: int) -> None:
        """One violation for all of the list, by its first bad id."""
        if ids and max(ids) >= vocab_size:
            index, first = next((i, t) for i, t in enumerate(ids) if t >= vocab_size)
            self.add(f"{path}[{index}]", f"{first} is not a token id; allowed: 0 to {vocab_size - 1}")

    def json_object(self, path: str, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
            # An escaped half of a surrogate pair is JSON, but no text.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            self.add(path, f"is not JSON: {error}")
            return {}
        if not isinstance(value, dict):
            self.add(path, "must be a JSON object")
            return {}
        return value


# ---------------------------------------------------------------------------------------- one for each RPC


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a GenerateRequest asks for, as far as it has to be looked at."""

    prompt: str | list[int] | Chat
    params: SamplingParams
    # None = as is usual for the prompt's kind.
    add_special_tokens: bool | None
    # The constraint in it was only checked for its form.
    wanted: Wanted
    # Name of one, which may not exist. Empty = none.
    adapter: str


def generation(request: generation_pb2.GenerateRequest, model: ServedModel, is_adapter: IsAdapter = _is_none) -> Asked:
    """The rest holds as the message has it. is_adapter: whether there is one of a name.

    Raises ModelNotFound, else InvalidRequest with every violation.
    """
    check_model(request.model, model, is_adapter)
    violations = Violations(request)
    adapter = _adapter(request, model, violations)
    prompt = _prompt(request, model, violations)
    n = request.n if request.HasField("n") else 1
    violations.number("n", n, SEQUENCES_RANGE)
    violations.number("priority", request.priority, PRIORITY_RANGE)
    if len(request.cache.salt) > MAX_SALT_CHARS:
        violations.add("cache.salt", f"has more than {MAX_SALT_CHARS} characters")
    add_special_tokens = _if_set(request, "add_special_tokens")
    if add_special_tokens and isinstance(prompt, list):
        violations.add("add_special_tokens", "is not for token_ids, which are used verbatim")
    if request.stopping.strings and request.output.omit_text:
        violations.add("stopping.strings", "cannot be found with output.omit_text")
    changes = {
        "n": n,
        **_sampling(request.sampling, model, violations),
        **_stopping(request.stopping, model, violations),
        **_output(request.output, violations),
        **_speculation(request, model, violations),
    }
    wanted = _wanted(request, violations)
    violations.raise_if_any()
    return Asked(prompt, dataclasses.replace(model.default_params, **changes), add_special_tokens, wanted, adapter)


def tokenization(
    request: model_pb2.TokenizeRequest, model: ServedModel, is_adapter: IsAdapter = _is_none
) -> tuple[str | Chat, bool | None]:
    """What is to be tokenized, and add_special_tokens. Raises as generation() does."""
    check_model(request.model, model, is_adapter)
    violations = Violations(request)
    prompt: str | Chat = request.text
    if request.HasField("chat"):
        prompt = _chat(request.chat, violations)
    elif not request.HasField("text"):
        violations.add("prompt", "one of text and chat is required")
    violations.raise_if_any()
    return prompt, _if_set(request, "add_special_tokens")


def detokenization(
    request: model_pb2.DetokenizeRequest, model: ServedModel, is_adapter: IsAdapter = _is_none
) -> list[int]:
    """The token ids. Raises as generation() does."""
    check_model(request.model, model, is_adapter)
    violations = Violations(request)
    violations.token_ids("token_ids", request.token_ids, model.vocab_size)
    violations.raise_if_any()
    return list(request.token_ids)


def constraint_check(
    request: model_pb2.CheckConstraintRequest, model: ServedModel, is_adapter: IsAdapter = _is_none
) -> Constraint:
    """The constraint, of which only the form is checked. Raises as generation() does."""
    check_model(request.model, model, is_adapter)
    violations = Violations(request)
    constraint = _constraint(request.constraint, violations)
    violations.raise_if_any()
    return constraint


def request_id(request: admin_pb2.CancelRequest | admin_pb2.ExplainRequestRequest) -> str:
    """The id of the request that an operator asks about. Raises InvalidRequest."""
    violations = Violations(request)
    violations.required("request_id", request.request_id)
    violations.raise_if_any()
    return request.request_id


def watch(request: admin_pb2.WatchEngineRequest) -> float:
    """The interval in seconds. Raises InvalidRequest."""
    violations = Violations(request)
    given = _if_set(request, "interval")
    interval_s = DEFAULT_INTERVAL_S if given is None else violations.seconds("interval", given)
    if interval_s is not None:
        violations.number("interval", interval_s, INTERVAL_RANGE_S)
    violations.raise_if_any()
    assert interval_s is not None
    return interval_s


def adapter_load(request: admin_pb2.LoadAdapterRequest, model: ServedModel) -> None:
    """The message holds as it is. Raises InvalidRequest."""
    violations = Violations(request)
    violations.adapter_name("name", request.name, model)
    if len(request.path) > MAX_PATH_CHARS or not request.path.isprintable():
        violations.add("path", f"must have at most {MAX_PATH_CHARS} printable characters")
    violations.raise_if_any()


def adapter_unload(request: admin_pb2.UnloadAdapterRequest, model: ServedModel) -> float:
    """How long running requests may take, in seconds. Raises InvalidRequest."""
    violations = Violations(request)
    violations.adapter_name("name", request.name, model)
    given = _if_set(request, "drain_timeout")
    drain_s = DEFAULT_DRAIN_S if given is None else violations.seconds("drain_timeout", given)
    if drain_s is not None:
        violations.number("drain_timeout", drain_s, DRAIN_RANGE_S)
    violations.raise_if_any()
    assert drain_s is not None
    return drain_s


def nothing(request: Message) -> None:
    """For a message without fields. Raises InvalidRequest."""
    Violations(request).raise_if_any()


def check_model(name: str, model: ServedModel, is_adapter: IsAdapter) -> None:
    """Empty = the default model. An adapter's name is that of a model too. Raises ModelNotFound."""
    if name not in ("", model.name) and not is_adapter(name):
        raise ModelNotFound(name, [model.name])


# ---------------------------------------------------------------------------------------------- the parts


def _adapter(request: generation_pb2.GenerateRequest, model: ServedModel, violations: Violations) -> str:
    """The name of the adapter that `adapter` or `model` gives; empty = none."""
    named_as_model = "" if request.model == model.name else request.model
    if request.adapter:
        violations.adapter_name("adapter", request.adapter, model)
        if named_as_model not in ("", request.adapter):
            violations.add("adapter", f"must be that of `model`, {named_as_model!r}, which is an adapter too")
    return request.adapter or named_as_model


def _prompt(
    request: generation_pb2.GenerateRequest, model: ServedModel, violations: Violations
) -> str | list[int] | Chat:
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return _chat(request.chat, violations)
    if kind == "token_ids":
        violations.token_ids("token_ids.ids", request.token_ids.ids, model.vocab_size)
        if not request.token_ids.ids:
            violations.add("token_ids.ids", "must not be empty")
        return list(request.token_ids.ids)
    if kind is None:
        violations.add("prompt", "one of text, token_ids and chat is required")
    elif not request.text:
        violations.add("text", "must not be empty")
    return request.text


def _chat(chat: generation_pb2.Chat, violations: Violations) -> Chat:
    messages = [_chat_message(f"chat.messages[{i}]", message, violations) for i, message in enumerate(chat.messages)]
    if not messages:
        violations.add("chat.messages", "at least one is required")
    elif chat.continue_final_message:
        last = chat.messages[-1]
        if last.role != generation_pb2.ROLE_ASSISTANT or not (last.HasField("content") or last.content_parts):
            violations.add(
                "chat.continue_final_message",
                "the last message must be the assistant's, with content",
            )
        if chat.add_generation_prompt:
            violations.add("chat.add_generation_prompt", "cannot be true with continue_final_message")
    tool_use = _tool_use(chat, violations)
    return Chat(
        messages=messages,
        # A model that sees tools calls them.
        tools=[] if tool_use.choice.choosing is Choosing.NONE else [_tool(tool) for tool in chat.tools[:MAX_TOOLS]],
        template_kwargs=violations.json_object("chat.template_kwargs_json", chat.template_kwargs_json or "{}"),
        continue_final_message=chat.continue_final_message,
        add_generation_prompt=_if_set(chat, "add_generation_prompt"),
        parse_special_tokens=chat.parse_special_tokens,
        tool_use=tool_use,
    )


def _wanted(request: generation_pb2.GenerateRequest, violations: Violations) -> Wanted:
    output = request.output
    asked = {
        "output.parse": output.parse,
        "stopping.max_reasoning_tokens": request.stopping.HasField("max_reasoning_tokens"),
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        if not request.HasField("chat"):
            violations.add(name, "is for chat only")
        if output.keep_special_tokens:
            violations.add(name, "is not for output.keep_special_tokens")
    if output.parse and output.omit_text:
        violations.add("output.parse", "is not for output.omit_text")
    constraint = _constraint(request.constraint, violations) if request.HasField("constraint") else None
    return Wanted(constraint, request.constraint.from_start, output.parse)


def _tool_use(chat: generation_pb2.Chat, violations: Violations) -> ToolUse:
    seen: dict[str, int] = {}
    tools = []
    violations.count("chat.tools", chat.tools, MAX_TOOLS)
    for i, tool in enumerate(chat.tools[:MAX_TOOLS]):
        path = f"chat.tools[{i}]"
        if tool.name in seen:
            violations.add(f"{path}.name", f"is that of tools[{seen[tool.name]}] too")
        seen.setdefault(tool.name, i)
        schema = None
        if tool.parameters_json:
            schema = violations.json_object(f"{path}.parameters_json", tool.parameters_json)
        if schema is not None and schema.get("type", "object") != "object":
            violations.add(f"{path}.parameters_json", 'must be the schema of an object, with "type": "object"')
        if TOOL_NAME.fullmatch(tool.name):
            tools.append(Tool(tool.name, schema, tool.strict))
        else:
            violations.add(f"{path}.name", "must have 1 to 128 letters, digits or any of _ . / -")
    for name in ("tool_choice", "parallel_tool_calls"):
        if chat.HasField(name) and not chat.tools:
            violations.add(f"chat.{name}", "is for requests with tools")
    choice = _tool_choice(chat, seen, violations)
    parallel = _if_set(chat, "parallel_tool_calls")
    if parallel is None:
        parallel = choice.choosing is not Choosing.REQUIRED or len(choice.names or ()) != 1
    return ToolUse(tuple(tools), choice, parallel)


def _tool_choice(chat: generation_pb2.Chat, offered: Collection[str], violations: Violations) -> ToolChoice:
    choice = chat.tool_choice
    if not chat.HasField("tool_choice"):
        return ToolChoice()
    choosing = CHOOSING.get(choice.mode)
    if choosing is None:
        allowed = ", ".join(map(generation_pb2.ToolChoiceMode.Name, CHOOSING))
        violations.add("chat.tool_choice.mode", f"{choice.mode} is not allowed; allowed: {allowed}")
    if choosing is Choosing.NONE and choice.names:
        violations.add("chat.tool_choice.names", "are not for TOOL_CHOICE_MODE_NONE")
    for i, name in enumerate(choice.names):
        if name not in offered:
            violations.add(f"chat.tool_choice.names[{i}]", f"{name!r} is not among the tools")
    return ToolChoice(choosing or Choosing.AUTO, frozenset(choice.names) if choice.names else None)


def _chat_message(path: str, message: generation_pb2.ChatMessage, violations: Violations) -> dict[str, Any]:
    """The message as chat templates know it; a key that is not set is absent."""
    if message.role not in ROLES:
        allowed = ", ".join(map(generation_pb2.Role.Name, ROLES))
        violations.add(f"{path}.role", f"{message.role} is not allowed; allowed: {allowed}")
    has_text = message.HasField("content") or message.content_parts
    if not (has_text or message.tool_calls or message.HasField("reasoning")):
        violations.add(f"{path}.content", "is required, unless there are tool_calls or reasoning")
    if message.HasField("reasoning") and message.role != generation_pb2.ROLE_ASSISTANT:
        violations.add(f"{path}.reasoning", "is for ROLE_ASSISTANT only")
    if message.HasField("content") and message.content_parts:
        violations.add(f"{path}.content_parts", "is instead of content, not beside it")
    if message.HasField("tool_call_id") and message.role != generation_pb2.ROLE_TOOL:
        violations.add(f"{path}.tool_call_id", "is for ROLE_TOOL only")
    if message.tool_calls and message.role != generation_pb2.ROLE_ASSISTANT:
        violations.add(f"{path}.tool_calls", "are for ROLE_ASSISTANT only")
    entry: dict[str, Any] = {"role": ROLES.get(message.role, "")}
    for name in ("content", "name", "tool_call_id", "reasoning"):
        if message.HasField(name):
            entry[name] = getattr(message, name)
    if message.content_parts:
        entry["content"] = list(message.content_parts)
    if message.tool_calls:
        entry["tool_calls"] = [
            _tool_call(f"{path}.tool_calls[{i}]", call, violations) for i, call in enumerate(message.tool_calls)
        ]
    return entry


def _tool(tool: generation_pb2.Tool) -> dict[str, Any]:
    """As templates know it. What is wrong with it, _tool_use says."""
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    with contextlib.suppress(ValueError, RecursionError):
        schema = json.loads(tool.parameters_json or "{}") or schema
    function = {"name": tool.name, "description": tool.description, "parameters": schema}
    return {"type": "function", "function": function}


def _tool_call(path: str, call: generation_pb2.ToolCall, violations: Violations) -> dict[str, Any]:
    violations.required(f"{path}.name", call.name)
    arguments = violations.json_object(f"{path}.arguments_json", call.arguments_json)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _constraint(constraint: generation_pb2.Constraint, violations: Violations) -> Constraint:
    kind = constraint.WhichOneof("kind")
    if kind is None:
        kinds = [field.name for field in constraint.DESCRIPTOR.oneofs_by_name["kind"].fields]
        violations.add("constraint", f"one of {', '.join(kinds[:-1])} and {kinds[-1]} is required")
        return Constraint(ConstraintKind.JSON_OBJECT)
    if kind == "json_object" and not constraint.json_object:
        violations.add("constraint.json_object", "must be true")
    if constraint.relaxed and kind != "json_schema":
        violations.add("constraint.relaxed", f"is for json_schema only, not for {kind}")
    if kind == "choices":
        return Constraint.of_choices(constraint.choices.texts)
    text = "" if kind == "json_object" else getattr(constraint, kind)
    return Constraint(ConstraintKind(kind), text, constraint.relaxed)


def _sampling(sampling: generation_pb2.Sampling, model: ServedModel, violations: Violations) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, allowed in SAMPLING_RANGES.items():
        value = _if_set(sampling, name)
        if value is not None:
            changes[name] = value
            violations.number(f"sampling.{name}", value, allowed)
    biases = dict(sampling.logit_bias)
    if biases and violations.count("sampling.logit_bias", biases, MAX_LOGIT_BIASES):
        changes["logit_bias"] = biases
        for token_id, bias in biases.items():
            path = f"sampling.logit_bias[{token_id}]"
            violations.number(path, bias, LOGIT_BIAS_RANGE)
            if token_id >= model.vocab_size:
                violations.add(path, f"is not a token id; allowed: 0 to {model.vocab_size - 1}")
    return changes


def _speculation(request: generation_pb2.GenerateRequest, model: ServedModel, violations: Violations) -> dict[str, Any]:
    max_draft_tokens = _if_set(request, "max_draft_tokens")
    if max_draft_tokens is not None:
        violations.number("max_draft_tokens", max_draft_tokens, DRAFT_TOKENS_RANGE)
    prediction: str | tuple[int, ...] = request.predicted_text
    if request.HasField("predicted_token_ids"):
        prediction = tuple(request.predicted_token_ids.ids)
        violations.token_ids("predicted_token_ids.ids", prediction, model.vocab_size)
    return {"max_draft_tokens": max_draft_tokens, "prediction": prediction}


def _stopping(stopping: generation_pb2.Stopping, model: ServedModel, violations: Violations) -> dict[str, Any]:
    max_tokens = _if_set(stopping, "max_tokens")
    if max_tokens is not None and stopping.min_tokens > max_tokens:
        violations.add("stopping.min_tokens", f"is more than max_tokens, {max_tokens}")
    if violations.count("stopping.strings", stopping.strings, MAX_STOP_STRINGS):
        for i, text in enumerate(stopping.strings):
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                violations.add(f"stopping.strings[{i}]", f"must have 1 to {MAX_STOP_STRING_CHARS} characters")
    if violations.count("stopping.token_ids", stopping.token_ids, MAX_STOP_TOKENS):
        violations.token_ids("stopping.token_ids", stopping.token_ids, model.vocab_size)
    limit = _if_set(stopping, "time_limit")
    time_limit_s = None if limit is None else violations.seconds("stopping.time_limit", limit)
    if time_limit_s is not None and time_limit_s <= 0:
        violations.add("stopping.time_limit", "must be above 0 s")
    return {
        "max_tokens": max_tokens,
        "min_tokens": stopping.min_tokens,
        "max_reasoning_tokens": _if_set(stopping, "max_reasoning_tokens"),
        "stop": tuple(stopping.strings),
        "stop_token_ids": frozenset(stopping.token_ids),
        "ignore_eos": stopping.ignore_eos,
        "include_stop": stopping.include_match,
        "time_limit_s": time_limit_s,
    }


def _output(output: generation_pb2.OutputOptions, violations: Violations) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "detokenize": not output.omit_text,
        "skip_special_tokens": not output.keep_special_tokens,
    }
    for name in ("logprobs", "prompt_logprobs"):
        changes[name] = _if_set(output, name)
        if changes[name] is not None:
            violations.number(f"output.{name}", changes[name], ALTERNATIVES_RANGE)
    return changes


def _if_set(message: Message, name: str) -> Any:
    """A field's value; None if it is not set."""
    return getattr(message, name) if message.HasField(name) else None


# ----------------------------------------------------------------------------------------- unknown fields


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, str]]:
    """(path, description) of each field that the message's type does not know, at any depth.

    The parser counts as unknown, too, a known field in a foreign encoding, and a map entry that holds more than key
    and value.
    """
    prefix = f"{path}." if path else ""
    unknown_fields: Any = UnknownFieldSet(message)
    for unknown in unknown_fields:
        number = unknown.field_number
        known = message.DESCRIPTOR.fields_by_number.get(number)
        name, wrong = (number, "is not known") if known is None else (known.name, "is not encoded as one")
        yield f"{prefix}{name}", f"field number {number} of {message.DESCRIPTOR.full_name} {wrong}"
    for field, value in message.ListFields():
        for child_path, child in _children(field, value, f"{prefix}{field.name}"):
            yield from _unknown_fields(child, child_path)


def _children(field: FieldDescriptor, value: Any, path: str) -> Iterator[tuple[str, Message]]:
    """The messages directly inside a field's value, with their paths."""
    if field.message_type is None:
        return
    if field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is not None:
            yield from ((f"{path}[{key}]", entry) for key, entry in value.items())
    elif field.is_repeated:
        yield from ((f"{path}[{i}]", entry) for i, entry in enumerate(value))
    else:
        yield path, value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")
