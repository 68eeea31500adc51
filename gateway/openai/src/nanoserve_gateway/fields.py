"""The table: every field of the three APIs and of the objects within them, and every parameter of a query, with its
status.

A test walks the openai package's parameter types and fails if one of their fields has no line here.
"""

from typing import Annotated, Any, Required

from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.chat.chat_completion_message_function_tool_call_param import Function
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import (
    EasyInputMessageParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputTextParam,
    input_item_list_params,
    response_create_params,
    response_retrieve_params,
)
from openai.types.responses.response_input_param import Message
from pydantic import Discriminator, Field, Strict, Tag

from nanoserve_gateway.schema import Schema, label, refused, served

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
TokenId = Uint32
# A JSON object's keys are texts.
TokenKey = Annotated[int, Strict(False), Field(ge=0, le=2**32 - 1)]
# OpenAI's are signed; the engine's have the same bits without a sign.
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]

TOOLS = "tools are not served yet"
FORMAT = "structured output is not served yet"
MEDIA = "the model reads and writes text only"
HOSTED = "it is a service of OpenAI's own platform"
RETENTION = "the prefix cache keeps what it can, for as long as it can"
LABEL = "A label; it changes no token."

_SAMPLING = (
    served("model", "Name of a served model.", Required[str]),
    served("temperature", "0 to 100. Default: the model's own."),
    served("top_p", "Above 0, up to 1. Default: the model's own."),
    label("user", LABEL),
    served("stream", "Server-sent events.", bool),
)
_EXTENSIONS = (
    served("top_k", "Extension. Keeps that many most likely tokens; 0 = all.", Uint32),
    served("min_p", "Extension. Keeps tokens with at least min_p times the highest probability.", float),
    served("repetition_penalty", "Extension. Above 0, up to 100; 1 = off.", float),
    served("stop_token_ids", "Extension. Tokens that end a choice, besides EOS.", list[TokenId]),
    served("ignore_eos", "Extension. EOS is a token like any other.", bool),
    served("min_tokens", "Extension. Nothing ends a choice before that many tokens.", Uint32),
    served("priority", "Extension. -100 to 100; higher runs first.", Annotated[int, Field(ge=-100, le=100)]),
    served("cache_salt", "Extension. Cached prefixes are shared within a salt only.", str),
    served("return_token_ids", "Extension. Each choice has the `token_ids` of its text.", bool),
)
# What chat and completions share.
_CHOICES = (
    served("frequency_penalty", "-2 to 2."),
    served("presence_penalty", "-2 to 2."),
    served("n", "Choices for each prompt, 1 to 128.", Uint32),
    served("stop", "At most 16 texts of at most 1,024 characters."),
    served("seed", "-2^63 to 2^64 - 1. Choice i draws with seed + i.", Seed),
    served("logit_bias", "Token id to -100 to 100, at most 1,024.", dict[TokenKey, float]),
    served("max_tokens", "At least 1. Default: what the context leaves, for completions too.", Uint32),
    served("stream_options", "`include_usage`. Only with `stream`."),
)
_MESSAGES = (refused("prompt_cache_breakpoint", RETENTION),)
_STREAM_OPTIONS = (refused("include_obfuscation", "nothing is padded", False),)

CHAT = Schema(
    "ChatCompletionRequest",
    chat_create_params.CompletionCreateParamsNonStreaming,
    (
        served("messages", "system, developer, user, assistant and tool; text content only."),
        *_SAMPLING,
        *_CHOICES,
        served("max_completion_tokens", "The same as max_tokens.", Uint32),
        served("logprobs", "Of raw logits, before temperature, penalties and bias."),
        served("top_logprobs", "0 to 20. Only with `logprobs`.", Uint32),
        label("metadata", "Returned with an answer that is not streamed; it changes no token."),
        label("safety_identifier", LABEL),
        label("prompt_cache_key", "The prefix cache finds by itself what prompts share."),
        refused("audio", MEDIA),
        refused("function_call", TOOLS, "none"),
        refused("functions", TOOLS, []),
        refused("modalities", MEDIA, ["text"]),
        refused("moderation", HOSTED),
        refused("parallel_tool_calls", TOOLS),
        refused("prediction", "predicted output is not served"),
        refused("prompt_cache_options", RETENTION),
        refused("prompt_cache_retention", RETENTION),
        refused("reasoning_effort", "the model takes no such instruction"),
        refused("response_format", FORMAT, {"type": "text"}),
        refused("service_tier", "all requests are alike; see priority", "auto", "default"),
        refused("store", "chat completions are not stored; responses are", False),
        refused("tool_choice", TOOLS, "none"),
        refused("tools", TOOLS, []),
        refused("verbosity", "the model takes no such instruction"),
        refused("web_search_options", HOSTED),
        *_EXTENSIONS,
    ),
    {
        ChatCompletionSystemMessageParam: (),
        ChatCompletionDeveloperMessageParam: (),
        ChatCompletionUserMessageParam: (),
        ChatCompletionAssistantMessageParam: (
            refused("audio", MEDIA),
            refused("function_call", "use tool_calls"),
            refused("refusal", "the model's template knows none"),
        ),
        ChatCompletionToolMessageParam: (),
        ChatCompletionMessageFunctionToolCallParam: (),
        Function: (),
        ChatCompletionContentPartTextParam: _MESSAGES,
        ChatCompletionStreamOptionsParam: _STREAM_OPTIONS,
    },
)

COMPLETIONS = Schema(
    "CompletionRequest",
    completion_create_params.CompletionCreateParamsNonStreaming,
    (
        served(
            "prompt",
            "A text, token ids, or up to 128 of either.",
            Required[str | list[str] | list[TokenId] | list[list[TokenId]]],
        ),
        *_SAMPLING,
        *_CHOICES,
        served("logprobs", "Alternatives for each token, 0 to 20.", Uint32),
        served("echo", "The prompt before each choice; with `logprobs` those of the prompt too."),
        refused("best_of", "every choice is returned; use n", 1),
        refused("suffix", "the model fills no gaps", ""),
        *_EXTENSIONS,
    ),
    {ChatCompletionStreamOptionsParam: _STREAM_OPTIONS},
)


def _kind_of_item(item: Any) -> str | None:
    """Which of the types of a message an input item must have."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        return None
    if item.get("role") == "assistant" and isinstance(item.get("content"), list):
        return "output"
    return "status" if "status" in item else "message"


_InputItem = Annotated[
    Annotated[EasyInputMessageParam, Tag("message")]
    | Annotated[Message, Tag("status")]
    | Annotated[ResponseOutputMessageParam, Tag("output")],
    Discriminator(
        _kind_of_item, custom_error_type="item", custom_error_message="only items of the type message are served"
    ),
]
_PHASE = refused("phase", "the model's template knows none")

RESPONSES = Schema(
    "ResponseRequest",
    response_create_params.ResponseCreateParamsNonStreaming,
    (
        served("input", "A text, or messages of text.", Required[str | list[_InputItem]]),
        served("instructions", "A system message before all others; not carried over to the next response."),
        *_SAMPLING,
        served("max_output_tokens", "At least 1. Default: what the context leaves.", Uint32),
        served("top_logprobs", "0 to 20. Only with `include`.", Uint32),
        served("include", "`message.output_text.logprobs`.", list[str]),
        served("previous_response_id", "Continues that conversation."),
        served("store", "Whether it can be retrieved and continued, while there is room. Default true."),
        served("background", "Answers at once, and goes on; retrieve it, or cancel it. Not with `stream`."),
        label("metadata", "Returned; it changes no token."),
        label("safety_identifier", LABEL),
        label("prompt_cache_key", "The prefix cache finds by itself what prompts share."),
        refused("access_programs", HOSTED),
        refused("background_options", HOSTED),
        refused("context_management", "nothing is compacted", []),
        refused("conversation", "use previous_response_id"),
        refused("image", MEDIA),
        refused("max_tool_calls", TOOLS),
        refused("moderation", HOSTED),
        refused("parallel_tool_calls", TOOLS),
        refused("prompt", "there are no stored prompts"),
        refused("prompt_cache_options", RETENTION),
        refused("prompt_cache_retention", RETENTION),
        refused("reasoning", "the model takes no such instruction", {}),
        refused("service_tier", "all requests are alike; see priority", "auto", "default"),
        refused("stream_options", "nothing is padded", {}, {"include_obfuscation": False}),
        refused("text", FORMAT, {}, {"format": {"type": "text"}}),
        refused("tool_choice", TOOLS, "none", "auto"),
        refused("tools", TOOLS, []),
        refused("truncation", "a prompt that is too long is refused", "disabled"),
        *_EXTENSIONS,
        served("frequency_penalty", "Extension. -2 to 2.", float),
        served("presence_penalty", "Extension. -2 to 2.", float),
        served("stop", "Extension. At most 16 texts of at most 1,024 characters.", str | list[str]),
        served("seed", "Extension. -2^63 to 2^64 - 1.", Seed),
        served("logit_bias", "Extension. Token id to -100 to 100, at most 1,024.", dict[TokenKey, float]),
    ),
    {
        EasyInputMessageParam: (_PHASE,),
        Message: (),
        ResponseOutputMessageParam: (_PHASE,),
        ResponseInputTextParam: _MESSAGES,
        ResponseOutputTextParam: (
            refused("annotations", "the model cites nothing", []),
            label("logprobs", "Of the answer that comes back; not read."),
        ),
    },
)

_MODEL = served("model", "Name of a served model. Default: the server's.", str)
TOKENIZE = Schema(
    "TokenizeRequest",
    None,
    (
        _MODEL,
        served("prompt", "A text. This or messages.", str),
        served("messages", "A conversation, rendered with the model's template.", list[ChatCompletionMessageParam]),
    ),
    CHAT.objects,
)
DETOKENIZE = Schema("DetokenizeRequest", None, (_MODEL, served("tokens", "Token ids.", Required[list[TokenId]])))
SCHEMAS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}

# Parameters of a query are texts.
_PageSize = Annotated[int, Strict(False), Field(ge=1, le=100)]
_AS_MADE = "a response is given as it was made"
_WHOLE = "a response that is kept is given whole"
RETRIEVE = Schema(
    "RetrieveQuery",
    response_retrieve_params.ResponseRetrieveParamsNonStreaming,
    (
        refused("include", _AS_MADE),
        refused("stream", _WHOLE, "false"),
        refused("starting_after", _WHOLE),
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
