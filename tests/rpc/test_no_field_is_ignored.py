"""No field of a request is ignored: an unknown one is refused, and a known one counts."""

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.errors import InvalidRequest, ModelNotFound
from nanoserve.rpc import validate

MODEL = FakeEngine().model


def violations(convert, *args) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        convert(*args)
    return {v.field: v.description for v in caught.value.violations}


def refused_message(request: pb.GenerateRequest) -> dict[str, str]:
    return violations(validate.generation, request, MODEL)


# ---------------------------------------------------------------------------------------- unknown fields

UNKNOWN = b"\xd0\x3e\x01"  # field 1002, varint 1


def parse(*, chat_message: bytes = b"", tool: bytes = b"", sampling: bytes = b"", top: bytes = b"") -> Any:
    """A request with more bytes at the end of the named messages."""
    role_and_content = b"\x08\x02\x12\x02hi"
    messages = b"".join(field(1, role_and_content + more) for more in (b"", chat_message))
    tools = field(2, b"\x0a\x01f" + tool)
    return pb.GenerateRequest.FromString(field(5, messages + tools) + field(6, sampling) + top)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ({"top": UNKNOWN}, "1002"),
        ({"sampling": UNKNOWN}, "sampling.1002"),
        ({"chat_message": UNKNOWN}, "chat.messages[1].1002"),
        ({"chat_message": field(5, b"\x12\x01f\x1a\x02{}" + UNKNOWN)}, "chat.messages[1].tool_calls[0].1002"),
        ({"tool": UNKNOWN}, "chat.tools[0].1002"),
        ({"top": field(7, field(7, b"\x08\x01" + UNKNOWN))}, "stopping.time_limit.1002"),
    ],
)
def test_an_unknown_field_is_refused_at_any_depth_by_path_and_number(where, path):
    found = refused_message(parse(**where))
    assert path in found
    assert "field number 1002 of " in found[path]
    assert "is not known" in found[path]


def test_a_map_entry_that_holds_more_than_key_and_value_is_refused():
    entry = field(9, b"\x08\x07\x15\x00\x00\x80\x3f" + UNKNOWN)
    assert list(refused_message(parse(sampling=entry))) == ["sampling.logit_bias"]


def test_messages_inside_a_map_are_looked_into():
    struct = Struct(fields={"a": Value(string_value="x"), "b": Value()})
    struct.fields["b"].MergeFromString(UNKNOWN)
    assert list(violations(validate.nothing, struct)) == ["fields[b].1002"]


def test_a_known_field_in_a_foreign_encoding_is_refused():
    assert list(refused_message(parse(top=b"\x5d\x01\x00\x00\x00"))) == ["n"]  # as fixed32


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda m: validate.tokenization(m, MODEL), model_pb2.TokenizeRequest(text="x")),
        (lambda m: validate.detokenization(m, MODEL), model_pb2.DetokenizeRequest()),
        (
            lambda m: validate.constraint_check(m, MODEL),
            model_pb2.CheckConstraintRequest(constraint=pb.Constraint(regex="a")),
        ),
        (validate.request_id, admin_pb2.CancelRequest(request_id="r")),
        (validate.nothing, model_pb2.ListModelsRequest()),
        (validate.nothing, admin_pb2.ResetCacheRequest()),
        (validate.nothing, admin_pb2.GetStatsRequest()),
        (validate.watch, admin_pb2.WatchEngineRequest()),
        (validate.request_id, admin_pb2.ExplainRequestRequest(request_id="r")),
        (lambda m: validate.adapter_load(m, MODEL), admin_pb2.LoadAdapterRequest(name="a")),
        (lambda m: validate.adapter_unload(m, MODEL), admin_pb2.UnloadAdapterRequest(name="a")),
        (validate.nothing, admin_pb2.ListAdaptersRequest()),
    ],
)
def test_every_rpc_refuses_unknown_fields(convert, message):
    message.MergeFromString(UNKNOWN)
    assert "1002" in violations(convert, message)


# ---------------------------------------------------------------------------- no field is silently ignored

# Requests in which each field can be set to something odd without breaking another rule.
BASES = {
    pb.GenerateRequest: [
        pb.GenerateRequest(text="hi"),
        pb.GenerateRequest(
            chat=pb.Chat(
                messages=[
                    pb.ChatMessage(
                        role=pb.ROLE_ASSISTANT, content="x", tool_calls=[pb.ToolCall(name="f", arguments_json="{}")]
                    ),
                    pb.ChatMessage(role=pb.ROLE_TOOL, content="x"),
                    pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="x"),
                ],
                tools=[pb.Tool(name="f")],
                tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO),
                parallel_tool_calls=False,
            ),
            stopping=pb.Stopping(time_limit=Duration(seconds=5)),
        ),
        pb.GenerateRequest(text="hi", constraint=pb.Constraint(json_schema="{}")),
        pb.GenerateRequest(text="hi", constraint=pb.Constraint(choices=pb.Choices(texts=["a"]))),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])),
    ],
    model_pb2.TokenizeRequest: [
        model_pb2.TokenizeRequest(text="hi"),
        model_pb2.TokenizeRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="x")], tools=[pb.Tool(name="f")])
        ),
    ],
    model_pb2.DetokenizeRequest: [model_pb2.DetokenizeRequest(token_ids=[1])],
    model_pb2.CheckConstraintRequest: [
        model_pb2.CheckConstraintRequest(constraint=pb.Constraint(json_schema="{}")),
        model_pb2.CheckConstraintRequest(constraint=pb.Constraint(choices=pb.Choices(texts=["a"]))),
    ],
    admin_pb2.CancelRequest: [admin_pb2.CancelRequest(request_id="r")],
    admin_pb2.WatchEngineRequest: [admin_pb2.WatchEngineRequest(interval=Duration(seconds=5))],
    admin_pb2.ExplainRequestRequest: [admin_pb2.ExplainRequestRequest(request_id="r")],
    admin_pb2.LoadAdapterRequest: [admin_pb2.LoadAdapterRequest(name="a")],
    admin_pb2.UnloadAdapterRequest: [admin_pb2.UnloadAdapterRequest(name="a", drain_timeout=Duration(seconds=5))],
}
CONVERT = {
    pb.GenerateRequest: lambda m: validate.generation(m, MODEL),
    model_pb2.TokenizeRequest: lambda m: validate.tokenization(m, MODEL),
    model_pb2.DetokenizeRequest: lambda m: validate.detokenization(m, MODEL),
    model_pb2.CheckConstraintRequest: lambda m: validate.constraint_check(m, MODEL),
    admin_pb2.CancelRequest: validate.request_id,
    admin_pb2.WatchEngineRequest: validate.watch,
    admin_pb2.ExplainRequestRequest: validate.request_id,
    admin_pb2.LoadAdapterRequest: lambda m: validate.adapter_load(m, MODEL),
    admin_pb2.UnloadAdapterRequest: lambda m: validate.adapter_unload(m, MODEL),
}
# Read by the servicer, not by validate.py: test_model.py, test_generation.py, test_adapters.py show that each counts.
ELSEWHERE = {
    f"nanoserve.v1.{name}"
    for name in (
        "DetokenizeRequest.keep_special_tokens",
        "GenerateRequest.priority",
        "CacheOptions.salt",
        "CacheOptions.skip_read",
        "OutputOptions.min_delta_tokens",
        "LoadAdapterRequest.path",
        "LoadAdapterRequest.pinned",
        "LoadAdapterRequest.replace",
    )
}


def outcome(request: Message) -> str:
    try:
        return repr(CONVERT[type(request)](request))
    except (InvalidRequest, ModelNotFound) as error:
        return f"refused: {error}"


def mutants(message: Message) -> Iterator[tuple[FieldDescriptor, Message]]:
    """Copies of the message with one field changed, at any depth."""
    for field_ in message.DESCRIPTOR.fields:
        value = getattr(message, field_.name)
        is_map = field_.message_type is not None and field_.message_type.GetOptions().map_entry
        if is_map or field_.message_type is None:
            copy = type(message)()
            copy.CopyFrom(message)
            change(copy, field_, is_map)
            yield field_, copy
            continue
        if field_.is_repeated:
            copies = range(len(value))
        else:
            if field_.containing_oneof and not message.HasField(field_.name):
                continue
            copies = [None]
        for index in copies:
            child = value if index is None else value[index]
            for inner, changed in mutants(child):
                copy = type(message)()
                copy.CopyFrom(message)
                (getattr(copy, field_.name) if index is None else getattr(copy, field_.name)[index]).CopyFrom(changed)
                yield inner, copy


def change(message: Message, field_: FieldDescriptor, is_map: bool) -> None:
    if is_map:
        getattr(message, field_.name)[3] = 1.0
        return
    odd = {
        FieldDescriptor.CPPTYPE_STRING: '{"odd": 1}',
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_FLOAT: 0.375,
        FieldDescriptor.CPPTYPE_ENUM: pb.ROLE_SYSTEM,
    }.get(field_.cpp_type, 3)
    if field_.is_repeated:
        getattr(message, field_.name).append(odd)
    else:
        setattr(message, field_.name, odd)


def fields_of(descriptor: Descriptor) -> set[str]:
    found = set()
    for field_ in descriptor.fields:
        is_map = field_.message_type is not None and field_.message_type.GetOptions().map_entry
        if field_.message_type is None or is_map:
            found.add(field_.full_name)
        else:
            found |= fields_of(field_.message_type)
    return found


def test_every_field_of_a_request_changes_the_outcome_or_is_refused():
    changed, all_fields = set(), set()
    for request_class, bases in BASES.items():
        all_fields |= fields_of(request_class.DESCRIPTOR)
        for base in bases:
            usual = outcome(base)
            assert not usual.startswith("refused")
            changed |= {f.full_name for f, mutant in mutants(base) if outcome(mutant) != usual}
    assert all_fields - changed == ELSEWHERE


def test_no_request_of_the_contract_is_left_out():
    methods = [
        method
        for module in (generation_pb2, model_pb2, admin_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    with_fields = {m.input_type.full_name for m in methods if m.input_type.fields}
    assert with_fields == {cls.DESCRIPTOR.full_name for cls in BASES}
