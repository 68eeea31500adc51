"""JSON schemas: each keyword is enforced, an annotation, or refused by name."""

import json

import pytest

from nanoserve.constraint import compiler
from nanoserve.constraint.outcome import Outcome, outcome_of
from nanoserve.constraint.schema import ANNOTATIONS, MAX_ENTRIES, MAX_NESTING
from nanoserve.errors import ConstraintInvalid
from nanoserve.request import Constraint, ConstraintKind, Treatment

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def treatments(compiled):
    return {(use.pointer, use.keyword): use.treatment for use in compiled.report.keywords}


@pytest.mark.parametrize("text", ['{"name":"Ann","age":3}', '{ "name" : "Ann",\n  "age": 3 }', '{"name":"Ann"}'])
def test_what_a_schema_allows_is_accepted_compact_or_with_white_space(compile_schema, accepts, text):
    assert accepts(compile_schema(PERSON), text)


@pytest.mark.parametrize("text", ['{"name":""}', '{"age":3}', '{"name":"Ann","age":-1}', '{"name":"Ann","x":1}', "[]"])
def test_what_it_does_not_allow_is_not(compile_schema, accepts, text):
    assert not accepts(compile_schema(PERSON), text)


@pytest.mark.parametrize(("spaces", "is_allowed"), [(16, True), (17, False)])
def test_white_space_has_an_end(compile_schema, accepts, spaces, is_allowed):
    assert accepts(compile_schema(PERSON), "{" + " " * spaces + '"name":"Ann"}') is is_allowed


def test_a_pattern_does_not_count_far_beside_a_long_length(compile_schema, refused):
    """The masks of such a string would take a third of a second each."""
    words = r"^(?:\S+\s+){0,99}\S+$"
    assert refused({"properties": {"a": {"pattern": words, "maxLength": 5000}}}) == [("/properties/a", "pattern")]
    for allowed in ({"pattern": words}, {"pattern": words, "maxLength": 500}, {"pattern": "^a+$", "maxLength": 5000}):
        compile_schema(allowed)


def test_every_keyword_is_reported_with_its_place(compile_schema):
    schema = {**PERSON, "title": "A person", "$defs": {"unused": {"not": {}}}}
    found = treatments(compile_schema(schema))
    assert found == {
        **{("", keyword): Treatment.ENFORCED for keyword in PERSON},
        ("", "title"): Treatment.ANNOTATION,
        ("", "$defs"): Treatment.ANNOTATION,
        ("/properties/name", "type"): Treatment.ENFORCED,
        ("/properties/name", "minLength"): Treatment.ENFORCED,
        ("/properties/age", "type"): Treatment.ENFORCED,
        ("/properties/age", "minimum"): Treatment.ENFORCED,
    }


@pytest.mark.parametrize(
    "keyword",
    [
        *("not", "if", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames", "contains"),
        *("uniqueItems", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveAnchor"),
        *("foo", "additonalProperties", "anyof", "nullable", "x-guidance"),
    ],
)
def test_a_keyword_that_cannot_be_enforced_or_is_unknown_is_refused_by_name(refused, keyword):
    value = {"if": {"type": "string"}, "contains": {}, "$dynamicRef": "#a"}.get(keyword, {"a": False})
    schema = {"properties": {"a/b": {"items": {keyword: value, "then": {}}}}}
    assert ("/properties/a~1b/items", keyword) in refused(schema)


def test_all_refused_keywords_are_told_at_once(refused):
    schema = {"properties": {"a": {"not": {}}, "b": {"type": "array", "uniqueItems": True}}}
    assert refused(schema) == [("/properties/a", "not"), ("/properties/b", "uniqueItems")]


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": False},
        {"unevaluatedProperties": True},
        {"propertyNames": {}},
        {"dependencies": {}},
        {"then": {"type": "string"}},
        {"maxContains": 3},
        {"not": False},
    ],
)
def test_a_keyword_that_says_nothing_as_it_stands_is_no_hindrance(compile_schema, accepts, schema):
    assert accepts(compile_schema(schema), "[1,1]")


def test_annotations_are_taken(compile_schema, accepts):
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://x.y/z", "$anchor": "a"}
    schema = {name: values.get(name, {}) for name in ANNOTATIONS - {"id", "$vocabulary"}}
    compiled = compile_schema({**schema, "x-own": 1, "_off": 2, "type": "null"})
    assert accepts(compiled, "null")
    assert [use.keyword for use in compiled.report.keywords if use.treatment is Treatment.ENFORCED] == ["type"]


@pytest.mark.parametrize("name", ["unknown", "idn-email", "regex", "foo", "binary"])
def test_a_format_that_is_not_checked_is_refused(refused, name):
    assert refused({"items": {"format": name}}) == [("/items", "format")]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", '"2024-02-29"', '"2024-02-30"'),
        ("date-time", '"2024-02-29T10:00:00Z"', '"2024-02-29"'),
        ("time", '"10:00:00Z"', '"25:00:00Z"'),
        ("duration", '"P1DT2H"', '"1 day"'),
        ("email", '"a@example.com"', '"a.example.com"'),
        ("hostname", '"example.com"', '"exa mple"'),
        ("ipv4", '"10.0.0.1"', '"10.0.0.256"'),
        ("ipv6", '"::1"', '":::1"'),
        ("uri", '"https://example.com/a"', '"//"'),
        ("uuid", '"123e4567-e89b-12d3-a456-426614174000"', '"123e4567"'),
    ],
)
def test_formats_are_enforced(compile_schema, accepts, name, good, bad):
    compiled = compile_schema({"type": "string", "format": name})
    assert accepts(compiled, good)
    assert not accepts(compiled, bad)


def test_formats_of_numbers_are_ranges(compile_schema, accepts):
    compiled = compile_schema({"type": "integer", "format": "int32", "minimum": -5})
    assert [accepts(compiled, text) for text in ("2147483647", "2147483648", "-5", "-6")] == [True, False, True, False]


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (
            {"properties": {"a": {"properties": {"b": {"pattern": "(?=a)b"}}}}},
            ("/properties/a/properties/b", "pattern"),
        ),
        ({"properties": {"a": {"pattern": "["}}}, ("/properties/a", "pattern")),
        ({"properties": {"a": {"$ref": "https://example.com/s"}}}, ("/properties/a", "$ref")),
        ({"items": {"$ref": "other.json#/a"}}, ("/items", "$ref")),
        ({"items": {"$ref": "#/nowhere"}}, ("/items", "$ref")),
        ({"items": {"$ref": "#nowhere"}}, ("/items", "$ref")),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ("", "allOf")),
        ({"type": "array", "minItems": 3, "maxItems": 1}, ("", "minItems")),
        ({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, ("", "required")),
        ({"type": "strng"}, ("", "type")),
        ({"items": {"minLength": "a"}}, ("/items", "minLength")),
        ({"items": {"oneOf": [{"type": "string"}, {"minLength": 1}]}}, ("/items", "oneOf")),
        (
            {"$defs": {"n": {"oneOf": [{}, {"items": {"$ref": "#/$defs/n"}}]}}, "$ref": "#/$defs/n"},
            ("/$defs/n", "oneOf"),
        ),
        ({"patternProperties": {"a": {"type": "null"}, "^ab": {}}}, ("", "patternProperties")),
        ({"minProperties": 1, "properties": {"a": {}}}, ("", "minProperties")),
        ({"multipleOf": 1_000_003}, ("", "multipleOf")),
        ({"multipleOf": 60_000, "items": {"multipleOf": 60.001}}, ("/items", "multipleOf")),
        ({"allOf": [{"pattern": f"[a-z]*{i}.*"} for i in range(60)]}, ("", "allOf")),
        ({"items": {"enum": ["\x01"]}}, ("/items", "enum")),
        ({"properties": {"a": {"properties": {"b": 3}}}}, ("/properties/a/properties/b", "")),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, "x"]}}}, ("/properties/a/anyOf/1", "")),
        ({"additionalProperties": {"items": None}}, ("/additionalProperties/items", "")),
    ],
)
def test_what_only_the_compiler_sees_is_told_with_its_place(refused, schema, place):
    assert refused(schema) == [place]


BEYOND_DOUBLE = ["9" * 309, "9" * 5000, f"-{'9' * 309}", "1e309", "-1e999"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "false", '{"const": NaN}', '{"const": "\\ud800"}'),
        *(f'{{"minimum": {number}}}' for number in BEYOND_DOUBLE),
        *(f'{{"properties": {{"a": {{"default": [{number}]}}}}}}' for number in BEYOND_DOUBLE),
    ],
)
def test_what_is_no_schema_is_refused(refused, text):
    assert refused(text) == [("", "")]


def test_true_allows_any_value(compile_schema, accepts):
    assert accepts(compile_schema("true"), '[1,{"a":null}]')


def test_the_largest_numbers_are_served(compile_schema, accepts):
    assert accepts(compile_schema(f'{{"enum": [{10**308}], "default": -1.7e308}}'), str(10**308))


# A list that has no last element, in several ways.
ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"]}
NO_END = [
    (ENDLESS, "required"),
    ({"type": "object", "required": ["next"], "additionalProperties": {"$ref": "#/$defs/list"}}, "required"),
    ({"type": "array", "items": {"$ref": "#/$defs/list"}, "minItems": 1}, "minItems"),
    ({"type": "array", "prefixItems": [{}, {"$ref": "#/$defs/list"}], "minItems": 2}, "minItems"),
    ({"type": "array", "items": [{}], "additionalItems": {"$ref": "#/$defs/list"}, "minItems": 2}, "minItems"),
    ({"anyOf": [ENDLESS, {"$ref": "#/$defs/list"}]}, "anyOf"),
    ({"oneOf": [ENDLESS]}, "oneOf"),
    ({"allOf": [{"type": "object"}, {**ENDLESS, "type": ["object", "null"]}]}, "allOf"),
    ({"$ref": "#/$defs/list"}, "$ref"),
]


@pytest.mark.parametrize("is_relaxed", [False, True])
@pytest.mark.parametrize(("definition", "keyword"), NO_END)
def test_recursion_without_end_is_refused(refused, definition, keyword, is_relaxed):
    """Nobody gets an output that is cut off in any case."""
    schema = {**definition, "$defs": {"list": definition}}
    assert refused(schema, is_relaxed=is_relaxed) == [("", keyword)]


@pytest.mark.parametrize("definition", [definition for definition, _ in NO_END])
def test_where_it_would_have_no_end_nothing_is_allowed(compile_schema, accepts, may_begin, definition):
    definitions = {"$defs": {"list": definition}}
    a_list = {"$ref": "#/$defs/list"}
    schema = {"type": "object", "properties": {"a": a_list, "b": {}}, "additionalProperties": False, **definitions}
    compiled = compile_schema(schema)
    assert accepts(compiled, '{"b":1}')
    assert not may_begin(compiled, '{"a"')
    compiled = compile_schema({"anyOf": [a_list, {"type": "null"}], **definitions})
    assert accepts(compiled, "null")
    assert not may_begin(compiled, "{")
    compiled = compile_schema({"type": "array", "items": a_list, **definitions})
    assert accepts(compiled, "[]")
    assert not may_begin(compiled, "[{")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, '{"a":{"a":{}}}'),
        ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, '{"a":{"a":null}}'),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, '{"a":{"a":1}}'),
        ({"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, "[[],[[]]]"),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 1}, "[1,[2]]"),
        ({"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"const": 1}]}, "[[1],1]"),
    ],
)
def test_recursion_with_an_end_is_served(compile_schema, accepts, schema, text):
    assert accepts(compile_schema(schema), text)


def test_definitions_may_lie_anywhere(compile_schema, accepts, refused):
    schema = {"$ref": "#/components/schemas/A", "components": {"schemas": {"A": {"type": "null"}}}}
    assert accepts(compile_schema(schema), "null")
    assert not accepts(compile_schema(schema), "1")
    schema["components"]["schemas"]["A"]["foo"] = 1
    assert refused(schema) == [("/components/schemas/A", "foo")]


def test_a_reference_by_name_is_followed(compile_schema, accepts, refused):
    schema = {"$ref": "#a", "$defs": {"x": {"$anchor": "a", "type": "null"}}}
    assert not accepts(compile_schema(schema), "1")
    schema["$defs"]["x"]["foo"] = 1
    assert refused(schema) == [("/$defs/x", "foo")]


# ----------------------------------------------------------------------- where a grammar could be deceived


def test_a_key_is_not_given_twice_by_another_spelling(compile_schema, accepts):
    compiled = compile_schema({"type": "object", "properties": {"a": {"type": "string"}}})
    assert accepts(compiled, '{"a":"x","b":1}')
    assert not accepts(compiled, '{"\\u0061":1}')
    assert not accepts(compiled, '{"a":"x","a":1}')


def test_keys_that_are_the_same_do_not_count_twice(compile_schema, refused):
    """Of further keys the grammar cannot tell whether they are the same."""
    assert refused({"type": "object", "minProperties": 2}) == [("", "minProperties")]
    assert compile_schema({"type": "object", "minProperties": 2, "required": ["a"], "properties": {"a": {}}})


def test_patterns_are_those_of_json_schema(compile_schema, accepts):
    """Not anchored, and \\d is ASCII."""
    assert accepts(compile_schema({"type": "string", "pattern": "b"}), '"abc"')
    assert not accepts(compile_schema({"type": "string", "pattern": "^\\d$"}), '"\u0664"')


def test_keywords_beside_a_reference_count(compile_schema, accepts):
    schema = {"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string", "minLength": 2}}}
    assert [accepts(compile_schema(schema), f'"{text}"') for text in ("a", "ab", "abc")] == [False, True, False]


def test_a_keyword_without_a_type_leaves_other_types_free(compile_schema, accepts):
    compiled = compile_schema({"minLength": 2})
    assert [accepts(compiled, text) for text in ('"a"', '"ab"', "1", "[]")] == [False, True, True, True]


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"oneOf": [{"const": i} for i in range(10_000)]}, ("", "oneOf")),
        ({"properties": {f"a{i}": {} for i in range(MAX_ENTRIES["properties"] + 1)}}, ("", "properties")),
    ],
)
def test_a_keyword_with_too_many_entries_is_refused(refused, schema, place):
    assert refused(schema) == [place]


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 50_000])
def test_a_schema_that_is_too_deep_is_refused(refused, depth):
    assert refused('{"items":' * depth + "{}" + "}" * depth) == [("", "")]


def test_the_deepest_schema_is_served(compile_schema, accepts):
    depth = MAX_NESTING - 1
    assert accepts(compile_schema('{"items":' * depth + "{}" + "}" * depth), "[[]]")


def test_a_schema_of_five_megabytes_is_refused_by_its_length(compile_schema):
    with pytest.raises(ConstraintInvalid, match="has 5000012 bytes; at most 262144 are allowed"):
        compile_schema('{"title": "' + "a" * 4_999_999 + '"}')


def chain(link, length):
    """Definitions of which each refers to the next."""
    definitions = {f"{i}": link({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)} | {f"{length}": {}}
    return json.dumps({"$defs": definitions, "$ref": "#/$defs/0"}, separators=(",", ":"))


def test_a_long_chain_of_definitions_does_not_end_the_process(compile_schema, accepts, refused):
    """The compiler recurses along it."""
    assert accepts(compile_schema(chain(lambda ref: {"items": ref}, 5000)), "[[1]]")
    assert refused(chain(lambda ref: {"allOf": [ref, {"minLength": 1}]}, 4000)) == [("", "")]


# --------------------------------------------------------------------------------------------- relaxed


def test_a_relaxed_schema_lists_what_is_not_enforced(compile_schema, accepts):
    schema = {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "code": {"type": "string", "pattern": "(?!b)[a-z]"},
            "either": {"oneOf": [{"type": "string"}, {"minLength": 3}]},
            "clear": {"oneOf": [{"type": "string"}, {"type": "null"}]},
        },
        "foo": 1,
    }
    compiled = compile_schema(schema, is_relaxed=True)
    relaxed = {place for place, treatment in treatments(compiled).items() if treatment is Treatment.RELAXED}
    assert relaxed == {
        ("/properties/tags", "uniqueItems"),
        ("/properties/code", "pattern"),
        ("/properties/either", "oneOf"),
        ("", "foo"),
    }
    assert all(bool(use.why) == (use.treatment is Treatment.RELAXED) for use in compiled.report.keywords)
    assert not accepts(compiled, '{"tags":[1]}')


@pytest.mark.parametrize(
    ("text", "outcome"),
    [('{"tags":["a","b"]}', Outcome.RELAXED_OK), ('{"tags":["a","a"]}', Outcome.RELAXED_VIOLATED)],
)
def test_what_was_relaxed_is_validated_at_the_end(compile_schema, accepts, text, outcome):
    schema = {"properties": {"tags": {"uniqueItems": True}}}
    compiled = compile_schema(schema, is_relaxed=True)
    assert accepts(compiled, text)
    assert compiled.report.relaxed
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), is_relaxed=True)
    assert outcome_of(constraint, text, satisfies=True, is_relaxed=True) is outcome
    assert outcome_of(constraint, text[:-1], satisfies=False, is_relaxed=True) is Outcome.TRUNCATED


def test_a_schema_that_is_enforced_whole_is_satisfied_by_what_its_grammar_allows(compile_schema):
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON))
    for is_relaxed in (False, True):
        assert not compile_schema(PERSON, is_relaxed=is_relaxed).report.relaxed
    assert outcome_of(constraint, '{"name":"Ann"}', satisfies=True, is_relaxed=False) is Outcome.SATISFIED
    assert outcome_of(constraint, '{"name', satisfies=False, is_relaxed=False) is Outcome.TRUNCATED


def test_a_relaxed_schema_forbids_no_more_than_the_whole_one(compile_schema, accepts):
    """additionalProperties speaks of what patternProperties does not name, and goes with it."""
    schema = {"type": "object", "patternProperties": {"(?=a)": {}}, "additionalProperties": False}
    assert accepts(compile_schema(schema, is_relaxed=True), '{"a":1}')


def test_a_contradiction_is_refused_although_relaxed(refused):
    assert refused({"allOf": [{"type": "string"}, {"type": "integer"}]}, is_relaxed=True) == [("", "allOf")]


def test_a_hostname_has_an_end(compile_schema, accepts):
    label = "a" * 49
    for schema in ({"format": "hostname"}, {"format": "hostname", "maxLength": 300}):
        compiled = compile_schema({"type": "string", **schema})
        assert accepts(compiled, json.dumps(".".join([label] * 5)))
        assert not accepts(compiled, json.dumps(".".join([label] * 6)))
    assert not accepts(compile_schema({"format": "hostname", "maxLength": 9}), '"abc.defghij"')


@pytest.mark.parametrize("is_relaxed", [False, True])
def test_what_would_have_to_be_fetched_is_refused_by_name(refused, is_relaxed):
    schema = {"properties": {"a": {"$ref": "https://example.com/schemas/address"}}}
    assert refused(schema, is_relaxed=is_relaxed) == [("/properties/a", "$ref")]


def test_a_grammar_that_is_too_large_is_refused_in_plain_words(compile_schema, monkeypatch):
    """Of the compiler's own asserts a caller reads nothing."""
    monkeypatch.setattr(compiler, "COMPILE_CPU_S", 100.0)
    inner = {"type": "object", "properties": {f"p{i}": {} for i in range(1900)}}
    schema = {"properties": {f"q{j}": inner for j in range(11)}}
    with pytest.raises(ConstraintInvalid, match="takes a grammar that is too large; make it simpler"):
        compile_schema(schema)
