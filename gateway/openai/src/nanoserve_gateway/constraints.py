"""What the output must be, as OpenAI and vLLM have it, and what became of it. Pure.

    response_format · text.format · structured_outputs · guided_*  ─▶ Constraint ─▶ options of the client
    Result ─▶ outcome_of: fields beside a choice

A schema of OpenAI's without `strict` is relaxed: what of it cannot be enforced is checked when the output is complete.
What bears a name of vLLM's is always enforced, or refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Required, TypedDict, cast

from nanoserve_client import ConstraintOptions, Result, UnenforcedKeyword
from openai.types.shared_params import ResponseFormatJSONObject, ResponseFormatText

from nanoserve_gateway.errors import rest_name
from nanoserve_gateway.schema import Field, refused, served

# ------------------------------------------------------------------------------------------- lines of the table


class StructuredOutputs(TypedDict, total=False):
    """vLLM's constraint. One of these."""

    json: dict[str, Any] | str
    json_object: bool
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: Any
    whitespace_pattern: Any
    disable_any_whitespace: Any
    disable_additional_properties: Any
    disable_fallback: Any


_WHITE_SPACE = "at most 16 white space characters stand at a place, and none has to"
_TAGS = "use json, regex or grammar"
NOT_STRUCTURED = (
    refused("structural_tag", _TAGS),
    refused("whitespace_pattern", _WHITE_SPACE),
    refused("disable_any_whitespace", _WHITE_SPACE, False),
    refused("disable_additional_properties", "the schema says it by additionalProperties", False),
    refused("disable_fallback", "there is nothing to fall back to", False),
)
_ENFORCED = "Always enforced, or refused"
STRUCTURED_OUTPUTS = (
    served(
        "structured_outputs",
        f"Extension. What the text must be: one of `json` (a JSON Schema), `json_object`, `regex`, `choice` and"
        f" `grammar` (Lark, as llguidance reads it). {_ENFORCED}.",
        StructuredOutputs,
    ),
)
# As vLLM had it before.
GUIDED_DECODING = (
    served("guided_json", f"Extension. A JSON Schema. {_ENFORCED}.", dict[str, Any] | str),
    served("guided_regex", "Extension. A regular expression that the whole text matches.", str),
    served("guided_choice", "Extension. The text is one of these.", list[str]),
    served("guided_grammar", "Extension. A Lark grammar, as llguidance reads it.", str),
    refused("guided_decoding_backend", "there is only one", "auto"),
    refused("guided_whitespace_pattern", _WHITE_SPACE),
    refused("structural_tag", _TAGS),
)
FORMATS = (
    "text, json_object, or json_schema. With `strict` a schema is enforced, or refused; without, what of it cannot be"
    " enforced is checked at the end. The answer tells its `constraint_outcome`, and what is `unenforced`."
)
FORMAT_OBJECTS: dict[type, tuple[Field, ...]] = {ResponseFormatText: (), ResponseFormatJSONObject: ()}
FORMAT_SCHEMA = (
    served("name", "A label; it changes no token.", Required[str]),
    served("description", "A label; it changes no token.", str),
    served("schema", "A JSON Schema.", Required[dict[str, Any]]),
    served("strict", "Whether all of the schema has to be enforced. Default false.", bool),
)

# ------------------------------------------------------------------------------------------- from field to option

# Members of structured_outputs, and the option of the client that each is.
STRUCTURED = {
    "json": "schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
}
GUIDED = {f"guided_{name}": STRUCTURED[name] for name in ("json", "regex", "choice", "grammar")}


@dataclass(frozen=True, slots=True)
class _Found:
    """One constraint of a request."""

    # The field that says it.
    place: str
    option: str
    value: Any
    relaxed: bool = False


class Constraint:
    """What a request says of its output: nothing, or one constraint, wherever it stands."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """fields: as Schema.parse returns them."""
        self._found = [*_of_formats(fields), *_of_names(fields)]
        self._is_empty = "structured_outputs" in fields and not any(_of_structured(fields))

    @property
    def rules(self) -> Sequence[tuple[bool, str, str]]:
        """For `check`."""
        places = [found.place for found in self._found]
        others = f"is given beside {' and '.join(places[1:])}; at most one constraint is possible"
        return (
            (len(places) > 1, places[0] if places else "", others),
            (self._is_empty, "structured_outputs", f"one of {', '.join(STRUCTURED)} is required"),
        )

    @property
    def options(self) -> ConstraintOptions:
        """For the client."""
        chosen = {each.option: each.value for each in self._found}
        if any(each.relaxed for each in self._found):
            chosen["relaxed"] = True
        return cast(ConstraintOptions, chosen)

    @property
    def names(self) -> Mapping[str, str]:
        """What the caller calls the constraint's field of the contract."""
        fields = {"schema": "json_schema"}
        return {f"constraint.{fields.get(each.option, each.option)}": each.place for each in self._found}

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._found)


def _of_formats(fields: Mapping[str, Any]) -> Iterator[_Found]:
    """OpenAI's. Chat has the schema in an object of its own, responses beside the type."""
    if (of_chat := fields.get("response_format")) is not None:
        yield from _of_format("response_format", of_chat, "json_schema", of_chat.get("json_schema"))
    if (of_response := (fields.get("text") or {}).get("format")) is not None:
        yield from _of_format("text.format", of_response, "", of_response)


def _of_format(place: str, format: Mapping[str, Any], member: str, asked: Mapping[str, Any] | None) -> Iterator[_Found]:
    if format["type"] == "json_object":
        yield _Found(place, "json_object", True)
    elif format["type"] == "json_schema" and asked is not None:
        path = ".".join(filter(None, [place, member, "schema"]))
        yield _Found(path, "schema", asked["schema"], relaxed=not asked.get("strict"))


def _of_names(fields: Mapping[str, Any]) -> Iterator[_Found]:
    """vLLM's."""
    yield from _of_structured(fields)
    for name, option in GUIDED.items():
        if name in fields:
            yield _Found(name, option, fields[name])


def _of_structured(fields: Mapping[str, Any]) -> Iterator[_Found]:
    asked = fields.get("structured_outputs") or {}
    for name, option in STRUCTURED.items():
        # json_object: false asks for nothing.
        if asked.get(name) not in (None, False):
            yield _Found(f"structured_outputs.{name}", option, asked[name])


def outcome_of(result: Result, index: int, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What became of a sequence's constraint; nothing if there was none. names: what the API calls fields of the
    contract that have other names there."""
    if (outcome := result.completions[index].constraint_outcome) is None:
        return {}
    told: dict[str, Any] = {"constraint_outcome": outcome.value}
    if result.unenforced:
        told["unenforced"] = [_unenforced(each, names) for each in result.unenforced]
    return told


def _unenforced(each: UnenforcedKeyword, names: Mapping[str, str]) -> dict[str, str]:
    told = {"pointer": each.pointer, "keyword": each.keyword, "why": each.why}
    # Of several schemas there may be, those of tools, which one it is.
    return {**told, "param": rest_name(each.field, names)} if each.field else told
