"""Every field of the openai package's parameter types, those of queries too, has a line in the table, and every line
does what it says."""

import inspect
import re
import typing

import pytest
from nanoserve_gateway.fields import CHAT, COMPLETIONS, INPUT_ITEMS, QUERIES, RESPONSES, RETRIEVE, SCHEMAS
from nanoserve_gateway.pages import ENDPOINTS
from nanoserve_gateway.schema import BadRequest, parse_json
from openai import resources
from openai.resources import chat, responses
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_item_list_params, response_create_params, response_retrieve_params

MODULES = {
    CHAT: chat_create_params,
    COMPLETIONS: completion_create_params,
    RESPONSES: response_create_params,
    RETRIEVE: response_retrieve_params,
    INPUT_ITEMS: input_item_list_params,
}
REQUESTS = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    RESPONSES: {"model": "m", "input": "hi"},
    RETRIEVE: {},
    INPUT_ITEMS: {},
}
# What sends to each endpoint that OpenAI has too.
METHODS = {
    ("POST", "/v1/chat/completions"): chat.completions.Completions.create,
    ("POST", "/v1/completions"): resources.Completions.create,
    ("POST", "/v1/responses"): responses.Responses.create,
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
    kinds = ("CompletionCreate", "ResponseCreate", "ResponseRetrieve", "InputItemList")
    variants = [getattr(module, name) for name in module.__all__ if name.startswith(kinds)]
    return set().union(*(typing.get_type_hints(variant) for variant in variants))


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_no_field_of_the_openai_package_is_without_a_line(schema):
    assert fields_of(MODULES[schema]) - schema.fields.keys() == set()


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_what_the_openai_package_does_not_have_is_called_an_extension(schema):
    for field in schema.fields.values():
        is_extension = field.name not in fields_of(MODULES[schema])
        assert is_extension == field.note.startswith("Extension."), field


@pytest.mark.parametrize("schema", MODULES, ids=names(MODULES))
def test_every_member_of_a_served_object_is_checked_or_refused(schema):
    for hint, lines in schema.objects.items():
        members = set(typing.get_type_hints(hint))
        assert {line.name for line in lines} <= members, hint
        assert set(schema._object(hint).model_fields) == members - {line.name for line in lines}


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
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}, "messages[0]"),
        (CHAT, {"stream_options": {"include_obfuscation": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt[0]"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "input[0]"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(schema, change, param):
    with pytest.raises(BadRequest) as caught:
        schema.parse({**REQUESTS[schema], **change})
    assert caught.value.violations[0].param == param


def test_all_violations_are_told_at_once():
    with pytest.raises(BadRequest) as caught:
        CHAT.parse({"tools": [1], "x": 1, "top_p": "1", "messages": [{"role": "user"}, {"role": "x"}]})
    assert {v.param for v in caught.value.violations} == {
        *("tools", "x", "top_p", "model", "messages[0].content"),
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
    assert METHODS.keys() == {(method, path) for method, path in ENDPOINTS if path.startswith("/v1/")}


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(BadRequest, match="must be a JSON object"):
        CHAT.parse(body)
