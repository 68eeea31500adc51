"""Structured output of the built-in model, through OpenAI's own client: its helpers, whole and streamed, refusals, and
what people complain of elsewhere."""

import json
import re
from enum import Enum

import jsonschema_rs
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "nanoserve-builtin"
QUESTION = [{"role": "user", "content": "What is TTFT?"}]
GREEDY = {"model": MODEL, "temperature": 0, "messages": QUESTION}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Thing(BaseModel):
    name: str = Field(max_length=12)
    colour: Colour
    parts: list[int] = Field(max_length=2)


SCHEMA = Thing.model_json_schema() | {"additionalProperties": False}
NOT_ENFORCEABLE = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}


@pytest.fixture(scope="module")
def client(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**{**GREEDY, "max_tokens": 120, **options})


def of_schema(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **fields}}


def is_valid(text, schema=SCHEMA):
    return jsonschema_rs.is_valid(schema, json.loads(text))


# ------------------------------------------------------------------------------------------- the package's helpers


def test_a_chat_is_parsed(client):
    answer = client.chat.completions.parse(**GREEDY, response_format=Thing)
    [choice] = answer.choices
    assert isinstance(choice.message.parsed, Thing)
    assert (choice.finish_reason, choice.constraint_outcome) == ("stop", "satisfied")
    assert choice.message.parsed == Thing.model_validate_json(choice.message.content)


def test_a_streamed_chat_is_parsed(client):
    with client.chat.completions.stream(**GREEDY, response_format=Thing) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    [choice] = final.choices
    assert isinstance(choice.message.parsed, Thing)
    assert choice.finish_reason == "stop"
    assert (
        choice.message.content
        == client.chat.completions.parse(**GREEDY, response_format=Thing).choices[0].message.content
    )
    last = [event.chunk.choices[0] for event in events if event.type == "chunk"][-1]
    assert (last.finish_reason, last.constraint_outcome) == ("stop", "satisfied")
    [done] = [event for event in events if event.type == "content.done"]
    assert done.parsed == choice.message.parsed


def test_a_response_is_parsed(client):
    response = client.responses.parse(model=MODEL, input="What is TTFT?", temperature=0, text_format=Thing)
    assert isinstance(response.output_parsed, Thing)
    assert (response.status, response.constraint_outcome) == ("completed", "satisfied")
    assert response.text.format.type == "json_schema"
    assert response.text.format.schema_["properties"].keys() == {"name", "colour", "parts"}
    # What came back can be sent back.
    turns = [{"role": "user", "content": "a"}, *response.output, {"role": "user", "content": "b"}]
    assert client.responses.create(model=MODEL, input=turns, max_output_tokens=1).status == "incomplete"


def test_a_streamed_response_is_parsed(client):
    with client.responses.stream(model=MODEL, input="What is TTFT?", temperature=0, text_format=Thing) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert isinstance(final.output_parsed, Thing)
    assert client.responses.retrieve(final.id).constraint_outcome == "satisfied"


def test_a_chat_that_is_cut_off_is_not_parsed(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**GREEDY, response_format=Thing, max_tokens=4)


# ------------------------------------------------------------------------------------------- each kind


def test_schemas_are_followed_by_every_choice_at_any_temperature(client):
    answer = chat(client, response_format=of_schema(SCHEMA, strict=True), n=8, temperature=2, seed=3)
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert choice.constraint_outcome == "satisfied"
        assert choice.finish_reason == "stop"
        assert is_valid(choice.message.content)


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"choice": ["yes", "no", "yes and no"]}, "yes|no|yes and no"),
        ({"regex": r"\d{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "(" inner ")"\ninner: "x" | "yy"'}, r"\((x|yy)\)"),
        ({"json_object": True}, r"\{.*"),
        ({"json": {"const": "a"}}, '"a"'),
    ],
    ids=str,
)
def test_vllms_constraints_on_all_three_apis(client, structured, pattern):
    extra = {"structured_outputs": structured}
    completion = client.completions.create(model=MODEL, prompt=["TTFT", "KV"], max_tokens=30, seed=0, extra_body=extra)
    response = client.responses.create(model=MODEL, input="hi", max_output_tokens=30, extra_body={**extra, "seed": 0})
    texts = [choice.text for choice in completion.choices] + [response.output_text]
    texts.append(chat(client, extra_body=extra, max_tokens=30).choices[0].message.content)
    for text in texts:
        assert re.fullmatch(pattern, text, re.DOTALL)


def test_the_streamed_text_is_that_of_the_whole_answer(client):
    options = {"response_format": of_schema(SCHEMA, strict=True), "n": 2, "seed": 5, "temperature": 1}
    whole = chat(client, **options)
    chunks = [chunk.choices[0] for chunk in chat(client, **options, stream=True)]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.delta.content or "" for chunk in mine) == choice.message.content
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == ["stop"]
        assert mine[-1].constraint_outcome == "satisfied"


# ------------------------------------------------------------------------------------------- refused and relaxed


def test_a_strict_schema_that_cannot_be_enforced_is_refused_and_else_checked(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, response_format=of_schema(NOT_ENFORCEABLE, strict=True))
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code == "constraint_invalid"
    assert "/uniqueItems cannot be enforced" in caught.value.message
    answer = chat(client, response_format=of_schema(NOT_ENFORCEABLE), n=8, temperature=50, seed=1)
    outcomes = {choice.message.content: choice.constraint_outcome for choice in answer.choices}
    assert set(outcomes.values()) == {"relaxed_ok", "relaxed_violated"}
    for text, outcome in outcomes.items():
        assert outcome == ("relaxed_ok" if is_valid(text, NOT_ENFORCEABLE) else "relaxed_violated")
    place = "response_format.json_schema.schema"
    unenforced = [{"pointer": "", "keyword": "uniqueItems", "why": "cannot be enforced", "param": place}]
    assert [choice.unenforced for choice in answer.choices] == [unenforced] * 8


def test_a_keyword_deep_in_a_schema_is_named_with_its_place(client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": NOT_ENFORCEABLE}}}
    for refused in (
        lambda: chat(client, response_format=of_schema(schema, strict=True)),
        lambda: chat(client, stream=True, extra_body={"guided_json": json.dumps(schema)}),
        lambda: client.responses.create(
            model=MODEL,
            input="hi",
            text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        ),
    ):
        with pytest.raises(openai.BadRequestError, match="/properties/a/items/uniqueItems cannot be enforced"):
            refused()


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "/1 must not be empty"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not JSON"),
        # vLLM's other grammars are not taken for this one.
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar", "Expected token"),
        ({"structured_outputs": {"json": {"type": "objct"}}}, "structured_outputs.json", "/type"),
    ],
    ids=str,
)
def test_what_is_no_constraint_is_refused_by_its_name(client, extra, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body=extra)
    assert (caught.value.param, caught.value.code) == (param, "constraint_invalid")
    assert words in caught.value.message


# ------------------------------------------------------------------------------------------- complaints about others


def test_unfinished_json_ends_for_its_length(client):
    """vLLM's issues 58228 and 46303."""
    options = {"response_format": of_schema(SCHEMA, strict=True), "max_tokens": 4}
    [choice] = chat(client, **options).choices
    last = list(chat(client, **options, stream=True))[-1].choices[0]
    for each in (choice, last):
        assert (each.finish_reason, each.constraint_outcome) == ("length", "truncated")
    response = client.responses.create(
        model=MODEL,
        input="hi",
        max_output_tokens=4,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
    )
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.constraint_outcome == "truncated"


def test_a_stop_string_within_json_is_told_apart_from_its_end(client):
    [choice] = chat(client, response_format=of_schema(SCHEMA, strict=True), stop='"colour"').choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", '"colour"')
    assert choice.constraint_outcome == "truncated"


def test_json_object_and_a_schema_are_not_mixed_up(client):
    """vLLM's issue 13429."""
    [any_object] = chat(client, response_format={"type": "json_object"}, max_tokens=20).choices
    assert any_object.message.content.startswith("{")
    [number] = chat(client, response_format=of_schema({"type": "integer", "maximum": 9, "minimum": 0})).choices
    assert number.message.content in "0123456789"
    both = {"response_format": {"type": "json_object"}, "extra_body": {"guided_json": SCHEMA}}
    with pytest.raises(openai.BadRequestError, match="response_format: is given beside guided_json"):
        chat(client, **both)


@pytest.mark.parametrize(
    "extra",
    [{"guided_whitespace_pattern": " "}, {"structured_outputs": {"json": {}, "whitespace_pattern": " "}}],
    ids=str,
)
def test_no_pattern_of_white_space_is_taken_and_ignored(client, extra):
    """vLLM's issue 26362, SGLang's 8250."""
    with pytest.raises(openai.BadRequestError, match="whitespace_pattern: is not served"):
        chat(client, extra_body=extra)


def test_white_space_ends_however_much_the_model_wants_it(client):
    """vLLM's issues 38696, 55313 and 44619."""
    [space] = client.post("/../tokenize", body={"prompt": " "}, cast_to=object)["tokens"]
    [choice] = chat(
        client, response_format=of_schema(SCHEMA, strict=True), logit_bias={str(space): 100}, max_tokens=900
    ).choices
    assert choice.constraint_outcome == "satisfied"
    assert "  " in choice.message.content
    assert not re.search(r"[ \n\r\t]{17}", re.sub(r'"[^"]*"', "", choice.message.content))


def test_keywords_without_a_type_and_members_that_are_only_required_hold(client):
    """vLLM's issues 56556, 45592 and 57550, SGLang's 37707."""
    schema = {
        "allOf": [{"required": ["a"]}, {"type": "object", "properties": {"a": {"maximum": 3, "type": "integer"}}}]
    }
    [choice] = chat(client, response_format=of_schema(schema, strict=True), n=1, max_tokens=300).choices
    if choice.constraint_outcome == "satisfied":
        assert is_valid(choice.message.content, schema)
    else:
        assert choice.finish_reason == "length"


def test_the_neighbours_of_a_constraint_that_is_too_much_go_on(client):
    """vLLM's issues 54003 and 45172."""
    plain = chat(client, max_tokens=30).choices[0].message.content
    with chat(client, stream=True, max_tokens=30) as stream:
        first = next(stream)
        with pytest.raises(openai.APIStatusError):
            chat(client, extra_body={"guided_regex": "(a{1,1000}){1,1000}" * 40})
        rest = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in [first, *rest]) == plain
