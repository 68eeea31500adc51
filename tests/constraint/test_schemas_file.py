"""The set of schemas that the project ships, and the page that says what is enforced."""

import importlib.util
import re
import sys
from pathlib import Path

import jsonschema_rs
import pytest

from nanoserve.config import BUILTIN_MODEL
from nanoserve.constraint.schema import ANNOTATIONS, ENFORCED, UNSUPPORTED

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "schemas.md"
# Of draft 2020-12: core, applicators, validation, and what says nothing.
STANDARD = {
    *("$schema", "$id", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "$comment", "$defs"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "prefixItems", "items", "contains"),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedItems"),
    *("unevaluatedProperties", "type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum"),
    *("exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxContains"),
    *("minContains", "maxProperties", "minProperties", "required", "dependentRequired", "format"),
    *("title", "description", "default", "deprecated", "readOnly", "writeOnly", "examples"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


schemas = load(ROOT / "benchmarks" / "schemas.py")
CASES = list(schemas.read_cases(schemas.SHIPPED))


@pytest.fixture(scope="module")
def walker():
    return schemas.Walker(BUILTIN_MODEL)


def test_the_set_is_large_and_has_every_keyword_of_the_standard():
    def keys(value):
        if isinstance(value, dict):
            yield from value
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(child)

    assert len(CASES) >= 150
    assert len({case["name"] for case in CASES}) == len(CASES)
    used = {key for case in CASES for key in keys(case["schema"])}
    assert STANDARD - used == {"$vocabulary", "contentSchema", "$id"}


def test_its_instances_are_labelled_right():
    for case in CASES:
        if "another document" not in case["name"]:
            validator = jsonschema_rs.validator_for(case["schema"], validate_formats=True)
            assert [validator.is_valid(test["data"]) for test in case["tests"]] == [t["valid"] for t in case["tests"]]


def test_nothing_invalid_is_generated_and_all_that_is_valid_can_be(walker):
    report = schemas.Report()
    for case in CASES:
        schemas.measure(case, walker, report, is_relaxed=False)
    assert report.invalid_accepted == []
    assert report.valid_refused == []
    assert (report.num_schemas, report.num_enforced, report.num_relaxed) == (len(CASES), 162, 0)
    # Each refusal names a keyword.
    assert set(report.refused) <= ENFORCED | UNSUPPORTED | {schemas.UNKNOWN}


def test_what_is_relaxed_is_found_out_at_the_end(walker):
    report = schemas.Report()
    for case in CASES:
        schemas.measure(case, walker, report, is_relaxed=True)
    assert report.invalid_accepted == []
    assert report.valid_refused == []
    assert report.num_relaxed >= 20
    # A contradiction, and a reference to another document.
    assert report.refused.total() == 2


def test_the_report_is_written(walker):
    report = schemas.Report()
    schemas.measure(CASES[0], walker, report, is_relaxed=False)
    schemas.measure({"name": "x", "schema": {"foo": 1}, "tests": []}, walker, report, is_relaxed=False)
    text = schemas.written(report, 5)
    assert "2, of which 1 compile (50.0 %): 1 enforced whole, 0 relaxed" in text
    assert re.search(r"^\(unknown keywords\) +1$", text, re.MULTILINE)
    assert re.search(r"^mask of a token +[\d,]+ ", text, re.MULTILINE)


def test_an_invalid_instance_that_is_accepted_is_told(walker):
    report = schemas.Report()
    case = {"name": "wrong label", "schema": {"type": "integer"}, "tests": [{"valid": False, "data": 1}]}
    schemas.measure(case, walker, report, is_relaxed=False)
    assert report.invalid_accepted == ["wrong label"]


def test_each_keyword_of_the_standard_is_decided():
    assert STANDARD <= ENFORCED | UNSUPPORTED | ANNOTATIONS
    assert not ENFORCED & UNSUPPORTED
    assert not ANNOTATIONS & (ENFORCED | UNSUPPORTED)


def test_the_page_says_what_the_code_does():
    rows = dict(re.findall(r"^\| `([^`]+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() >= ENFORCED | UNSUPPORTED
    for keyword, treatment in rows.items():
        assert (treatment == "enforced") == (keyword in ENFORCED or keyword == "true, false")
        assert (treatment == "annotation") == (keyword in ANNOTATIONS)
    listed = PAGE.read_text().split("## Annotations")[1]
    assert set(re.findall(r"`([^`]+)`", listed)) == ANNOTATIONS


def test_the_page_counts_no_invalid_instance_that_is_accepted():
    counts = re.findall(r" (\d+) of \d+ \| \d+ of \d+ \| \d+ \|$", PAGE.read_text(), re.MULTILINE)
    assert len(counts) > 40
    assert set(counts) == {"0"}


def test_the_page_can_be_made_again(tmp_path, monkeypatch):
    tool = load(ROOT / "tools" / "generate_schema_table.py")
    tests = tmp_path / "suite" / "tests" / "draft2020-12"
    tests.mkdir(parents=True)
    group = '[{"schema": {"maximum": 3}, "tests": [{"data": 3, "valid": true}, {"data": 4, "valid": false}]}]'
    (tests / "maximum.json").write_text(group)
    (tests / "not.json").write_text(group.replace('"maximum": 3', '"not": {"exclusiveMinimum": 3}'))
    page = tmp_path / "schemas.md"
    monkeypatch.setattr(sys, "argv", ["generate_schema_table.py", str(tmp_path / "suite"), "--page", str(page)])
    tool.main()
    assert "| `maximum` | enforced | 1 | 1 | 1 | 0 of 1 | 0 of 1 | 0 |" in page.read_text()
    assert "| `not` | refused | 1 | 0 | 1 | 0 of 0 | 0 of 0 | 0 |" in page.read_text()
    made, committed = (each.read_text().split("| `")[0] for each in (page, PAGE))
    assert made == committed
