"""Which keywords a JSON Schema has, and whether the grammar can enforce each.

llguidance ignores a keyword that it does not know, and knows some that it cannot enforce everywhere. So the schema is
walked before it is compiled: a keyword is enforced, or an annotation, which says nothing of the value, or unsupported.
The compiler refuses more, such as patterns that look ahead, without saying where; `Schema.locate` finds the place.

Places are JSON pointers (RFC 6901). The semantics are those of draft 2020-12, with what older drafts call otherwise.
"""

import json
import math
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from nanoserve.constraint.subschemas import Node, SchemaError, children, endless, resolve, walk, with_refs_below
from nanoserve.request import KeywordUse, Treatment

# Levels of JSON. llguidance reads 128, and the schema is put into another one to find a place in it.
MAX_NESTING = 100
# Entries of one keyword. Compiling takes time by the square of these.
MAX_ENTRIES = {"oneOf": 1000, "anyOf": 1000, "allOf": 100, "properties": 2000, "patternProperties": 100}
MAX_ENTRIES |= {"prefixItems": 2000, "items": 2000, "enum": 20_000}
# The digits of a multipleOf, as an integer, and of all together: their automata have so many states.
MAX_MULTIPLE = 100_000
# How far a pattern counts, times the maxLength beside it: holding to both takes so many states, and long for masks.
MAX_COUNTS = 100_000
# Patterns that one string must match all: what they have in common takes time that grows without measure.
MAX_PATTERNS = 12
# Subschemas that are looked at to count them.
_MAX_APPLIED = 200
# As in a{2,5}.
_COUNTED = re.compile(r"\{(\d{1,9}),?(\d{0,9})\}")
# Of an integer, with its sign: the largest double has 309.
_MAX_DIGITS = 310
# Time for finding out where the compiler saw an error.
MAX_LOCATE_S = 1.0

# ----------------------------------------------------------------------------------------------- what is known


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The grammar holds to these.
ENFORCED = _names(
    "type enum const allOf anyOf oneOf $ref properties patternProperties additionalProperties required minProperties "
    "maxProperties prefixItems items additionalItems minItems maxItems minLength maxLength pattern format minimum "
    "maximum exclusiveMinimum exclusiveMaximum multipleOf"
)
# The standard has these besides, and they say something of the value.
UNSUPPORTED = _names(
    "not if then else dependentSchemas dependentRequired dependencies propertyNames contains minContains maxContains "
    "uniqueItems unevaluatedProperties unevaluatedItems $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor"
)
# Formats that the grammar holds to.
FORMATS = _names("date-time time date duration email hostname ipv4 ipv6 uri uuid")
# What the grammars of formats leave open: characters of the whole.
_MAX_LENGTHS = {"hostname": 253}
# OpenAPI's, of numbers: the range that each stands for. None = any number.
_NUMBER_FORMATS: dict[str, tuple[int, int] | None] = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    # Integers that every JSON parser reads right (RFC 8259, section 6): a part of what the format allows.
    "int64": (1 - 2**53, 2**53 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "float": None,
    "double": None,
}
# What says nothing of the value: in the standard; in OpenAPI, hyper-schema and registries; for editors, forms and
# generators of code and of samples.
ANNOTATIONS = _names(
    "$schema $id id $anchor $vocabulary $comment $defs definitions title description "
    "default examples deprecated readOnly writeOnly contentMediaType contentEncoding contentSchema "
    "example externalDocs xml discriminator links base media self "
    "comment $note name version author license $license $default readonly hidden visible order propertyOrder "
    "preferredOrder options tags category label alias aliases stability enumNames enumDescriptions errorMessage "
    "markdownDescription markdownEnumDescriptions defaultSnippets deprecationMessage "
    "javaType javaName javaInterfaces extendsJavaClass tsType faker chance"
)
# By which a schema may want of each value that it holds another.
_LEADING_ON = ("$ref", "allOf", "anyOf", "oneOf", "required", "minItems")
# Names that begin so are nobody's but the author's. llguidance takes options from one of them.
_PRIVATE_PREFIXES = ("x-", "_")
_OPTIONS_OF_LLGUIDANCE = "x-guidance"

# What in a message of the compiler tells of which keyword it speaks, where the message does not name it.
_TELLTALES = (
    ("regex parse error", ("pattern",)),
    ("lookaround", ("pattern",)),
    ("patternProperty", ("patternProperties", "allOf")),
    ("min/maxProperties", ("minProperties", "maxProperties")),
    ("multiple of", ("multipleOf",)),
    ("circular references", ("$ref",)),
    ("Pointer", ("$ref",)),
    ("Anchor", ("$ref",)),
    ("Resource", ("$ref",)),
    ("incompatible types", ("allOf", "const", "enum", "anyOf", "oneOf", "$ref", "type")),
    ("range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("Regex is empty", ("allOf", "pattern", "format", "minLength", "maxLength", "enum", "const")),
)


class Schema:
    """A JSON Schema as it is prepared for the grammar. One thread."""

    def __init__(self, text: str) -> None:
        """Raises SchemaError if the text is not a schema."""
        self.root = _parse(text)
        self._nodes = list(walk(self.root))
        roots = self._ref_roots()
        self._uses = {(use.pointer, use.keyword): use for node in self._nodes for use in _judge(node, roots)}
        self._bound_work()
        self._close_off_endless()

    def _bound_work(self) -> None:
        """Refuse what would take the compiler for ever although each keyword alone would not."""
        digits = 0
        for node in self._nodes:
            value = node.schema.get("multipleOf")
            if isinstance(value, int | float) and not isinstance(value, bool):
                digits += _digits(value)
                if digits > MAX_MULTIPLE:
                    why = f"has too many digits; all of a schema together may be at most {MAX_MULTIPLE}"
                    self._refuse(node, "multipleOf", why)
            if _num_patterns(self.root, node) > MAX_PATTERNS:
                keyword = "allOf" if "allOf" in node.schema else "$ref"
                self._refuse(node, keyword, f"gives a string more than {MAX_PATTERNS} patterns to match at once")

    def _close_off_endless(self) -> None:
        """Allow nothing where nothing would have an end. Raises SchemaError if that is everywhere."""
        for node in endless(self.root, self._nodes):
            if node.pointer == "":
                keyword = next(name for name in _LEADING_ON if name in node.schema)
                raise SchemaError("leads on and on: no value that matches has an end", keyword=keyword)
            # Beside a reference in a circle the compiler takes nothing.
            node.schema.pop("$ref", None)
            node.schema["enum"] = []

    def _refuse(self, node: Node, keyword: str, why: str) -> None:
        self._uses[node.pointer, keyword] = KeywordUse(node.pointer, keyword, Treatment.REFUSED, why)

    @property
    def uses(self) -> list[KeywordUse]:
        """Every keyword, in the order in which the walk finds them."""
        return list(self._uses.values())

    @property
    def text(self) -> str:
        return json.dumps(self.root)

    def refused(self) -> list[KeywordUse]:
        """What stands in the way of a grammar."""
        return [use for use in self._uses.values() if use.treatment is Treatment.REFUSED]

    def relax(self) -> None:
        """Leave out what is refused. What the rest allows is a superset of what the schema did."""
        for use in self.refused():
            self.drop(use.pointer, use.keyword, use.why)

    def drop(self, pointer: str, keyword: str, why: str) -> None:
        """Leave a keyword out, and with it those that mean "whatever it does not name"."""
        schema = self.at(pointer)
        for name in (keyword, *_RESTS.get(keyword, ())):
            if name in schema:
                del schema[name]
                self._uses[pointer, name] = KeywordUse(pointer, name, Treatment.RELAXED, why)

    def note(self, pointer: str, keyword: str, why: str) -> None:
        """Remember that the grammar does not hold to a keyword, although it is not left out."""
        self._uses[pointer, keyword] = KeywordUse(pointer, keyword, Treatment.RELAXED, why)

    def at(self, pointer: str) -> dict[str, Any]:
        """The subschema at a place that the walk found."""
        found = resolve(self.root, pointer)
        assert isinstance(found, dict)
        return found

    def places_of(self, keyword: str) -> list[str]:
        """Where the keyword stands, innermost last."""
        return [node.pointer for node in self._nodes if keyword in node.schema]

    def locate(self, error: str, compile_alone: Callable[[str], str]) -> tuple[str, str]:
        """The pointer and the keyword of the innermost subschema that gives this error when it is compiled alone.

        compile_alone: compiles a schema; returns its error, empty if there is none. Looks for MAX_LOCATE_S at most.
        """
        error = _essence(error)
        deadline_s = time.monotonic() + MAX_LOCATE_S
        seen = {""}

        def innermost(node: Node, depth: int) -> Node | None:
            for child in children(self.root, node):
                if child.pointer in seen or depth == MAX_NESTING or time.monotonic() > deadline_s:
                    continue
                seen.add(child.pointer)
                is_wrong = _essence(compile_alone(self.alone(child.pointer))) == error
                if is_wrong and (found := innermost(child, depth + 1)) is not None:
                    return found
            # A definition that refers to itself leads back here, and the place is elsewhere.
            return node if _named_in(error, node.schema) else None

        place = innermost(Node("", self.root), 0) or Node("", self.root)
        return place.pointer, _keyword_of(error, place.schema)

    def alone(self, pointer: str) -> str:
        """The text of a schema that is the subschema at a place, with the definitions that it refers to."""
        moved = with_refs_below({name: self.root[name] for name in self.root if name not in ("$id", "id")}, "#/$defs/_")
        outer = {"$ref": f"#/$defs/_{urllib.parse.quote(pointer)}", "$defs": {"_": moved}}
        if "$schema" in self.root:
            outer["$schema"] = self.root["$schema"]
        return json.dumps(outer)

    def _ref_roots(self) -> set[str]:
        """Keywords of the root that hold definitions, as "components" does in OpenAPI."""
        refs = (node.schema.get("$ref") for node in self._nodes)
        return {ref.split("/")[1] for ref in refs if isinstance(ref, str) and ref.startswith("#/")}


# What means "whatever is not named there": without the one, the other would forbid too much.
_RESTS = {
    "properties": ("additionalProperties",),
    "patternProperties": ("additionalProperties",),
    "prefixItems": ("items",),
    "items": ("additionalItems",),
}


# ----------------------------------------------------------------------------------------------------- the text


def _parse(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_refuse_constant)
        json.dumps(schema, ensure_ascii=False).encode()
    except ValueError as error:
        raise SchemaError(f"is not JSON: {error}") from None
    except RecursionError:
        raise SchemaError(f"is nested too deeply; at most {MAX_NESTING} levels are allowed") from None
    if schema is True:
        schema = {}
    if schema is False:
        raise SchemaError("the schema false allows nothing")
    if not isinstance(schema, dict):
        raise SchemaError("must be a JSON object")
    if (depth := _nesting(schema)) > MAX_NESTING:
        raise SchemaError(f"is nested {depth} levels deep; at most {MAX_NESTING} are allowed")
    return schema


def _integer(text: str) -> int:
    # As many digits as any double has; more take the longer the more they are.
    if len(text) > _MAX_DIGITS or math.isinf(float(text)):
        raise SchemaError(f"has a number that is too large: {text[:20]}...")
    return int(text)


def _number(text: str) -> float:
    """2.0 is an integer in JSON Schema. Larger ones stay as they are: a float's digits would be told as exact."""
    value = float(text)
    if math.isinf(value):
        raise SchemaError(f"has a number that is too large: {text[:20]}")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _nesting(value: Any) -> int:
    """Levels of objects and arrays."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


# ------------------------------------------------------------------------------------------------- one keyword


def _judge(node: Node, ref_roots: set[str]) -> Iterator[KeywordUse]:
    """What to do with each keyword of a subschema. Takes those out that say nothing as they stand."""
    for keyword, value in list(node.schema.items()):
        why = ""
        if keyword == "format" and isinstance(value, str) and value in _NUMBER_FORMATS:
            treatment = Treatment.ENFORCED
            _put_range(value, node.schema)
        elif keyword == "format" and isinstance(value, str) and value in _MAX_LENGTHS:
            treatment = Treatment.ENFORCED
            given = node.schema.get("maxLength", _MAX_LENGTHS[value])
            node.schema["maxLength"] = min(given, _MAX_LENGTHS[value]) if isinstance(given, int | float) else given
        elif keyword in ENFORCED:
            why = _why_not(keyword, value, node.schema)
            treatment = Treatment.REFUSED if why else Treatment.ENFORCED
        elif _is_annotation(keyword) or (node.pointer == "" and keyword in ref_roots):
            treatment = Treatment.ANNOTATION
        elif _says_nothing(keyword, value, node.schema):
            treatment = Treatment.ENFORCED
            del node.schema[keyword]
        else:
            treatment = Treatment.REFUSED
            why = "cannot be enforced" if keyword in UNSUPPORTED else "is not a keyword that is known here"
        yield KeywordUse(node.pointer, keyword, treatment, why)


def _put_range(number_format: str, schema: dict[str, Any]) -> None:
    """Write a format of numbers as the range that it stands for."""
    del schema["format"]
    if (limits := _NUMBER_FORMATS[number_format]) is not None:
        for keyword, limit, narrower in (("minimum", limits[0], max), ("maximum", limits[1], min)):
            given = schema.get(keyword, limit)
            schema[keyword] = narrower(given, limit) if isinstance(given, int | float) else given


def _is_annotation(keyword: str) -> bool:
    is_private = keyword.startswith(_PRIVATE_PREFIXES) and keyword != _OPTIONS_OF_LLGUIDANCE
    return keyword in ANNOTATIONS or is_private


def _says_nothing(keyword: str, value: Any, schema: dict[str, Any]) -> bool:
    """Whether an unsupported keyword allows everything, as "uniqueItems": false does."""
    match keyword:
        case "uniqueItems":
            return value is False
        case "unevaluatedProperties" | "unevaluatedItems" | "propertyNames":
            return bool(value is True or value == {})
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return bool(value == {})
        case "then" | "else":
            return "if" not in schema
        case "if":
            return "then" not in schema and "else" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "not":
            return value is False
    return False


def _why_not(keyword: str, value: Any, schema: dict[str, Any]) -> str:
    """Why a keyword that the grammar knows cannot be enforced here; empty if it can, as far as is seen by now."""
    if keyword in MAX_ENTRIES and isinstance(value, dict | list) and len(value) > MAX_ENTRIES[keyword]:
        return f"has {len(value)} entries; at most {MAX_ENTRIES[keyword]} are allowed"
    match keyword:
        case "format" if isinstance(value, str) and value not in FORMATS:
            return f"{value!r} is not a format that can be enforced; these are: {', '.join(sorted(FORMATS))}"
        case "const" | "enum" | "properties" | "required" if _has_control_character(value, keyword):
            return "has a control character, which the grammar cannot write"
        case "pattern" if isinstance(value, str) and (counts := _counts(value, schema)) > MAX_COUNTS:
            return f"counts so far that with maxLength it takes {counts} states; at most {MAX_COUNTS} are allowed"
        case "minProperties" if isinstance(value, int | float) and value > _num_distinct(schema):
            # The grammar cannot tell whether two further keys are the same.
            return "can be enforced up to the number of required properties, and one more"
    return ""


def _counts(pattern: str, schema: dict[str, Any]) -> int:
    """The largest number of repetitions in a pattern, times maxLength; 0 if one of the two is missing."""
    limit = schema.get("maxLength")
    numbers = [int(number) for pair in _COUNTED.findall(pattern) for number in pair if number]
    return int(limit) * max(numbers, default=0) if isinstance(limit, int | float) else 0


def _has_control_character(value: Any, keyword: str) -> bool:
    """One that JSON has to write as \\uXXXX. Of properties only the names count."""
    waiting = [list(value) if keyword == "properties" and isinstance(value, dict) else value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and any(char < " " and char not in "\b\f\n\r\t" for char in each):
            return True
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
    return False


def _num_patterns(root: dict[str, Any], node: Node) -> int:
    """Patterns that one string has to match at once, as far as allOf and references bring them together."""
    waiting, seen, num_patterns = [node], {node.pointer}, 0
    while waiting and len(seen) < _MAX_APPLIED:
        applied = waiting.pop()
        num_patterns += "pattern" in applied.schema
        parts: dict[str, Any] = {name: applied.schema[name] for name in ("allOf", "$ref") if name in applied.schema}
        for child in children(root, Node(applied.pointer, parts)):
            if child.pointer not in seen:
                seen.add(child.pointer)
                waiting.append(child)
    return num_patterns


def _num_distinct(schema: dict[str, Any]) -> int:
    """Keys that an object has for certain, if it has one that is not required."""
    required = schema.get("required")
    return 1 + (len(required) if isinstance(required, list) else 0)


def _digits(value: float) -> int:
    """Of a decimal number, without the point: 1.25 has 125."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return MAX_MULTIPLE + 1
    _, digits, exponent = number.as_tuple()
    places = exponent if isinstance(exponent, int) else 0
    scale: int = 10 ** min(max(0, places), 20)
    return int("".join(map(str, digits))) * scale


def _essence(error: str) -> str:
    """A message of the compiler without the place, which is another where the subschema is compiled alone."""
    return error.split("\n  while processing")[0].replace("/$defs/_", "")


def _named_in(error: str, schema: dict[str, Any]) -> list[str]:
    """Keywords of the subschema that a message of the compiler names, or tells of."""
    named = [keyword for telltale, keywords in _TELLTALES if telltale in error for keyword in keywords]
    named += [keyword for keyword in schema if re.search(rf"(?<![\w$]){re.escape(keyword)}(?!\w)", error)]
    return [keyword for keyword in named if keyword in ENFORCED and keyword in schema]


def _keyword_of(error: str, schema: dict[str, Any]) -> str:
    """Of which keyword of the subschema the compiler speaks; empty if that cannot be told."""
    return next(iter([*_named_in(error, schema), *(keyword for keyword in schema if keyword in ENFORCED)]), "")
