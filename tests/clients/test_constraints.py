"""What the output must be: from options to the contract's constraint, and the values of what came back."""

import json
import re
from pathlib import Path

import pytest
from nanoserve_client import CheckOptions, Client, ConstraintOutcome, FinishReason, UnenforcedKeyword
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import model_pb2
from pydantic import BaseModel, Field, ValidationError
from scripted_server import delta, finished, started


class City(BaseModel):
    """A model class of pydantic."""

    name: str
    people: int = Field(ge=0)


SCHEMA = {"type": "object", "properties": {"é": {"const": None}}}
OUTCOMES = [
    pb.CONSTRAINT_OUTCOME_SATISFIED,
    pb.CONSTRAINT_OUTCOME_TRUNCATED,
    pb.CONSTRAINT_OUTCOME_RELAXED_OK,
    pb.CONSTRAINT_OUTCOME_RELAXED_VIOLATED,
    99,
]


def saying(*texts, outcomes=(pb.CONSTRAINT_OUTCOME_SATISFIED,) * 9, reason=pb.FINISH_REASON_COMPLETE, unenforced=()):
    """A server that says so, one sequence each."""

    def generate(_request, _context):
        yield started()
        for index, text in enumerate(texts):
            yield delta(index, text, (1,), finish_reason=reason)
        yield finished(len(texts), constraint_outcomes=outcomes[: len(texts)], unenforced=unenforced)

    return generate


async def result_of(face, server, **options):
    stream = face.connect(server.target).chat("A city?", **options)
    return await face.call(stream.result)


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({"schema": SCHEMA}, pb.Constraint(json_schema=json.dumps(SCHEMA))),
        ({"schema": '{"a": 1 }'}, pb.Constraint(json_schema='{"a": 1 }')),
        ({"schema": City}, pb.Constraint(json_schema=json.dumps(City.model_json_schema()))),
        ({"schema": {}, "relaxed": True}, pb.Constraint(json_schema="{}", relaxed=True)),
        ({"json_object": True}, pb.Constraint(json_object=True)),
        ({"regex": "[a-z]+"}, pb.Constraint(regex="[a-z]+")),
        ({"regex": re.compile("[a-z]+", re.IGNORECASE)}, pb.Constraint(regex="[a-z]+")),
        ({"regex": ""}, pb.Constraint(regex="")),
        ({"grammar": 'start: "a"'}, pb.Constraint(grammar='start: "a"')),
        ({"choices": ("a", "b")}, pb.Constraint(choices=pb.Choices(texts=["a", "b"]))),
        ({"choices": []}, pb.Constraint(choices=pb.Choices())),
        ({"schema": None, "json_object": False, "regex": None, "relaxed": None}, None),
    ],
    ids=str,
)
async def test_each_kind_reaches_its_field(face, server, options, constraint):
    server.script.generate = saying("{}")
    await result_of(face, server, **options)
    [request] = server.script.requests
    assert (request.constraint if request.HasField("constraint") else None) == constraint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {}, "choices": []}, "schema and choices are given; at most one"),
        ({"relaxed": True}, "relaxed: there is no constraint"),
        ({"regex": 5}, "regex is 5: "),
        ({"choices": [5]}, r"choices is \[5\]: "),
        ({"schema": {"a": {1}}}, "Object of type set is not JSON"),
    ],
    ids=str,
)
async def test_what_is_no_constraint_fails_at_once(face, server, options, message):
    client = face.connect(server.target)
    with pytest.raises(TypeError, match=message):
        client.generate("x", **options)
    assert server.script.requests == []


@pytest.mark.parametrize(
    ("options", "text", "value"),
    [
        ({"schema": SCHEMA}, '{"é": null}', {"é": None}),
        ({"schema": json.dumps(SCHEMA)}, "[1, 2.5]", [1, 2.5]),
        ({"schema": City}, '{"name": "Bonn", "people": 5}', City(name="Bonn", people=5)),
        ({"json_object": True}, '{"a": "b"}', {"a": "b"}),
        ({"regex": re.compile("[0-9]+")}, "12", "12"),
        ({"grammar": 'start: "{}"'}, "{}", "{}"),
        ({"choices": ["1", "2"]}, "1", "1"),
    ],
    ids=str,
)
async def test_the_value_is_what_the_constraint_says(face, server, options, text, value):
    server.script.generate = saying(text)
    result = await result_of(face, server, **options)
    assert result.parsed == result.completions[0].parsed == value
    assert result.completions[0].finish_reason is FinishReason.COMPLETE
    assert result.completions[0].constraint_outcome is ConstraintOutcome.SATISFIED


async def test_the_value_is_made_when_it_is_asked_for_and_each_time_anew(face, server):
    server.script.generate = saying("{}")
    result = await result_of(face, server, json_object=True)
    result.parsed["a"] = 1
    assert result.parsed == {}


async def test_an_output_that_is_cut_off_has_no_value(face, server):
    truncated = [pb.CONSTRAINT_OUTCOME_TRUNCATED]
    server.script.generate = saying('{"name": ', outcomes=truncated, reason=pb.FINISH_REASON_LENGTH)
    result = await result_of(face, server, schema=City)
    with pytest.raises(ValueError, match=r"the output is cut off \(length\): '{\"name\": '"):
        assert result.parsed
    # A text that is cut off is no text that the expression matches.
    result = await result_of(face, server, regex="[a-z]{9}")
    with pytest.raises(ValueError, match="is cut off"):
        assert result.parsed


async def test_what_only_pydantic_knows_is_pydantics_to_say(face, server):
    violated = [pb.CONSTRAINT_OUTCOME_RELAXED_VIOLATED]
    server.script.generate = saying('{"name": "Bonn", "people": -1}', outcomes=violated)
    result = await result_of(face, server, schema=City, relaxed=True)
    with pytest.raises(ValidationError, match="people"):
        assert result.parsed
    # As a dict it has a value; whether it holds is for the outcome to say.
    result = await result_of(face, server, schema=City.model_json_schema(), relaxed=True)
    assert result.parsed["people"] == -1
    assert result.completions[0].constraint_outcome is ConstraintOutcome.RELAXED_VIOLATED


async def test_every_sequence_has_its_outcome(face, server):
    server.script.generate = saying(*"12345", outcomes=OUTCOMES)
    completions = (await result_of(face, server, schema={}, n=5)).completions
    assert [each.constraint_outcome for each in completions] == list(ConstraintOutcome)
    assert [each.parsed for each in completions if each.index != 1] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match="cut off"):
        assert completions[1].parsed


async def test_without_a_constraint_the_value_is_the_text(face, server):
    server.script.generate = saying("{}", outcomes=())
    result = await result_of(face, server)
    assert result.completions[0].constraint_outcome is None
    assert (result.parsed, result.unenforced) == ("{}", ())


async def test_what_was_not_enforced_is_told(face, server):
    unenforced = [pb.UnenforcedKeyword(pointer="/a", keyword="not", why="cannot be enforced")]
    server.script.generate = saying("{}", outcomes=[pb.CONSTRAINT_OUTCOME_RELAXED_OK], unenforced=unenforced)
    result = await result_of(face, server, schema={}, relaxed=True)
    assert result.unenforced == (UnenforcedKeyword("/a", "not", "cannot be enforced"),)


async def test_a_constraint_can_be_checked_alone(face, server):
    server.script.unary = lambda _request, _context: model_pb2.CheckConstraintResponse(enforced=True, keyword_count=3)
    client = face.connect(server.target)
    assert (await face.call(client.check_constraint, schema=City, model="tiny")).keyword_count == 3
    schema = json.dumps(City.model_json_schema())
    assert server.script.requests == [
        model_pb2.CheckConstraintRequest(model="tiny", constraint=pb.Constraint(json_schema=schema))
    ]
    with pytest.raises(TypeError, match="one of schema, json_object, regex, grammar, choices is required"):
        await face.call(client.check_constraint)
    assert "relaxed" in CheckOptions.__optional_keys__


def test_the_clients_page_shows_what_works(served):
    page = (Path(__file__).parents[2] / "clients/python/README.md").read_text()
    block = page.partition("## Structured output")[2].partition("```python\n")[2].partition("```")[0]
    with Client(served.address) as client:
        variables = {"client": client, "__name__": "page"}
        exec(block, variables)
    assert isinstance(variables["term"], variables["Term"])
    assert variables["answer"] in ("yes", "no")
    assert 1900 <= int(variables["year"]) < 2100
