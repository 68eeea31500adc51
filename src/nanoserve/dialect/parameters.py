"""The parameters of a tool one by one, for formats that write each of them on its own.

Grammar and parser have to agree on which values are texts as they are, so both ask here.
"""

import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanoserve.dialect.tools import Tool

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
# Of references and of schemas within each other, before anything is thought possible.
_MAX_DEPTH = 16
# What says nothing about which values are allowed.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$defs"}
)
# Of the arguments as a whole: what holds if each parameter is written by its own schema, and no other.
_OF_OBJECTS = frozenset(
    {"type", "properties", "required", "additionalProperties", "definitions", "$schema", "$id", "$ref", "strict"}
)
_OF_TEXTS = frozenset({"type", "enum", "const", "minLength", "maxLength", "$ref"})
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# What can stand between tags, or before "=".
_TAG = re.compile(r'[^<>"\s](?:[^<>"\n]*[^<>"\s])?')
_KEYWORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Parameter:
    """One of them."""

    name: str
    # Of its value, with the definitions that it refers to.
    schema: Mapping[str, Any]
    is_required: bool

    @property
    def text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema, ensure_ascii=False)

    @property
    def pointer(self) -> str:
        """JSON pointer to the schema, in that of the tool."""
        return "/properties/" + self.name.replace("~", "~0").replace("/", "~1")

    @property
    def is_tag(self) -> bool:
        """Its name can be written between tags."""
        return _TAG.fullmatch(self.name) is not None

    @property
    def is_keyword(self) -> bool:
        """Its name can be written before "="."""
        return _KEYWORD.fullmatch(self.name) is not None

    # -------------------------------------------------------------------------------------------------- values

    @cached_property
    def types(self) -> frozenset[str]:
        """Of JSON, that its value may have as far as one can tell."""
        return _types(self.schema, self.schema)

    @property
    def is_text(self) -> bool:
        """Its value is a text, whatever it looks like."""
        return self.types == {"string"}

    @property
    def is_container(self) -> bool:
        """Its value is an object or an array, and cannot be a text."""
        return bool(self.types) and self.types <= {"object", "array"}

    @property
    def is_truth(self) -> bool:
        return self.types == {"boolean"} and _is_bare(self.schema, self.schema)

    @property
    def allows_any_text(self) -> bool:
        """Any text will do, also one that is taken for a value of another type that it allows."""
        return "string" in self.types and _is_bare(self.schema, self.schema)

    def allows(self, text: str) -> bool:
        """Whether a value of JSON is of one of its types."""
        return not self.types.isdisjoint(_types_of_value(json.loads(text)))

    # --------------------------------------------------------------------------------------------------- texts

    @cached_property
    def texts(self) -> list[str] | None:
        """Of a text, all that are allowed. None = any."""
        schema = self._resolved
        if not self.is_text or not ("const" in schema or "enum" in schema):
            return None
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return [each for each in values if isinstance(each, str)]

    def texts_without(self, marker: str) -> list[str]:
        """Of `texts`, those that can stand before a marker."""
        return [each for each in self.texts or [] if each and marker not in each]

    @property
    def lengths(self) -> tuple[int, int | None] | None:
        """Of a text: the least and the greatest number of characters, where that is limited."""
        least, most = self._resolved.get("minLength", 0), self._resolved.get("maxLength")
        return None if not self.is_text or (least == 0 and most is None) else (least, most)

    @property
    def ignored_keywords(self) -> list[str]:
        """Of a text that is written as it is: what cannot be enforced."""
        return sorted(self._resolved.keys() - _ANNOTATIONS - _OF_TEXTS) if self.is_text and self.texts is None else []

    @property
    def _resolved(self) -> Mapping[str, Any]:
        return _resolved(self.schema, self.schema)


def parameters(tool: Tool) -> list[Parameter]:
    """In the order of the schema."""
    root = tool.parameters or {}
    schema = _resolved(root, root)
    properties = schema.get("properties")
    properties = dict(properties) if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    for name in required:
        properties.setdefault(name, {})
    return [
        Parameter(name, _alone(each, root), name in required) for name, each in properties.items() if each is not False
    ]


def ignored_keywords(tool: Tool) -> list[str]:
    """Of the arguments as a whole: what cannot be enforced where each parameter is written on its own."""
    root = tool.parameters or {}
    return sorted(_resolved(root, root).keys() - _ANNOTATIONS - _OF_OBJECTS)


def schema_of(tool: Tool) -> str:
    """JSON Schema of all arguments, as text; it allows nothing but objects."""
    schema = _NO_PARAMETERS if tool.parameters is None else tool.parameters
    return json.dumps({**schema, "type": "object"}, ensure_ascii=False)


def loosened(tool: Tool) -> Tool:
    """The same tool, with any arguments; those that are texts as they are stay so."""
    if tool.parameters is None:
        return tool
    properties = {each.name: {"type": "string"} if each.is_text else {} for each in parameters(tool)}
    return Tool(tool.name, {"type": "object", "properties": properties})


# --------------------------------------------------------------------------------------------------------- schemas


def _alone(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A subschema, with all that it may refer to."""
    if not isinstance(schema, Mapping):
        return {}
    if "$ref" not in json.dumps(schema):
        return schema
    return {**_moved(schema), "$defs": {"_": _moved(root)}}


def _moved(value: Any) -> Any:
    """The same, in which local references start at the place of the whole schema in one for a part of it."""
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    moved = {name: _moved(each) for name, each in value.items()}
    if isinstance(ref := moved.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = "#/$defs/_" + ref[1:]
    return moved


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema refers to."""
    for _ in range(_MAX_DEPTH):
        ref = schema.get("$ref")
        if not isinstance(ref, str) or not ref.startswith("#"):
            break
        target: Any = root
        for step in urllib.parse.unquote(ref[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            break
        schema = target
    return schema


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Of the values that a schema allows; of more, where that cannot be told."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return TYPES
    schema = _resolved(schema, root)
    found = TYPES
    match schema.get("type"):
        case str(name):
            found = frozenset({name})
        case list(names):
            found = frozenset(name for name in names if isinstance(name, str))
    if "const" in schema:
        found &= _types_of_value(schema["const"])
    if isinstance(values := schema.get("enum"), list):
        found &= frozenset[str]().union(*map(_types_of_value, values))
    for keyword in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(keyword), list):
            found &= frozenset[str]().union(*(_types(each, root, depth + 1) for each in branches))
    if isinstance(parts := schema.get("allOf"), list):
        found = found.intersection(*(_types(each, root, depth + 1) for each in parts))
    return found


def _types_of_value(value: Any) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def _is_bare(schema: Any, root: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether it says nothing but which types are allowed."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return False
    schema = _resolved(schema, root)
    branches = [each for keyword in ("anyOf", "oneOf") for each in schema.get(keyword, [])]
    said = schema.keys() - _ANNOTATIONS
    # With oneOf, a value may be of no more than one branch.
    return said <= {"type", "anyOf"} and all(_is_bare(each, root, depth + 1) for each in branches)
