"""The subschemas of a JSON Schema: where they lie, what they refer to, and which of them no value can ever match.

Places are JSON pointers (RFC 6901).
"""

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Subschemas lie in an object of them, in a list of them, or are the value itself.
_IN_OBJECT = frozenset({"properties", "patternProperties"})
_IN_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_AS_VALUE = frozenset({"additionalProperties", "items", "additionalItems"})
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Node:
    """A subschema that says something of the output."""

    pointer: str
    schema: dict[str, Any]


class SchemaError(Exception):
    """The text is no schema, or one that nothing matches."""

    def __init__(self, why: str, pointer: str = "", keyword: str = "") -> None:
        super().__init__(why)
        self.pointer, self.keyword = pointer, keyword


def walk(root: dict[str, Any]) -> Iterator[Node]:
    """Every subschema that the root applies, directly or by a reference, once. Raises SchemaError where something else
    stands in the place of one."""
    waiting, seen = [Node("", root)], {""}
    knows_all = False
    while waiting:
        node = waiting.pop()
        yield node
        found = list(children(root, node))
        if _has_names(node) and not knows_all:
            # A reference by name may lead to any definition.
            knows_all = True
            found += [child for name in _DEFINITIONS for child in _entries(Node("", root), name)]
        for child in reversed(found):
            if child.pointer not in seen:
                seen.add(child.pointer)
                waiting.append(child)


def _has_names(node: Node) -> bool:
    """References here are not all of the form "#/...": one of them, or what they start from, has a name."""
    ref = node.schema.get("$ref")
    is_named_ref = isinstance(ref, str) and ref != "#" and not ref.startswith("#/")
    return is_named_ref or (node.pointer != "" and any(isinstance(node.schema.get(i), str) for i in ("$id", "id")))


def children(root: dict[str, Any], node: Node) -> Iterator[Node]:
    for keyword, value in node.schema.items():
        if (keyword in _IN_OBJECT and isinstance(value, dict)) or (keyword in _IN_LIST and isinstance(value, list)):
            yield from _entries(node, keyword)
        elif keyword in _AS_VALUE:
            yield from _subschema(f"{node.pointer}/{keyword}", value)
        elif keyword == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            pointer = urllib.parse.unquote(value[1:])
            if isinstance(target := resolve(root, pointer), dict):
                yield Node(pointer, target)


def _entries(node: Node, keyword: str) -> Iterator[Node]:
    value = node.schema.get(keyword)
    if isinstance(value, dict):
        items: Any = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from _subschema(f"{node.pointer}/{keyword}/{_escape(str(name))}", child)


def _subschema(pointer: str, value: Any) -> Iterator[Node]:
    if isinstance(value, dict):
        yield Node(pointer, value)
    elif not isinstance(value, bool):
        raise SchemaError("must be a schema: an object, true or false", pointer)


def resolve(root: Any, pointer: str) -> Any:
    """What lies at a JSON pointer; None if nothing does."""
    value = root
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def with_refs_below(value: Any, place: str) -> Any:
    """The same, in which local references start at another place."""
    if isinstance(value, list):
        return [with_refs_below(each, place) for each in value]
    if not isinstance(value, dict):
        return value
    moved = {name: with_refs_below(each, place) for name, each in value.items()}
    ref = moved.get("$ref")
    if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
        moved["$ref"] = place + ref[1:]
    return moved


# ------------------------------------------------------------------------------------------------- without an end

_KINDS = frozenset({"object", "array", "other"})


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a value needs in order to match a subschema. A subschema stands here by its pointer."""

    # Of these kinds the type lets it be.
    kinds: frozenset[str]
    # It matches all of these, and one of each of those.
    all_of: tuple[str, ...]
    one_of_each: tuple[tuple[str, ...], ...]
    # By its kind: what it holds matches these.
    held: dict[str, tuple[str, ...]]


def endless(root: dict[str, Any], nodes: list[Node]) -> list[Node]:
    """Those that no value matches because it would have to hold others without an end, as a list of which each element
    has a next one. Whoever writes such a value never comes to its end.

    A subschema matches values of some kinds: of those for which what they have to hold matches any. Begun with no kind
    anywhere, that grows to what finite values can be; begun with all, it shrinks to what values without an end can be.
    """
    needs = {node.pointer: _needs_of(root, node) for node in nodes}
    finite = _grown(needs, frozenset())
    candidates = [node for node in nodes if not finite[node.pointer]]
    infinite = _grown(needs, _KINDS) if candidates else {}
    return [node for node in candidates if infinite[node.pointer]]


def _grown(needs: dict[str, _Needs], start: frozenset[str]) -> dict[str, frozenset[str]]:
    """The kinds of each subschema, where another look at all of them changes none."""
    kinds = dict.fromkeys(needs, start)
    is_changed = True
    while is_changed:
        is_changed = False
        # What is referred to lies behind, mostly.
        for pointer, need in reversed(needs.items()):
            if (found := _kinds_of(need, kinds)) != kinds[pointer]:
                kinds[pointer], is_changed = found, True
    return kinds


def _kinds_of(need: _Needs, kinds: dict[str, frozenset[str]]) -> frozenset[str]:
    found = need.kinds
    for pointer in need.all_of:
        found &= kinds.get(pointer, _KINDS)
    for pointers in need.one_of_each:
        found &= frozenset().union(*(kinds.get(pointer, _KINDS) for pointer in pointers))
    return frozenset(kind for kind in found if all(kinds.get(held, _KINDS) for held in need.held.get(kind, ())))


def _needs_of(root: dict[str, Any], node: Node) -> _Needs:
    """What it does not know it takes for nothing needed."""
    schema = node.schema

    def below(*keywords: str) -> tuple[str, ...]:
        some = {keyword: schema[keyword] for keyword in keywords if keyword in schema}
        return tuple(child.pointer for child in children(root, Node(node.pointer, some)))

    types = schema.get("type")
    names = types if isinstance(types, list) else [types]
    kinds = {name if name in ("object", "array") else "other" for name in names if isinstance(name, str)}
    choices = [schema[keyword] for keyword in ("anyOf", "oneOf") if isinstance(schema.get(keyword), list)]
    is_known = all(isinstance(branch, dict) for choice in choices for branch in choice)
    return _Needs(
        kinds=frozenset(kinds) or _KINDS,
        all_of=below("$ref", "allOf"),
        one_of_each=tuple(filter(None, (below("anyOf"), below("oneOf")))) if is_known else (),
        held={"object": _members(node), "array": _elements(node)},
    )


def _members(node: Node) -> tuple[str, ...]:
    """What the required properties of an object match."""
    schema, found = node.schema, []
    required, properties = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if isinstance(properties, dict) and name in properties:
            found.append(f"{node.pointer}/properties/{_escape(str(name))}")
        elif "patternProperties" not in schema and isinstance(schema.get("additionalProperties"), dict):
            found.append(f"{node.pointer}/additionalProperties")
    return tuple(found)


def _elements(node: Node) -> tuple[str, ...]:
    """What those elements match that an array has at least."""
    schema = node.schema
    least = schema.get("minItems")
    if not isinstance(least, int):
        return ()
    first = "prefixItems" if "prefixItems" in schema else "items"
    rest = "additionalItems" if isinstance(schema.get("items"), list) else "items"
    num_first = len(schema[first]) if isinstance(schema.get(first), list) else 0
    found = [f"{node.pointer}/{first}/{i}" for i in range(min(least, num_first))]
    if least > num_first and isinstance(schema.get(rest), dict):
        found.append(f"{node.pointer}/{rest}")
    return tuple(found)
