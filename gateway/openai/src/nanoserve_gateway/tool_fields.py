"""Lines of the table of fields: tools, choices among them, and calls, in chats and in responses."""

from typing import Any, Literal, Required

from openai.types.chat import (
    ChatCompletionAllowedToolChoiceParam,
    ChatCompletionAllowedToolsParam,
    ChatCompletionFunctionCallOptionParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolMessageParam,
)
from openai.types.chat.chat_completion_assistant_message_param import FunctionCall
from openai.types.chat.chat_completion_message_function_tool_call_param import Function
from openai.types.responses import (
    FunctionToolParam,
    ResponseFunctionToolCallParam,
    ResponseReasoningItemParam,
    ToolChoiceAllowedParam,
    ToolChoiceFunctionParam,
)
from openai.types.responses.response_input_param import FunctionCallOutput
from openai.types.shared_params import FunctionDefinition

from nanoserve_gateway.schema import Field, label, refused, served

_WHAT = "Functions that the model may call, at most 128. Nobody here calls them: the answer says what to call."
_STRICT = "Whether all of the schema has to be enforced, or the request is refused."
_NAMES = "Of `tools`, by their names."
# What chats and responses have.
TOOLS = (
    served("tools", f"{_WHAT} None of OpenAI's own."),
    served("tool_choice", "none, auto, required, one certain function, or `allowed_tools`. Only with `tools`."),
    served(
        "parallel_tool_calls",
        "False = at most one call. Default true, but false if a function is named. Without tools it changes nothing.",
    ),
)
FUNCTIONS = (
    served("functions", "`tools` by OpenAI's older name. At most one is called."),
    served("function_call", "none, auto, or the name of a function. Only with `functions`."),
)

_PARSED = label("parsed_arguments", "OpenAI's clients add it to a call that they have read; not read.")
OF_CHAT: dict[type, tuple[Field, ...]] = {
    ChatCompletionToolMessageParam: (),
    ChatCompletionFunctionMessageParam: (served("content", "Its answer; null is an empty one.", str),),
    ChatCompletionMessageFunctionToolCallParam: (),
    Function: (_PARSED,),
    FunctionCall: (),
    ChatCompletionFunctionToolParam: (),
    FunctionDefinition: (
        served("strict", f"{_STRICT} Default false: with `auto` the arguments are then the model's own.", bool),
    ),
    ChatCompletionNamedToolChoiceParam: (),
    ChatCompletionAllowedToolChoiceParam: (),
    ChatCompletionAllowedToolsParam: (served("tools", _NAMES, Required[list[ChatCompletionNamedToolChoiceParam]]),),
    ChatCompletionFunctionCallOptionParam: (),
}

# Of an item that is no message.
_OWN = (
    served("id", "Any, or none.", str),
    served("status", "Any, or none.", Literal["in_progress", "completed", "incomplete"]),
)
_DIRECT = "a call is the model's own"
_OF_PROGRAM = (
    refused("caller", _DIRECT, {"type": "direct"}),
    refused("namespace", "tools go by their names alone"),
)
_NOT_AWAITED = refused("async", "the answer of a tool is what a later request brings", False)
OF_RESPONSES: dict[type, tuple[Field, ...]] = {
    FunctionToolParam: (
        served("parameters", "A JSON Schema of an object. Default: no parameters.", dict[str, Any]),
        served("strict", f"{_STRICT} Default true.", bool),
        refused("allowed_callers", _DIRECT, ["direct"]),
        _NOT_AWAITED,
        refused("defer_loading", "the model is shown all tools", False),
        refused("output_schema", "the model's template knows none"),
    ),
    ToolChoiceFunctionParam: (),
    ToolChoiceAllowedParam: (served("tools", _NAMES, Required[list[ToolChoiceFunctionParam]]),),
    ResponseFunctionToolCallParam: (*_OWN, *_OF_PROGRAM, _NOT_AWAITED, _PARSED),
    FunctionCallOutput: (
        *_OWN,
        served("call_id", "Of the call that it answers.", Required[str]),
        served("name", "Of the function, for templates that know one.", str),
        *_OF_PROGRAM,
    ),
    ResponseReasoningItemParam: (
        *_OWN,
        refused("summary", "none are made; the reasoning itself is in content", []),
        refused("encrypted_content", "the reasoning stands in content, as it is"),
    ),
}
