"""From Python arguments to the contract's requests. Pure; both clients use it.

The server checks ranges, and names every violation at once, so nothing is checked twice here: these functions refuse
only what the messages cannot carry.
"""

import inspect
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypedDict, cast, get_args

from nanoserve_client.transport import CallOptions, refuse_unknown
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from nanoserve_client.results import MadeCall

RoleName = Literal["system", "user", "assistant", "tool", "developer"]

# By the contract's name in small letters, without its prefix.
_ROLES: dict[str, pb.Role.ValueType] = {name: pb.Role.Value(f"ROLE_{name.upper()}") for name in get_args(RoleName)}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made, as part of a conversation."""

    # Ties the call to the tool's answer (ChatMessage.tool_call_id).
    id: str
    # The function's name.
    name: str
    # Its arguments: an object, or the JSON text of one.
    arguments: Mapping[str, Any] | str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation. A dict with the same keys serves as well."""

    role: RoleName
    # The text, or its parts. May be None only beside tool_calls.
    content: str | Sequence[str] | None = None
    # The speaker's name, for templates that know one.
    name: str | None = None
    # The id of the call that this message answers; role "tool" only.
    tool_call_id: str | None = None
    # Role "assistant" only. Calls of a Result serve as they are.
    tool_calls: "Sequence[ToolCall | MadeCall | Mapping[str, Any]]" = ()
    # What the assistant thought before it wrote the content; role "assistant" only.
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. The server shows it to the template, and executes nothing."""

    name: str
    # For the model to read.
    description: str = ""
    # JSON Schema of the arguments, an object, or its JSON text; or a model class of pydantic. None = no parameters.
    parameters: "Mapping[str, Any] | str | type[PydanticModel] | None" = None
    # What of the schema cannot be enforced is refused. Otherwise that is checked when a call is complete, and if the
    # choice is left to the model its arguments are too.
    strict: bool = False


Messages = str | Sequence[ChatMessage | Mapping[str, Any]]


class ChatOptions(TypedDict, total=False):
    """What a conversation may have besides its messages. A key that is absent or None takes the default.

    Attributes:
        tools: Tools or dicts with the same keys, that the model may call. Default: none.
        tool_choice: "none", "auto" or "required", or the name of the one tool to call, or names of those that may be.
            Default "auto".
        parallel_tool_calls: There may be more than one call. Default True, unless one certain tool is to be called.
        template_kwargs: Further template variables, e.g. {"enable_thinking": False}. Default: none.
        continue_final_message: The completion extends the last message, which must be the assistant's. Default False.
        add_generation_prompt: The template ends the prompt with the beginning of the assistant's message. Default True,
            or False with continue_final_message.
        parse_special_tokens: Text of the conversation that spells a special token, such as <|im_end|>, becomes that
            token. Default False: it stays text.
    """

    tools: Sequence[Tool | Mapping[str, Any]] | None
    tool_choice: str | Sequence[str] | None
    parallel_tool_calls: bool | None
    template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    parse_special_tokens: bool | None


class ConstraintOptions(TypedDict, total=False):
    """What the output must be: at most one of the first five. A key that is absent or None constrains nothing.

    Attributes:
        schema: A JSON Schema, as a dict or as JSON, or a model class of pydantic, whose schema it is. The output is a
            JSON text that it allows. `Completion.parsed` is its value, or an instance of the class.
        json_object: True = the output is any JSON object.
        regex: A regular expression that the whole output matches, in the syntax of Rust's regex crate: as a text, or
            compiled, of which the pattern counts alone.
        grammar: A Lark grammar, as the llguidance library reads it.
        choices: The output is one of these texts.
        relaxed: With schema: what of it cannot be enforced is only checked when the output is complete. Default False:
            such a schema is refused.
        from_start: In a conversation: the output is this from its first token on. Default False: reasoning may come
            before it, and calls of tools instead.
    """

    schema: "str | Mapping[str, Any] | type[PydanticModel] | None"
    json_object: bool | None
    regex: str | re.Pattern[str] | None
    grammar: str | None
    choices: Sequence[str] | None
    relaxed: bool | None
    from_start: bool | None


class PydanticModel(Protocol):
    """A model class of pydantic, as far as it is used here: the library itself is not needed."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Any: ...


class GenerateOptions(CallOptions, ConstraintOptions, total=False):
    """What `generate` and `chat` take besides the prompt; CallOptions' keys and ConstraintOptions' too.

    A key that is absent or None takes the default: for the sampling keys (temperature to repetition_penalty) the
    model's own, which `list_models` shows and `Started.sampling` reports.

    Attributes:
        model: Name of a served model, or of an adapter. Default: the server's.
        adapter: Name of a LoRA adapter. Default: none, the model as it is.
        n: Completions (sequences) of the one prompt, 1 to 128. Default 1.
        priority: -100 to 100, default 0. Higher runs first, and may preempt lower.

        temperature: 0 to 100. 0 = greedy.
        top_p: 0 to 1. Keeps the smallest set of most likely tokens whose probability reaches it, at least one. 1 = all.
        top_k: Keeps that many most likely tokens. 0 = all.
        min_p: 0 to 1. Keeps tokens with at least that part of the probability of the most likely one. 0 = all.
        frequency_penalty: -2 to 2, for each time a token was generated. 0 = off.
        presence_penalty: -2 to 2, once if it was generated. 0 = off.
        repetition_penalty: Above 0, up to 100, for tokens of prompt or output. 1 = off.
        seed: 0 to 2**64 - 1. Sequence i draws with seed + i. Default: random. `Started.sampling.seed` reports it.
        logit_bias: Token id to what is added to its logit, -100 to 100; at most 1024 entries.

        max_tokens: Most tokens of each sequence. 0 = only the prompt is computed. Default: what the context leaves.
        min_tokens: No EOS, stop token or stop string ends a sequence before. Default 0.
        max_reasoning_tokens: Then the reasoning is closed, and the answer begins; for `chat` only, and if it is known
            how the model reasons. Default: no limit.
        stop: Text or texts that end a sequence: at most 16 of at most 1,024 characters. They may span tokens.
        stop_token_ids: Tokens that end a sequence, besides EOS; at most 1024.
        ignore_eos: EOS is a token like any other. Default False.
        include_stop: Keep the stop string or stop token in the text. Default False.
        time_limit: Seconds from arrival until sequences end softly, with what there is; above 0. Default: none.
            `FinishReason.TIME_LIMIT` tells of it. `timeout` is hard: it fails the call.

        omit_text: Token ids only. Default False. Not with `stop`.
        keep_special_tokens: Keep special tokens in the text. Default False.
        logprobs: Report each token's log-probability with this many alternatives, 0 to 20. Default: no report.
        prompt_logprobs: The same for the prompt's tokens; the prefix cache is then not read. Default: no report.
        min_delta_tokens: Hold deltas back until they have this many tokens. Default 0: a delta a step.
        parse: Tell reasoning, content and calls of tools apart, as far as it is known how the model writes them. For
            `chat` only, where the default is True; not with omit_text or keep_special_tokens.

        skip_cache_read: Compute the whole prompt anew. Default False.
        cache_salt: Share cached prefixes only with requests of the same salt; at most 256 characters. Default "".

        add_special_tokens: The tokenizer adds its special tokens, such as BOS. Default True for a text, as the
            tokenizer's configuration says, and False for a chat, whose template writes them. Not for token ids.

        max_draft_tokens: Most tokens that the server may guess at once, 0 to 64. 0 = none. Default: as it likes.
            Guesses change how fast tokens come, and never which.
        prediction: What the completion is expected to be, as a text or token ids, such as the text that is to be
            edited. Where it is right, tokens come several at a time. Default: nothing is expected.
    """

    model: str | None
    adapter: str | None
    n: int | None
    priority: int | None

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None

    max_tokens: int | None
    min_tokens: int | None
    max_reasoning_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    time_limit: float | None

    omit_text: bool | None
    keep_special_tokens: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    min_delta_tokens: int | None
    parse: bool | None

    skip_cache_read: bool | None
    cache_salt: str | None

    add_special_tokens: bool | None

    max_draft_tokens: int | None
    prediction: str | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The options of the same names in GenerateOptions say what each means."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    # None in a model's defaults, where every request draws its own.
    seed: int | None
    logit_bias: Mapping[int, float]

    @classmethod
    def of(cls, message: pb.Sampling) -> Self:
        values = {each.name: getattr(message, each.name) for each in fields(cls)}
        values["logit_bias"] = dict(message.logit_bias)
        if not message.HasField("seed"):
            values["seed"] = None
        return cls(**values)


class ChatGenerateOptions(GenerateOptions, ChatOptions, total=False):
    """What `chat` takes besides the messages: GenerateOptions' keys and ChatOptions'."""


def explanations(options: type) -> dict[str, str]:
    """What the docstring of one of these classes says of each of its Attributes, for programs that offer the same to
    people: less what is plain of a switch, and what speaks of Python."""
    attributes = inspect.cleandoc(options.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    sentences = {name: re.split(r"(?<=\.) ", " ".join(text.split())) for name, text in entries}
    return {
        name: " ".join(each for each in texts if each != "Default False." and "`" not in each)
        for name, texts in sentences.items()
    }


class TokenizeOptions(CallOptions, ChatOptions, total=False):
    """What `tokenize` takes besides the prompt: CallOptions' keys and, for a conversation, ChatOptions'.

    Attributes:
        model: Name of a served model. Default: the server's.
        add_special_tokens: As in GenerateOptions.
    """

    model: str | None
    add_special_tokens: bool | None


class CheckOptions(CallOptions, ConstraintOptions, total=False):
    """What `check_constraint` takes: ConstraintOptions' keys, CallOptions' keys, and one more.

    Attributes:
        model: Name of a served model. Default: the server's.
    """

    model: str | None


# The parts of a request whose fields are options.
_SECTIONS: dict[str, Any] = {
    "sampling": pb.Sampling,
    "stopping": pb.Stopping,
    "output": pb.OutputOptions,
    "cache": pb.CacheOptions,
}
# Options that bear other names than their fields in the contract.
OPTION_NAMES = {
    "stopping.strings": "stop",
    "stopping.token_ids": "stop_token_ids",
    "stopping.include_match": "include_stop",
    "cache.skip_read": "skip_cache_read",
    "cache.salt": "cache_salt",
    "constraint.json_schema": "schema",
    "predicted_text": "prediction",
    "predicted_token_ids": "prediction",
}


def _places() -> dict[str, tuple[str, str]]:
    """By option: the section of the request, if it is in one, and the field there."""
    request = pb.GenerateRequest.DESCRIPTOR.fields_by_name
    places = {name: ("", name) for name in GenerateOptions.__annotations__ if name in request}
    places["prediction"] = ("", "predicted_text")
    for place, section in _SECTIONS.items():
        for field in section.DESCRIPTOR.fields:
            places[OPTION_NAMES.get(f"{place}.{field.name}", field.name)] = (place, field.name)
    return places


_PLACES = _places()


def generate_request(prompt: str | Sequence[int] | pb.Chat, options: GenerateOptions) -> pb.GenerateRequest:
    """The request for a text, token ids, or a chat.

    Raises TypeError for an option that does not exist, and TypeError or ValueError, with its name, for a value that
    its field cannot carry.
    """
    refuse_unknown(options, GenerateOptions.__optional_keys__)
    request = pb.GenerateRequest(**{place: section() for place, section in _SECTIONS.items()})
    for name, value in options.items():
        if name in _PLACES and value is not None:
            try:
                request.MergeFrom(_with_option(name, value))
            except (TypeError, ValueError, OverflowError) as error:
                raise _misfit(f"{name} is {reprlib.repr(value)}", error) from error
    if (asked := constraint(options)) is not None:
        request.constraint.CopyFrom(asked)
    try:
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, pb.Chat):
            request.chat.CopyFrom(prompt)
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    except (TypeError, ValueError, OverflowError) as error:
        raise _misfit("the prompt is neither a text nor token ids", error) from error
    return request


def _with_option(name: str, value: Any) -> pb.GenerateRequest:
    """A request that says this and nothing else."""
    if name == "stop" and isinstance(value, str):
        value = [value]
    elif name == "time_limit":
        value = timedelta(seconds=value)
    elif name == "prediction" and not isinstance(value, str):
        return pb.GenerateRequest(predicted_token_ids=pb.TokenIds(ids=value))
    section, field = _PLACES[name]
    arguments: dict[str, Any] = {section: {field: value}} if section else {field: value}
    return pb.GenerateRequest(**arguments)


def _misfit(what: str, error: Exception) -> TypeError | ValueError:
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{what}: {error}")


def call_options(options: Mapping[str, Any]) -> CallOptions:
    """The part that concerns the call, not the request."""
    shared = {key: value for key, value in options.items() if key in CallOptions.__optional_keys__}
    return cast(CallOptions, shared)


def chat_request(messages: Messages, options: ChatGenerateOptions) -> pb.GenerateRequest:
    """The request for a conversation. Raises as `generate_request` and `chat_prompt` do."""
    others = {key: value for key, value in options.items() if key not in ChatOptions.__optional_keys__}
    if options.get("parse") is None:
        others["parse"] = not (options.get("omit_text") or options.get("keep_special_tokens"))
    return generate_request(chat_prompt(messages, _chat_options(options)), cast(GenerateOptions, others))


def _chat_options(options: Mapping[str, Any]) -> ChatOptions:
    """Those of ChatOptions, as far as they are given."""
    chosen = {key: value for key, value in options.items() if key in ChatOptions.__optional_keys__}
    return cast(ChatOptions, chosen)


def chat_prompt(messages: Messages, options: ChatOptions) -> pb.Chat:
    """A conversation; a text stands for one message of the user.

    Raises TypeError for a key and ValueError for a role that does not exist.
    """
    refuse_unknown(options, ChatOptions.__optional_keys__)
    if isinstance(messages, str):
        messages = [ChatMessage("user", messages)]
    return pb.Chat(
        messages=[_message(m if isinstance(m, ChatMessage) else ChatMessage(**m)) for m in messages],
        tools=[_tool(t if isinstance(t, Tool) else Tool(**t)) for t in options.get("tools") or ()],
        template_kwargs_json=_json(options.get("template_kwargs")),
        continue_final_message=bool(options.get("continue_final_message")),
        add_generation_prompt=options.get("add_generation_prompt"),
        parse_special_tokens=bool(options.get("parse_special_tokens")),
        tool_choice=_tool_choice(options.get("tool_choice")),
        parallel_tool_calls=options.get("parallel_tool_calls"),
    )


_MODES = {name: pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{name.upper()}") for name in ("none", "auto", "required")}


def _tool_choice(choice: str | Sequence[str] | None) -> pb.ToolChoice | None:
    if choice is None:
        return None
    if isinstance(choice, str):
        return pb.ToolChoice(mode=_MODES[choice]) if choice in _MODES else _tool_choice_of("required", [choice])
    return _tool_choice_of("auto", choice)


def _tool_choice_of(mode: str, names: Sequence[str]) -> pb.ToolChoice:
    return pb.ToolChoice(mode=_MODES[mode], names=names)


def _message(message: ChatMessage) -> pb.ChatMessage:
    if message.role not in _ROLES:
        raise ValueError(f"role is {message.role!r}; it must be one of {', '.join(_ROLES)}")
    calls = [ToolCall(**c) if isinstance(c, Mapping) else c for c in message.tool_calls]
    return pb.ChatMessage(
        role=_ROLES[message.role],
        content=message.content if isinstance(message.content, str) else None,
        content_parts=[] if isinstance(message.content, str) else message.content or (),
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=[pb.ToolCall(id=c.id, name=c.name, arguments_json=_json(c.arguments)) for c in calls],
        reasoning=message.reasoning,
    )


def _tool(tool: Tool) -> pb.Tool:
    schema = tool.parameters.model_json_schema() if isinstance(tool.parameters, type) else tool.parameters
    return pb.Tool(name=tool.name, description=tool.description, parameters_json=_json(schema), strict=tool.strict)


def _json(value: Mapping[str, Any] | str | None) -> str:
    """JSON text; text is taken as JSON already, None as none."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def tokenize_request(prompt: Messages, options: TokenizeOptions) -> model_pb2.TokenizeRequest:
    """The request for a text or a conversation.

    Raises TypeError for an option that does not exist, or that a text cannot have.
    """
    refuse_unknown(options, TokenizeOptions.__optional_keys__)
    request = model_pb2.TokenizeRequest(
        model=options.get("model") or "", add_special_tokens=options.get("add_special_tokens")
    )
    of_chat = _chat_options(options)
    if not isinstance(prompt, str):
        request.chat.CopyFrom(chat_prompt(prompt, of_chat))
        return request
    if given := sorted(key for key, value in of_chat.items() if value):
        raise TypeError(f"{', '.join(given)}: for messages only")
    request.text = prompt
    return request


def check_constraint_request(options: CheckOptions) -> model_pb2.CheckConstraintRequest:
    """Raises TypeError for an option that does not exist, and for more or less than one constraint."""
    refuse_unknown(options, CheckOptions.__optional_keys__)
    if (asked := constraint(options)) is None:
        raise TypeError(f"one of {', '.join(_CONSTRAINTS)} is required")
    return model_pb2.CheckConstraintRequest(model=options.get("model") or "", constraint=asked)


# Options of ConstraintOptions, and what each is in the contract.
_CONSTRAINTS = {
    "schema": "json_schema",
    **{name: name for name in ("json_object", "regex", "grammar", "choices")},
}


def constraint(options: Mapping[str, Any]) -> pb.Constraint | None:
    """Of ConstraintOptions; None if there is none.

    Raises TypeError for more than one, and TypeError or ValueError for a value that the message cannot carry.
    """
    # An empty text or list is a constraint, which the server refuses; json_object=False is none.
    given = {name: options[name] for name in _CONSTRAINTS if options.get(name) not in (None, False)}
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} are given; at most one of them is possible")
    if not given:
        if alone := [name for name in ("relaxed", "from_start") if options.get(name)]:
            raise TypeError(f"{' and '.join(alone)}: there is no constraint")
        return None
    ((name, value),) = given.items()
    try:
        message = _constraint(name, value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _misfit(f"{name} is {reprlib.repr(value)}", error) from error
    message.relaxed, message.from_start = bool(options.get("relaxed")), bool(options.get("from_start"))
    return message


def _constraint(name: str, value: Any) -> pb.Constraint:
    message = pb.Constraint()
    if name == "choices":
        # It is to be set even without any.
        message.choices.SetInParent()
        message.choices.texts.extend(value)
        return message
    if name == "schema":
        value = value if isinstance(value, str) else json.dumps(_schema_of(value))
    setattr(message, _CONSTRAINTS[name], value.pattern if isinstance(value, re.Pattern) else value)
    return message


def parser(options: Mapping[str, Any]) -> Callable[[str], Any] | None:
    """What makes a value of an output under ConstraintOptions. None = it is a text."""
    schema = options.get("schema")
    if isinstance(schema, type):
        return cast(type[PydanticModel], schema).model_validate_json
    return json.loads if schema is not None or options.get("json_object") else None


def _schema_of(value: "Mapping[str, Any] | type[PydanticModel]") -> Mapping[str, Any]:
    return value.model_json_schema() if isinstance(value, type) else value


def unload_adapter_request(name: str, drain_timeout: float | None) -> admin_pb2.UnloadAdapterRequest:
    """drain_timeout: seconds; None = the server's default."""
    request = admin_pb2.UnloadAdapterRequest(name=name)
    if drain_timeout is not None:
        request.drain_timeout.FromNanoseconds(round(drain_timeout * 1e9))
    return request


def watch_request(interval: float | None) -> admin_pb2.WatchEngineRequest:
    """interval: seconds; None = the server's default."""
    request = admin_pb2.WatchEngineRequest()
    if interval is not None:
        request.interval.FromNanoseconds(round(interval * 1e9))
    return request
