"""Every field of the openai package's parameter types, those of queries too, has a line in the table, and every line
does what it says."""

import inspect
import re
import typing

import pytest
from nanoserve_gateway.chat import content_of
from nanoserve_gateway.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    INPUT_ITEMS,
    INPUT_TOKENS,
    LOAD_ADAPTER,
    QUERIES,
    RESPONSES,
    RETRIEVE,
    SCHEMAS,
    UNLOAD_ADAPTER,
)
from nanoserve_gateway.pages import ENDPOINTS
from nanoserve_gateway.schema import BadRequest, parse_json
from openai import resources
from openai.resources import chat, responses
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import (
    input_item_list_params,
    input_token_count_params,
    response_create_params,
    response_retrieve_params,
)

MODULES = {
    CHAT: chat_create_params,
    COMPLETIONS: completion_create_params,
    RESPONSES: response_create_params,
    RETRIEVE: response_retrieve_params,
    INPUT_ITEMS: input_item_list_params,
    INPUT_TOKENS: input_token_count_params,
}
REQUESTS = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    RESPONSES: {"model": "m", "input": "hi"},
    RETRIEVE: {},
    INPUT_ITEMS: {},
    INPUT_TOKENS: {},
}
# What the others cannot do without.
REQUIRED = {DETOKENIZE: {"tokens": [1]}, LOAD_ADAPTER: {"lora_name": "a"}, UNLOAD_ADAPTER: {"lora_name": "a"}}
# What sends to each endpoint that OpenAI has too.
METHODS = {
    ("POST", "/v1/chat/completions"): chat.completions.Completions.create,
    ("POST", "/v1/completions"): resources.Completions.create,
    ("POST", "/v1/responses"): responses.Responses.create,
    ("POST", "/v1/responses/input_tokens"): responses.InputTokens.count,
    ("GET", "/v1/responses/{id}"): responses.Responses.retrieve,
    ("DELETE", "/v1/responses/{id}"): responses.Responses.delete,
    ("POST", "/v1/responses/{id}/cancel"): responses.Responses.cancel,
    ("GET", "/v1/responses/{id}/input_items"): responses.InputItems.list,
    ("GET", "/v1/models"): resources.Models.list,
    ("GET", "/v1/models/{name}"): resources.Models.retrieve,
}
REFUSED = [(schema, field) for schema in REQUESTS for field in schema.fields.values() if field.status == "refused"]


def names(schemas):
    return [schema.name for schema in schemas]


def fields_of(module):
    kinds = ("CompletionCreate", "ResponseCreate", "ResponseRetrieve", "InputItemList", "InputTokenCount")
    variants = [getattr(module, name) for name in module.__all__ if name.startswith(kinds)]
    return set().union(*(typing.get_type_hints(variant) for variant in variants))


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_no_field_of_the_openai_package_is_without_a_line(schema):
    assert fields_of(MODULES[schema]) - schema.fields.keys() == set()


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_what_the_openai_package_does_not_have_is_called_an_extension(schema):
    for field in (field for field in schema.fields.values() if field.status != "refused"):
        is_extension = field.name not in fields_of(MODULES[schema])
        assert is_extension == field.note.startswith("Extension."), field


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_every_member_of_a_served_object_is_checked_or_refused(schema):
    for hint, lines in schema.objects.items():
        members = set(typing.get_type_hints(hint))
        added = {line.name for line in lines if line.status == "served"}
        dropped = {line.name for line in lines} - added
        assert set(schema._object(hint).model_fields) == (members | added) - dropped


@pytest.mark.parametrize(("schema", "field"), REFUSED, ids=[f"{s.name}.{f.name}" for s, f in REFUSED])
def test_a_refused_field_is_named_with_its_reason(schema, field):
    with pytest.raises(BadRequest) as caught:
        schema.parse({**REQUESTS[schema], field.name: "anything"})
    [violation] = caught.value.violations
    assert violation.param == field.name
    assert field.note in violation.message
    for harmless in (None, *field.harmless):
        assert schema.parse({**REQUESTS[schema], field.name: harmless}) == REQUESTS[schema]


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=names(SCHEMAS.values()))
def test_an_unknown_field_is_refused(schema):
    with pytest.raises(BadRequest, match="temprature: is not a field of this request"):
        schema.parse({**REQUESTS.get(schema, {}), "temprature": 1})


@pytest.mark.parametrize(
    ("schema", "change", "param"),
    [
        (CHAT, {"temperature": "1"}, "temperature"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"n": 2**32}, "n"),
        (CHAT, {"seed": 2**64}, "seed"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (CHAT, {"stop": ["a", 5]}, "stop[1]"),
        (CHAT, {"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}, "messages[0].audio"),
        (CHAT, {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt[0]"),
        (RESPONSES, {"input": [{"type": "web_search_call"}]}, "input[0]"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "input[0].arguments"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        (RESPONSES, {"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        (RESPONSES, {"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        (CHAT, {"tool_choice": "any"}, "tool_choice"),
        (CHAT, {"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice.function"),
        (CHAT, {"functions": [{"description": "x"}]}, "functions[0].name"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].name"),
        (RESPONSES, {"input": [{"type": "item_reference"}]}, "input[0].id"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (CHAT, {"response_format": {"type": "structural_tag"}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
        (CHAT, {"guided_choice": "a"}, "guided_choice"),
        (
            CHAT,
            {"structured_outputs": {"json": "{}", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (COMPLETIONS, {"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (COMPLETIONS, {"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices"),
        (
            RESPONSES,
            {"structured_outputs": {"disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        (RESPONSES, {"reasoning": {"effort": 1}}, "reasoning.effort"),
        (CHAT, {"reasoning_effort": "a lot"}, "reasoning_effort"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        (COMPLETIONS, {"top_k": -2}, "top_k"),
        (COMPLETIONS, {"stop": ["a", None]}, "stop[1]"),
        (COMPLETIONS, {"logit_bias": {"5": None}}, "logit_bias.5"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(schema, change, param):
    with pytest.raises(BadRequest) as caught:
        schema.parse({**REQUESTS[schema], **change})
    assert caught.value.violations[0].param == param


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            {"role": "critic", "content": "x"},
            "messages[0].role: 'critic' is not served; served: developer, system, user, assistant, tool, function",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type: 'image_url' is not served; served: text",
        ),
        (
            {"role": "user", "content": "x", "{colour}": 1},
            "messages[0].{colour}: is not a field here; there are: content, role, name",
        ),
    ],
)
def test_a_person_reads_what_there_is_instead(message, text):
    with pytest.raises(BadRequest) as caught:
        CHAT.parse({"messages": [message]})
    assert str(caught.value) == text


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=names(SCHEMAS.values()))
def test_null_is_the_same_as_absent(schema):
    given = REQUESTS.get(schema, REQUIRED.get(schema, {}))
    assert schema.parse({**dict.fromkeys(schema.fields), **given}) == schema.parse(given)


def test_null_is_the_same_as_absent_within_objects_too():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": None}], "name": None},
        {**ChatCompletionMessage(role="assistant", content=None, tool_calls=[call]).model_dump(), "reasoning": None},
        {"role": "tool", "content": "x", "tool_call_id": "c"},
    ]
    taken = CHAT.parse({"messages": messages, "stream_options": {"include_usage": None}})
    assert taken["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "tool_calls": [call]},
        messages[2],
    ]
    assert taken["stream_options"] == {}
    item = {"role": "user", "content": "x", "type": None, "status": None}
    given = {"input": [item], "reasoning": {"effort": None}, "text": {"format": None, "verbosity": None}}
    assert RESPONSES.parse(given)["input"] == [{"role": "user", "content": "x"}]


def test_what_openais_clients_add_may_come_back():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    function = {**call["function"], "parsed_arguments": {"a": 1}}
    said = {"role": "assistant", "content": "x", "parsed": {"a": 1}, "tool_calls": [{**call, "function": function}]}
    assert CHAT.parse({"messages": [said]})["messages"] == [{"role": "assistant", "content": "x", "tool_calls": [call]}]
    made = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    assert RESPONSES.parse({"input": [{**made, "parsed_arguments": {"a": 1}}]})["input"] == [made]
    [part] = SAID["content"]
    parsed = {**SAID, "content": [{**part, "parsed": {"a": 1}}]}
    assert RESPONSES.parse({"input": [parsed]})["input"] == [SAID]


def test_variables_of_the_template_keep_their_nulls():
    given = {**REQUESTS[CHAT], "chat_template_kwargs": {"date": None, "deep": {"a": None}}}
    assert CHAT.parse(given) == given


def test_what_is_empty_is_taken_as_it_is():
    nothing = {"stop": [], "logit_bias": {}, "stream_options": {}, "chat_template_kwargs": {}, "stop_token_ids": []}
    assert CHAT.parse({**REQUESTS[CHAT], **nothing}) == {**REQUESTS[CHAT], **nothing}


SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}


@pytest.mark.parametrize(
    "item",
    [
        SAID,
        {**SAID, "id": "msg_1", "status": "completed", "content": [{**SAID["content"][0], "annotations": []}]},
        {**SAID, "id": None, "status": None},
        {name: value for name, value in SAID.items() if name != "type"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "a", "id": "msg_1", "status": "completed"},
        {"type": "message", "role": "user", "id": "msg_1", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "item_reference", "id": "msg_1"},
        {"id": "msg_1"},
    ],
    ids=range(9),
)
def test_items_come_as_they_were_given_or_with_their_words_alone(item):
    [taken] = RESPONSES.parse({"input": [item]})["input"]
    given = {name: value for name, value in item.items() if value is not None}
    assert {**taken, "content": None} == {**given, "content": None}
    assert "role" not in item or content_of(taken["content"]) in ("a", ["a"])


@pytest.mark.parametrize(
    "field",
    [
        {"text": {"format": None, "verbosity": "medium"}},
        {"text": {"format": None}},
        {"reasoning": {"effort": None, "summary": None}},
        {"stream_options": {"include_obfuscation": None}},
        {"parallel_tool_calls": True},
        {"max_tool_calls": 5},
        {"store": None},
        {"previous_response_id": None},
    ],
    ids=str,
)
def test_what_of_a_response_asks_for_nothing_is_taken(field):
    taken = RESPONSES.parse({"input": "hi", **field})
    assert {name: value for name, value in taken.items() if value != {}} in ({"input": "hi"}, {"input": "hi", **field})


@pytest.mark.parametrize(
    "field",
    [
        {"parallel_tool_calls": True},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": []},
        {"verbosity": "medium"},
        {"store": False},
        {"response_format": {"type": "text"}},
        {"guided_decoding_backend": "auto", "guided_whitespace_pattern": None},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"logprobs": False, "top_logprobs": None},
    ],
    ids=str,
)
def test_what_of_a_chat_asks_for_nothing_is_taken(field):
    CHAT.parse({"messages": [{"role": "user", "content": "hi"}], **field})


def test_all_violations_are_told_at_once():
    with pytest.raises(BadRequest) as caught:
        CHAT.parse({"tools": [1], "x": 1, "top_p": "1", "messages": [{"role": "user"}, {"role": "x"}]})
    assert {v.param for v in caught.value.violations} == {
        *("tools[0]", "x", "top_p", "messages[0].content"),
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "tiny", "messages": [' + b"1," * 4_000_000 + b"1]}", "messages[0]"),
        (b"{" + b",".join(b'"a%d": 1' % n for n in range(500_000)) + b', "a1": 1}', "body"),
    ],
    ids=["items", "names"],
)
def test_millions_of_mistakes_are_not_counted(body, param):
    with pytest.raises(BadRequest) as caught:
        CHAT.parse(parse_json(body))
    assert param in [violation.param for violation in caught.value.violations]
    assert len(caught.value.violations) < 5


def test_no_method_of_the_openai_package_sends_a_query_that_has_no_table():
    with_query = {end for end, method in METHODS.items() if re.search(r"\bquery=", inspect.getsource(method))}
    assert with_query == QUERIES.keys()
    assert METHODS.keys() == {
        (method, path) for method, path in ENDPOINTS if path.startswith("/v1/") and "lora" not in path
    }


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(BadRequest, match="must be a JSON object"):
        CHAT.parse(body)
