"""What a request may hold: the openai package's own parameter types, cut down to what is served.

    JSON ─▶ parse_json ─▶ Schema.parse ─▶ the fields that are set, checked; or BadRequest with every violation

A schema is made of a table with a line for each field. Nothing is ignored: a field is served, or a label that changes
no token, or refused with its reason; one that no line has is refused as unknown. null is the same as absent, in objects
within the request too. The types become pydantic models that forbid what they do not name. The same table makes the
reference page and the OpenAPI schema.
"""

import collections.abc
import functools
import json
import operator
import reprlib
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, Required

import pydantic
from openai._types import SequenceNotStr
from pydantic import BeforeValidator, ConfigDict, Discriminator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import is_typeddict

# Of one JSON object; the largest that is served has 1,024. What is wrong with each is found before it is counted.
MAX_NAMES = 4096

Status = Literal["served", "label", "refused"]


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request."""

    # Where, as in "messages[0].content".
    param: str
    message: str


class BadRequest(Exception):
    """The request cannot be served as it is."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.param}: {v.message}" for v in violations))
        self.violations = violations


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request, or of an object in it."""

    name: str
    status: Status
    # What it does if it is served, else why not.
    note: str
    # Values of a refused field that ask for nothing, so that they are taken.
    harmless: tuple[Any, ...] = ()
    # What it must be, where the openai package's type does not say, or says more than is served.
    type: Any = None


def parse_json(body: bytes) -> Any:
    """Raises BadRequest. NaN and halves of characters are no JSON that others could read; of a name that is there twice
    one value would be ignored."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest([Violation("body", f"is not JSON: {error}")]) from None
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members) > MAX_NAMES:
        raise ValueError(f"an object has {len(members)} names; at most {MAX_NAMES}")
    value: dict[str, Any] = {}
    for name, member in members:
        if name in value:
            raise ValueError(f"{name!r} is there twice")
        value[name] = member
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def served(name: str, note: str, type: Any = None) -> Field:
    return Field(name, "served", note, type=type)


def label(name: str, note: str) -> Field:
    return Field(name, "label", note)


def refused(name: str, why: str, *harmless: Any) -> Field:
    return Field(name, "refused", why, harmless)


class Schema:
    """One kind of request."""

    def __init__(
        self,
        name: str,
        params: type | None,
        fields: Sequence[Field],
        objects: Mapping[type, Sequence[Field]] = types.MappingProxyType({}),
    ) -> None:
        """params: the TypedDict of the openai package. objects: which objects within it are served, each with what it
        refuses, and with what is served beyond its type; of a choice between objects the others are left out."""
        self.name = name
        self.fields = {field.name: field for field in fields}
        self.params = params
        self.objects = objects
        hints = _hints(params) if params else {}
        taken = {f.name: f.type or hints[f.name] for f in fields if f.status != "refused"}
        self.model = self._model(name, taken)

    def parse(self, body: Any) -> dict[str, Any]:
        """The fields that are set; null is not set. Raises BadRequest, with the first wrong item of each list."""
        if not isinstance(body, dict):
            raise BadRequest([Violation("body", "must be a JSON object")])
        given = {name: value for name, value in body.items() if value is not None}
        violations = list(_refusals(given, self.fields, ""))
        checked = {name: value for name, value in given.items() if self._is_taken(name)}
        try:
            values = self.model.model_validate(checked).model_dump(exclude_unset=True)
        except pydantic.ValidationError as error:
            violations += _violations(error, checked)
        if violations:
            raise BadRequest(violations)
        return {name: value for name, value in values.items() if value is not None}

    def _is_taken(self, name: str) -> bool:
        return name in self.fields and self.fields[name].status != "refused"

    def _model(
        self, name: str, hints: Mapping[str, Any], check: Callable[[Any], Any] | None = None
    ) -> type[pydantic.BaseModel]:
        """A model of these fields, strict, so that "1" is no number."""
        validators: dict[str, Any] = {"check": pydantic.model_validator(mode="before")(check)} if check else {}
        members: dict[str, Any] = {}
        for field, hint in hints.items():
            # The types of the fields of some requests say so by Required; in params of ours by Annotated.
            is_required = typing.get_origin(hint) in (typing.Required, Required)
            members[field] = (self._convert(hint), ...) if is_required else (self._convert(hint) | None, None)
        config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
        with warnings.catch_warnings():
            # Fields that are called as methods of pydantic's old versions, such as `schema`, take their places.
            warnings.filterwarnings("ignore", 'Field name ".*" in ".*" shadows an attribute', UserWarning)
            return pydantic.create_model(name, __config__=config, __validators__=validators, **members)

    @functools.cache  # noqa: B019 - schemas live as long as the process
    def _object(self, hint: Any) -> type[pydantic.BaseModel]:
        """The model of an object within the request, without what it refuses."""
        lines = {field.name: field for field in self.objects.get(hint, ())}
        # A label within an object is dropped with what is refused: nothing reads it.
        dropped = {name: line for name, line in lines.items() if line.status != "served"}
        added = {name: line.type for name, line in lines.items() if line.status == "served"}
        hints = {name: kind for name, kind in (_hints(hint) | added).items() if name not in dropped}
        kinds = _literals(hints.get("type"))

        def check(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            given = {name: member for name, member in value.items() if member is not None}
            if "type" in given:
                # Of another kind all fields are wrong.
                _raise(hint.__name__, _not_one_of(given, "type", kinds))
            there_are = f"is not a field here; there are: {', '.join(hints) or 'none that are served'}"
            unknown = [Violation(name, there_are) for name in given if name not in hints and name not in dropped]
            refusals = _refusals({name: member for name, member in given.items() if name in dropped}, dropped, "")
            _raise(hint.__name__, [*refusals, *unknown])
            return {name: member for name, member in given.items() if name not in dropped}

        return self._model(hint.__name__, hints, check)

    def _convert(self, hint: Any) -> Any:
        """A type of the openai package in pydantic's terms: objects become models, lazy sequences lists."""
        if is_typeddict(hint):
            return self._object(hint)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Required, NotRequired, typing.Required, typing.NotRequired):
            return self._convert(arguments[0])
        if origin is Annotated:
            return Annotated[self._convert(arguments[0]), *arguments[1:]]
        if origin in (typing.Union, types.UnionType):
            return self._choice(arguments)
        if origin in (list, collections.abc.Iterable, collections.abc.Sequence, SequenceNotStr):
            # Of a list the first wrong item alone is told: errors of millions would take gigabytes.
            return Annotated[types.GenericAlias(list, (self._convert(arguments[0]),)), pydantic.Field(fail_fast=True)]
        return hint

    def _choice(self, options: Iterable[Any]) -> Any:
        objects = [option for option in options if option in self.objects]
        others = [self._convert(option) for option in options if not is_typeddict(option)]
        if len(objects) > 1:
            # What is wrong with a message is told by its role, not by all that it might have been.
            tag = next(name for name in ("role", "type") if all(_literals(_hints(o).get(name)) for o in objects))
            kinds = tuple(kind for option in objects for kind in _literals(_hints(option)[tag]))

            def check(value: Any) -> Any:
                if isinstance(value, dict):
                    _raise(tag, _not_one_of(value, tag, kinds))
                return value

            choice: Any = functools.reduce(operator.or_, map(self._convert, objects))
            checked = Annotated[choice, Discriminator(tag), BeforeValidator(check)]
            return functools.reduce(operator.or_, others, checked)
        return functools.reduce(operator.or_, [*others, *map(self._convert, objects)])


def _hints(params: type) -> dict[str, Any]:
    return typing.get_type_hints(params, include_extras=True)


def _literals(hint: Any) -> tuple[str, ...]:
    """What a field that names its object's kind may be; nothing if the hint is no such field's."""
    if typing.get_origin(hint) in (Required, typing.Required):
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _not_one_of(value: Mapping[str, Any], name: str, kinds: Sequence[str]) -> list[Violation]:
    """What is wrong with the field that names an object's kind; nothing if kinds has it, or is empty."""
    kind = value.get(name)
    if not kinds or (isinstance(kind, str) and kind in kinds):
        return []
    what = "is required" if kind is None else f"{reprlib.repr(kind)} is not served"
    return [Violation(name, f"{what}; served: {', '.join(kinds)}")]


def _raise(title: str, violations: Sequence[Violation]) -> None:
    """Within a validator; pydantic adds the path of the object."""
    if violations:
        # The message is a template of pydantic's, in which the caller's braces are none.
        details = [
            InitErrorDetails(
                type=PydanticCustomError("field", "{why}", {"why": each.message}), loc=(each.param,), input=None
            )
            for each in violations
        ]
        raise pydantic.ValidationError.from_exception_data(title, details)


def _refusals(given: Mapping[str, Any], fields: Mapping[str, Field], path: str) -> Iterable[Violation]:
    for name, value in given.items():
        if name not in fields:
            yield Violation(path + name, "is not a field of this request")
        elif fields[name].status == "refused" and not _asks_for_nothing(value, fields[name].harmless):
            yield Violation(path + name, f"is not served: {fields[name].note}")


def _asks_for_nothing(value: Any, harmless: Iterable[Any]) -> bool:
    return value is None or any(_is_same(value, each) for each in harmless)


def _is_same(value: Any, harmless: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(harmless, dict)):
        return bool(value == harmless)
    given = {name: member for name, member in value.items() if member is not None}
    return given.keys() == harmless.keys() and all(_is_same(given[name], harmless[name]) for name in harmless)


def _violations(error: pydantic.ValidationError, body: Any) -> list[Violation]:
    """pydantic's findings by path. Of a choice that failed every option says why: those that fitted least are left out,
    the others joined."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for entry in error.errors(include_url=False, include_context=False, include_input=False):
        path = _path(entry["loc"], body, is_missing=entry["type"] in ("missing", "field"))
        messages = found.setdefault(path, [])
        if (message := entry["msg"].removeprefix("Value error, ")) not in messages:
            messages.append(message)
    above = {path[:depth] for path in found for depth in range(len(path))}
    return [Violation(_text(path), ", or: ".join(messages)) for path, messages in found.items() if path not in above]


def _path(location: tuple[int | str, ...], body: Any, *, is_missing: bool) -> tuple[int | str, ...]:
    """pydantic's location without the names of the options that it tried."""
    path: list[int | str] = []
    for depth, part in enumerate(location):
        is_member = isinstance(body, dict) and part in body
        if is_member or (isinstance(body, list) and isinstance(part, int)):
            path.append(part)
            body = body[part]
        elif is_missing and depth == len(location) - 1:
            path.append(part)
    return tuple(path)


def _text(path: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "body"
