"""The table: every field of the three APIs and of the objects within them, and every parameter of a query, with its
status.

A test walks the openai package's parameter types and fails if one of their fields has no line here.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Required

from nanoserve_client import CallOptions, ConstraintOptions, GenerateOptions
from nanoserve_client.requests import explanations
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageParam,
    ChatCompletionPredictionContentParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import (
    EasyInputMessageParam,
    ResponseFunctionToolCallParam,
    ResponseInputTextContentParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputTextParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
    input_item_list_params,
    input_token_count_params,
    response_create_params,
    response_retrieve_params,
)
from openai.types.responses.response_create_params import StreamOptions
from openai.types.responses.response_format_text_config_param import ResponseFormatTextConfigParam
from openai.types.responses.response_format_text_json_schema_config_param import ResponseFormatTextJSONSchemaConfigParam
from openai.types.responses.response_input_param import FunctionCallOutput, ItemReference
from openai.types.shared_params import Reasoning, ReasoningEffort, ResponseFormatJSONSchema
from openai.types.shared_params.response_format_json_schema import JSONSchema
from pydantic import Discriminator, Field, Strict, Tag

from nanoserve_gateway import tool_fields
from nanoserve_gateway.constraints import (
    FORMAT_OBJECTS,
    FORMAT_SCHEMA,
    FORMATS,
    GUIDED_DECODING,
    NOT_STRUCTURED,
    STRUCTURED_OUTPUTS,
    StructuredOutputs,
)
from nanoserve_gateway.schema import Field as Line
from nanoserve_gateway.schema import Schema, label, refused, served

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
TokenId = Uint32
# A JSON object's keys are texts.
TokenKey = Annotated[int, Strict(False), Field(ge=0, le=2**32 - 1)]
# -1 is vLLM's word for all of them.
TopK = Annotated[int, Field(ge=-1, le=2**32 - 1)]
# OpenAI's are signed; the engine's have the same bits without a sign.
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]

MEDIA = "the model reads and writes text only"
HOSTED = "it is a service of OpenAI's own platform"
RETENTION = "the prefix cache keeps what it can, for as long as it can"
LABEL = "A label; it changes no token."

# Options of the client that no field of the same name passes on: OpenAI or vLLM name them otherwise, give them another
# meaning, or know them for some requests alone, and then they have lines of their own below; or REST has none of them.
_OTHERWISE = CallOptions.__optional_keys__ | ConstraintOptions.__optional_keys__
_OTHERWISE |= {
    # An adapter is a `model`.
    *("model", "adapter", "n", "max_tokens", "stop", "logprobs", "prompt_logprobs", "add_special_tokens"),
    *("keep_special_tokens", "include_stop"),
    *("time_limit", "omit_text", "min_delta_tokens", "skip_cache_read", "prediction"),
    # Of a conversation.
    *("parse", "max_reasoning_tokens"),
}
# Those that are passed on, but of which a caller may say more than the client takes.
_WIDER = {
    "top_k": ("Keeps that many most likely tokens; 0 or -1 = all.", TopK),
    "seed": ("-2^63 to 2^64 - 1. Choice i draws with seed + i.", Seed),
    "priority": ("-100 to 100; higher runs first.", Annotated[int, Field(ge=-100, le=100)]),
}
_IN_JSON: dict[Any, Any] = {
    **{float: float, int: Uint32, bool: bool, str: str},
    **{Sequence[int]: list[TokenId], Mapping[int, float]: dict[TokenKey, float]},
}


def _passed_on(params: type) -> Iterator[Line]:
    """A line for each option of the client that a field of the same name passes on as it is. What the openai package's
    params do not have is an extension."""
    notes, theirs = explanations(GenerateOptions), typing.get_type_hints(params)
    for name, hint in typing.get_type_hints(GenerateOptions).items():
        if name not in _OTHERWISE:
            note, kind = _WIDER[name] if name in _WIDER else (notes.get(name, ""), _IN_JSON[typing.get_args(hint)[0]])
            yield served(name, note if name in theirs else f"Extension. {note}", kind)


# What all three APIs have besides.
_COMMON = (
    served("model", "Name of a served model, or of an adapter. Default: the server's model.", str),
    label("user", LABEL),
    served("stream", "Server-sent events.", bool),
    served("skip_special_tokens", "Extension. Special tokens are left out of the text. Default true.", bool),
    served("include_stop_str_in_output", "Extension. The text keeps what ended it.", bool),
)
_TOKEN_IDS = "Extension. Each choice has the `token_ids` of its text"
_TEMPLATE_KWARGS = served(
    "chat_template_kwargs",
    "Extension. Variables of the model's template, such as `enable_thinking`.",
    dict[str, Any],
)
# Of a conversation that becomes a prompt.
_TEMPLATE = (
    _TEMPLATE_KWARGS,
    served("continue_final_message", "Extension. Goes on with the last message, the assistant's.", bool),
    served("add_generation_prompt", "Extension. Begins a message of the assistant's. Default true.", bool),
    served("parse_special_tokens", "Extension. Text that spells a special token becomes that token.", bool),
)
_ADD_SPECIAL_TOKENS = served(
    "add_special_tokens",
    "Extension. The tokenizer adds its own, such as BOS. Default: as its configuration says; false for messages.",
    bool,
)
_MAX_REASONING = served(
    "max_reasoning_tokens", "Extension. Then the reasoning is closed, and the answer begins. Default: no limit.", Uint32
)
_EFFORT = "A variable of the model's template. Refused where the template has none of the name `reasoning_effort`."
# What chats and responses have of OpenAI's platform.
_PLATFORM = (
    label("safety_identifier", LABEL),
    label("prompt_cache_key", "The prefix cache finds by itself what prompts share."),
    refused("moderation", HOSTED),
    refused("prompt_cache_options", RETENTION),
    refused("prompt_cache_retention", RETENTION),
    refused("service_tier", "all requests are alike; see priority", "auto", "default"),
)
_PARSED = label("parsed", "OpenAI's clients add it to an answer that they have read; not read.")
# vLLM's, which chat and completions share.
_REPORTS = (
    _ADD_SPECIAL_TOKENS,
    served("prompt_logprobs", "Extension. Alternatives for each token of the prompt, 0 to 20. Not streamed.", Uint32),
    served("return_tokens_as_token_ids", "Extension. Tokens in log-probabilities are `token_id:5`.", bool),
    served("return_token_ids", f"{_TOKEN_IDS}, and the answer the `prompt_token_ids`.", bool),
)
# What chat and completions share.
_CHOICES = (
    served("n", "Choices for each prompt, 1 to 128.", Uint32),
    served("stop", "At most 16 texts of at most 1,024 characters."),
    served("max_tokens", "0 = the prompt alone. Default: what the context leaves, for completions too.", Uint32),
    served("stream_options", "`include_usage`. Only with `stream`."),
)
_MESSAGES = (refused("prompt_cache_breakpoint", RETENTION),)
_STREAM_OPTIONS = (
    refused("include_obfuscation", "nothing is padded", False),
    served("continuous_usage_stats", "Extension. Every chunk has the usage so far. With `include_usage`.", bool),
)

CHAT = Schema(
    "ChatCompletionRequest",
    chat_create_params.CompletionCreateParamsNonStreaming,
    (
        served("messages", "system, developer, user, assistant, tool and function; text content only."),
        *_COMMON,
        *_passed_on(chat_create_params.CompletionCreateParamsNonStreaming),
        *_CHOICES,
        served("max_completion_tokens", "The same as max_tokens.", Uint32),
        served("logprobs", "Of raw logits, before temperature, penalties and bias."),
        served("top_logprobs", "0 to 20. Only with `logprobs`.", Uint32),
        label("metadata", "Returned with an answer that is not streamed; it changes no token."),
        *_PLATFORM,
        *tool_fields.TOOLS,
        *tool_fields.FUNCTIONS,
        _MAX_REASONING,
        served("include_reasoning", "Extension. False leaves `reasoning` out of the answer. Default true.", bool),
        refused("audio", MEDIA),
        refused("modalities", MEDIA, ["text"]),
        served("prediction", "What the answer is expected to be. Where it is right, tokens come several at a time."),
        served("reasoning_effort", _EFFORT),
        served("response_format", FORMATS),
        *STRUCTURED_OUTPUTS,
        *GUIDED_DECODING,
        refused("store", "chat completions are not stored; responses are", False),
        refused("verbosity", "the model takes no such instruction", "medium"),
        refused("web_search_options", HOSTED),
        *_REPORTS,
        *_TEMPLATE,
    ),
    {
        ChatCompletionSystemMessageParam: (),
        ChatCompletionDeveloperMessageParam: (),
        ChatCompletionUserMessageParam: (),
        ChatCompletionAssistantMessageParam: (
            served("reasoning", "Extension. What it thought before, for templates that show it.", str),
            served("reasoning_content", "Extension. The same; `reasoning` goes first.", str),
            refused("audio", MEDIA),
            refused("refusal", "the model's template knows none"),
            refused("annotations", "the model's template knows none", []),
            _PARSED,
        ),
        **tool_fields.OF_CHAT,
        ChatCompletionContentPartTextParam: _MESSAGES,
        ChatCompletionPredictionContentParam: (),
        ChatCompletionStreamOptionsParam: _STREAM_OPTIONS,
        **FORMAT_OBJECTS,
        ResponseFormatJSONSchema: (),
        JSONSchema: FORMAT_SCHEMA,
        StructuredOutputs: NOT_STRUCTURED,
    },
)

COMPLETIONS = Schema(
    "CompletionRequest",
    completion_create_params.CompletionCreateParamsNonStreaming,
    (
        served(
            "prompt",
            "A text, token ids, or up to 128 of either, mixed or not.",
            Required[str | list[TokenId] | list[str | list[TokenId]]],
        ),
        *_COMMON,
        *_passed_on(completion_create_params.CompletionCreateParamsNonStreaming),
        *_CHOICES,
        served("logprobs", "Alternatives for each token, 0 to 20.", Uint32),
        served("echo", "The prompt before each choice; with `logprobs` those of the prompt too."),
        refused("best_of", "every choice is returned; use n", 1),
        refused("suffix", "the model fills no gaps", ""),
        *_REPORTS,
        *STRUCTURED_OUTPUTS,
        *GUIDED_DECODING,
    ),
    {ChatCompletionStreamOptionsParam: _STREAM_OPTIONS, StructuredOutputs: NOT_STRUCTURED},
)


def _kind_of_item(item: Any) -> str | None:
    """Which of the served types an input item must have."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type")
    if kind in ("function_call", "function_call_output", "reasoning"):
        return str(kind)
    if kind == "item_reference" or (kind is None and item.get("role") is None and "id" in item):
        return "reference"
    if kind not in (None, "message"):
        return None
    return "output" if item.get("role") == "assistant" and isinstance(item.get("content"), list) else "message"


_InputItem = Annotated[
    Annotated[EasyInputMessageParam, Tag("message")]
    | Annotated[ResponseOutputMessageParam, Tag("output")]
    | Annotated[ResponseFunctionToolCallParam, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ResponseReasoningItemParam, Tag("reasoning")]
    | Annotated[ItemReference, Tag("reference")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item",
        custom_error_message="only items of the types message, function_call, function_call_output, reasoning and"
        " item_reference are served",
    ),
]
# Of a message. Many clients send back what they were given, and as many only the words of it.
_ITEM = (
    served("id", "Any, or none.", str),
    served("status", "Any, or none.", Literal["in_progress", "completed", "incomplete"]),
    served("type", "May be left out.", Literal["message"]),
    refused("phase", "the model's template knows none"),
)
_CONVERSATION = (
    served("instructions", "A system message before all others; not carried over to the next response."),
    served("previous_response_id", "Continues that conversation."),
    refused("conversation", "use previous_response_id"),
    served("reasoning", "Only its `effort`."),
    served("text", "The `format` of the answer."),
    *tool_fields.TOOLS,
    refused("truncation", "a prompt that is too long is refused", "disabled"),
    _TEMPLATE_KWARGS,
)
_NO_INSTRUCTION = "the model takes no such instruction"
_IN_TEMPLATE = "what the model's template knows goes into chat_template_kwargs"
_OF_CONVERSATION: dict[type, tuple[Line, ...]] = {
    EasyInputMessageParam: _ITEM,
    ResponseOutputMessageParam: _ITEM,
    ItemReference: (served("type", "May be left out.", Literal["item_reference"]),),
    ResponseInputTextParam: _MESSAGES,
    ResponseInputTextContentParam: _MESSAGES,
    ResponseOutputTextParam: (
        refused("annotations", "the model cites nothing", []),
        _PARSED,
        label("logprobs", "Of the answer that comes back; not read."),
    ),
    ResponseTextConfigParam: (
        served("format", FORMATS, ResponseFormatTextConfigParam),
        refused("verbosity", _NO_INSTRUCTION, "medium"),
    ),
    **tool_fields.OF_RESPONSES,
    **FORMAT_OBJECTS,
    ResponseFormatTextJSONSchemaConfigParam: FORMAT_SCHEMA,
    Reasoning: (
        refused("context", _IN_TEMPLATE, "auto"),
        served("effort", _EFFORT, ReasoningEffort),
        refused("generate_summary", "none are made"),
        refused("mode", _IN_TEMPLATE),
        refused("summary", "none are made"),
    ),
}

RESPONSES = Schema(
    "ResponseRequest",
    response_create_params.ResponseCreateParamsNonStreaming,
    (
        served(
            "input",
            "A text, or items: messages of text, calls, their answers, reasoning, or references to kept items.",
            Required[str | list[_InputItem]],
        ),
        *_COMMON,
        *_passed_on(response_create_params.ResponseCreateParamsNonStreaming),
        served("max_output_tokens", "0 = the prompt alone. Default: what the context leaves.", Uint32),
        served("top_logprobs", "0 to 20. Only with `include`.", Uint32),
        served("include", "`message.output_text.logprobs`; whatever else it knows is never made here.", list[str]),
        served("store", "Whether it can be retrieved and continued, while there is room. Default true."),
        served("background", "Answers at once, and goes on; retrieve it, or cancel it."),
        label("metadata", "Returned; it changes no token."),
        *_PLATFORM,
        refused("access_programs", HOSTED),
        refused("background_options", HOSTED),
        refused("context_management", "nothing is compacted", []),
        refused("image", MEDIA),
        label("max_tool_calls", "It counts calls of OpenAI's own tools; there are none."),
        refused("prompt", "there are no stored prompts"),
        served("stream_options", "Only without anything in it."),
        *_CONVERSATION,
        _MAX_REASONING,
        *STRUCTURED_OUTPUTS,
        served("return_token_ids", f"{_TOKEN_IDS}.", bool),
        served("stop", "Extension. At most 16 texts of at most 1,024 characters.", str | list[str]),
    ),
    {
        **_OF_CONVERSATION,
        StructuredOutputs: NOT_STRUCTURED,
        StreamOptions: (refused("include_obfuscation", "nothing is padded", False),),
    },
)

_MODEL = served("model", "Name of a served model, or of an adapter. Default: the server's model.", str)
TOKENIZE = Schema(
    "TokenizeRequest",
    None,
    (
        _MODEL,
        served("prompt", "A text. This or messages.", str),
        served("messages", "A conversation, rendered with the model's template.", list[ChatCompletionMessageParam]),
        served(
            "tools",
            "That the model is shown. With messages only.",
            list[ChatCompletionFunctionToolParam],
        ),
        _ADD_SPECIAL_TOKENS,
        *_TEMPLATE,
        served("return_token_strs", "False leaves out the tokens' texts. Default true.", bool),
    ),
    CHAT.objects,
)
INPUT_TOKENS = Schema(
    "InputTokensRequest",
    input_token_count_params.InputTokenCountParams,
    (
        _MODEL,
        served("input", "As of a response.", str | list[_InputItem]),
        *_CONVERSATION,
        refused("personality", _NO_INSTRUCTION),
    ),
    _OF_CONVERSATION,
)
DETOKENIZE = Schema("DetokenizeRequest", None, (_MODEL, served("tokens", "Token ids.", Required[list[TokenId]])))
_ADAPTER_NAME = served("lora_name", "What callers call it, as a `model`.", Required[str])
LOAD_ADAPTER = Schema(
    "LoadAdapterRequest",
    None,
    (
        _ADAPTER_NAME,
        served("lora_path", "Folder under the server's --adapters. Default: the one called like the adapter.", str),
        served("load_inplace", "In place of other weights of this name. Default false: these are refused.", bool),
    ),
)
UNLOAD_ADAPTER = Schema(
    "UnloadAdapterRequest", None, (_ADAPTER_NAME, refused("lora_int_id", "adapters have names, and no numbers"))
)
SCHEMAS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/responses/input_tokens": INPUT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/v1/load_lora_adapter": LOAD_ADAPTER,
    "/v1/unload_lora_adapter": UNLOAD_ADAPTER,
}

# Parameters of a query are texts.
_PageSize = Annotated[int, Strict(False), Field(ge=1, le=100)]
_Place = Annotated[int, Strict(False), Field(ge=0)]
_AS_MADE = "a response is given as it was made"
RETRIEVE = Schema(
    "RetrieveQuery",
    response_retrieve_params.ResponseRetrieveParamsNonStreaming,
    (
        refused("include", _AS_MADE),
        served("stream", "Its events, if it was streamed in the background.", Annotated[bool, Strict(False)]),
        served("starting_after", "Only those after the one with this number. Only with `stream`.", _Place),
        refused("include_obfuscation", "nothing is padded", "false"),
    ),
)
INPUT_ITEMS = Schema(
    "InputItemsQuery",
    input_item_list_params.InputItemListParams,
    (
        served("limit", "Items of a page, 1 to 100. Default 20.", _PageSize),
        served("after", "The page begins after the item with this id."),
        served("order", "`asc` or `desc`, from the newest. Default `desc`."),
        refused("include", "an item is given as it came"),
    ),
)
# Endpoints that are not here take no parameters.
QUERIES = {
    ("GET", "/v1/responses/{id}"): RETRIEVE,
    ("GET", "/v1/responses/{id}/input_items"): INPUT_ITEMS,
}
NO_QUERY = Schema("NoQuery", None, ())
# What anything is called anywhere in the API. A parameter of a query that bears another name changes nothing here.
NAMES = frozenset(name for schema in (*SCHEMAS.values(), *QUERIES.values()) for name in schema.fields)
