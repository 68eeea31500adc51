"""Items of a conversation in /v1/responses: from what callers send, and what is kept, to messages. Pure.

    reasoning ─┐
    message ───┼─▶ one message of the assistant's        function_call_output ─▶ one of a tool
    function_call* ─┘

What the assistant did in one go are several items there, and one message for the model's template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoserve_gateway.answer import check, new_id
from nanoserve_gateway.chat import content_of

# What ids begin with, and what a kind of item always has.
_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, and where in the request it stands."""

    message: dict[str, Any]
    # By the contract's fields of the message; "" is the message itself.
    places: dict[str, str]

    def takes(self, *parts: str) -> bool:
        """Whether it is the assistant's, and says nothing of these parts yet."""
        return self.message["role"] == "assistant" and not any(part in self.message for part in parts)


def items_of(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The input as items that can be listed; a text is one message of the user."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_item_of(item) for item in items]


def _item_of(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    whole = {"id": new_id(_PREFIXES[kind]), "status": "completed", **item, "type": kind}
    if kind == "reasoning":
        return {"summary": [], **whole}
    if kind != "message" or not isinstance(content := item["content"], str):
        return whole
    part = "output_text" if item["role"] == "assistant" else "input_text"
    return {**whole, "content": [{"type": part, "text": content}]}


def turns_of(items: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The messages that the items make, in order."""
    turns: list[Turn] = []
    for number, item in enumerate(items):
        _add(turns, item, f"input[{number}]")
    return turns


def _add(turns: list[Turn], item: Mapping[str, Any], place: str) -> None:
    kind = item.get("type", "message")
    if kind == "reasoning":
        if text := "".join(part["text"] for part in item.get("content") or ()):
            turn = _turn(turns, place, "content", "tool_calls")
            turn.message["reasoning"] = turn.message.get("reasoning", "") + text
            turn.places["reasoning"] = f"{place}.content"
    elif kind == "function_call":
        turn = _turn(turns, place)
        calls = turn.message.setdefault("tool_calls", [])
        # Models and clients write no arguments as an empty text, which is no JSON.
        arguments = item["arguments"] if item["arguments"].strip() else "{}"
        turn.places[f"tool_calls[{len(calls)}]"] = place
        turn.places[f"tool_calls[{len(calls)}].arguments_json"] = f"{place}.arguments"
        calls.append({"id": item["call_id"], "name": item["name"], "arguments": arguments})
    elif kind == "function_call_output":
        answer = {"role": "tool", "content": content_of(item["output"]), "tool_call_id": item["call_id"]}
        named = {"name": item["name"]} if "name" in item else {}
        turns.append(Turn(answer | named, _places_of(place, "output") | {"tool_call_id": f"{place}.call_id"}))
    elif item["role"] == "assistant":
        turn = _turn(turns, place, "content", "tool_calls")
        turn.message["content"] = content_of(item["content"])
        turn.places.update(_places_of(place, "content"))
    else:
        message = {"role": item["role"], "content": content_of(item["content"])}
        turns.append(Turn(message, _places_of(place, "content")))


def _turn(turns: list[Turn], place: str, *parts: str) -> Turn:
    """The assistant's that goes on, or a new one: of these parts nothing may have been said."""
    if not turns or not turns[-1].takes(*parts):
        turns.append(Turn({"role": "assistant"}, {"": place}))
    return turns[-1]


def _places_of(place: str, text: str) -> dict[str, str]:
    return {"": place, "content": f"{place}.{text}", "content_parts": f"{place}.{text}"}


def conversation(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, below the instructions."""
    instructions = fields.get("instructions")
    return [*([{"role": "system", "content": instructions}] if instructions else []), *messages]


def places(fields: Mapping[str, Any], num_before: int, turns: Sequence[Turn]) -> dict[str, str]:
    """What callers call the messages of the contract, which counts instructions and what was said before too.
    num_before: messages of what was said before."""
    before = ["instructions"] if fields.get("instructions") else []
    before += ["previous_response_id"] * num_before
    names = {"chat.messages": "input", **{f"chat.messages[{i}].content": name for i, name in enumerate(before)}}
    for number, turn in enumerate(turns, len(before)):
        message = f"chat.messages[{number}]"
        if isinstance(fields.get("input", ()), str):
            names[f"{message}.content"] = "input"
        else:
            names |= {f"{message}.{part}" if part else message: place for part, place in turn.places.items()}
    return names


def page_of(items: Sequence[Mapping[str, Any]], query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of a list. query: as INPUT_ITEMS.parse returns it. Raises BadRequest."""
    ordered = list(items) if query.get("order") == "asc" else list(reversed(items))
    begin = 0
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in ordered]
        check((after not in ids, "after", f"there is no item {after!r}"))
        begin = ids.index(after) + 1
    page = ordered[begin : begin + query.get("limit", 20)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(ordered),
    }
