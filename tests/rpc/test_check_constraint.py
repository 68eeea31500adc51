"""CheckConstraint, over a channel and with both clients."""

import asyncio
import json

import grpc
import pytest
from nanoserve_client import AsyncClient, Client, InvalidRequest, KeywordTreatment, NotFound
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import model_pb2

SCHEMA = {
    "type": "object",
    "title": "A list",
    "properties": {"tags": {"type": "array", "uniqueItems": True}},
}


def request_for(**constraint):
    return model_pb2.CheckConstraintRequest(constraint=pb.Constraint(**constraint))


async def test_a_schema_is_described(served):
    schema = {key: SCHEMA[key] for key in ("type", "title")}
    answer = await served.model.CheckConstraint(request_for(json_schema=json.dumps(schema)))
    assert answer.enforced
    assert [(use.pointer, use.keyword, use.treatment, use.why) for use in answer.keywords] == [
        ("", "type", model_pb2.KEYWORD_TREATMENT_ENFORCED, ""),
        ("", "title", model_pb2.KEYWORD_TREATMENT_ANNOTATION, ""),
    ]
    assert answer.keyword_count == 2
    assert answer.grammar_bytes > 100
    assert answer.compile.ToMicroseconds() > 0
    assert answer.first_mask.ToMicroseconds() > 0


async def test_a_keyword_that_cannot_be_enforced_is_an_error_with_its_place(served, failure_of):
    failure = await failure_of(served.model.CheckConstraint(request_for(json_schema=json.dumps(SCHEMA))))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONSTRAINT_INVALID")
    assert failure.violations == {"constraint.json_schema": "/properties/tags/uniqueItems cannot be enforced"}


async def test_a_relaxed_schema_tells_first_what_is_relaxed(served):
    answer = await served.model.CheckConstraint(request_for(json_schema=json.dumps(SCHEMA), relaxed=True))
    assert not answer.enforced
    first = answer.keywords[0]
    assert (first.pointer, first.keyword) == ("/properties/tags", "uniqueItems")
    assert (first.treatment, first.why) == (model_pb2.KEYWORD_TREATMENT_RELAXED, "cannot be enforced")
    assert answer.keyword_count == len(answer.keywords) == 5


async def test_a_long_list_of_keywords_is_cut(served):
    schema = {"anyOf": [{"type": "null"}] * 1000, "enum": [None]}
    answer = await served.model.CheckConstraint(request_for(json_schema=json.dumps(schema)))
    assert (len(answer.keywords), answer.keyword_count) == (1000, 1002)


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_object": True},
        {"regex": "[a-z]+"},
        {"grammar": 'start: "a" | "b"'},
        {"choices": pb.Choices(texts=["yes", "no"])},
    ],
)
async def test_other_kinds_have_no_keywords(served, constraint):
    answer = await served.model.CheckConstraint(request_for(**constraint))
    assert answer.enforced
    assert answer.keyword_count == 0


@pytest.mark.parametrize(
    ("constraint", "violations"),
    [
        ({}, {"constraint": "one of json_schema, json_object, regex, grammar and choices is required"}),
        ({"json_object": False}, {"constraint.json_object": "must be true"}),
        ({"regex": "a", "relaxed": True}, {"constraint.relaxed": "is for json_schema only, not for regex"}),
    ],
)
async def test_the_form_is_checked(served, failure_of, constraint, violations):
    failure = await failure_of(served.model.CheckConstraint(request_for(**constraint)))
    assert (failure.reason, failure.violations) == ("INVALID_REQUEST", violations)


async def test_an_error_of_a_huge_place_fits_its_trailers(served, failure_of):
    schema = json.dumps({"properties": {"a" * 100_000: {"not": {}, "b" * 50_000: 1}}})
    failure = await failure_of(served.model.CheckConstraint(request_for(json_schema=schema)))
    assert failure.reason == "CONSTRAINT_INVALID"


async def test_the_loop_goes_on_beside_a_hostile_schema(served):
    """Compiling it takes longer than many small calls."""
    branches = [{"type": "object", "properties": {f"a{i}": {}}} for i in range(1000)]
    slow = served.model.CheckConstraint(request_for(json_schema=json.dumps({"oneOf": branches}), relaxed=True))
    hostile = asyncio.ensure_future(slow)
    for _ in range(20):
        await served.model.ListModels(model_pb2.ListModelsRequest())
    assert not hostile.done()
    assert not (await hostile).enforced


async def test_the_clients_ask_alike(served):
    target = f"127.0.0.1:{served.port}"

    def ask():
        with Client(target) as client:
            return client.check_constraint(schema=SCHEMA, relaxed=True)

    async with AsyncClient(target) as client:
        check = await client.check_constraint(schema=json.dumps(SCHEMA), relaxed=True)
        assert await asyncio.to_thread(ask) == check
        assert not check.enforced
        assert check.keywords[0].treatment is KeywordTreatment.RELAXED
        assert check.keyword_count == len(check.keywords)
        assert check.compile_s > 0
        assert check.first_mask_s > 0
        with pytest.raises(InvalidRequest) as caught:
            await client.check_constraint(schema=SCHEMA)
        assert caught.value.reason == "CONSTRAINT_INVALID"
        assert caught.value.metadata["pointer"] == "/properties/tags"
        assert caught.value.metadata["keyword"] == "uniqueItems"
        with pytest.raises(InvalidRequest, match="at least one is required"):
            await client.check_constraint(choices=[])
        with pytest.raises(NotFound):
            await client.check_constraint(json_object=True, model="other")


@pytest.mark.parametrize(
    "options", [{}, {"json_object": False}, {"regex": "a", "choices": ["b"]}, {"json_schema": "{}"}]
)
async def test_the_client_takes_one_constraint(served, options):
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        with pytest.raises(TypeError):
            await client.check_constraint(**options)
