"""Field numbers that are kept for a field to come stand in the header of generation.proto, all of them."""

import re
from pathlib import Path

from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

HEADER = Path(__file__).resolve().parents[2] / "protos" / "nanoserve" / "v1" / "generation.proto"
MESSAGES = {
    name: message
    for file in (admin_pb2, generation_pb2, model_pb2)
    for name, message in file.DESCRIPTOR.message_types_by_name.items()
}


def kept_numbers():
    """(message, number) of each row, and the names they are kept for."""
    header = HEADER.read_text().partition("\nservice ")[0]
    rows = re.findall(r"^// \| (\w+) +\| (\d+) +\| (\w+) +\|$", header, re.MULTILINE)
    return {(message, int(number)): name for message, number, name in rows}


def test_the_table_is_read():
    assert kept_numbers()["GenerateRequest", 2] == "adapter"
    assert {message for message, _ in kept_numbers()} <= MESSAGES.keys()


def test_no_field_has_a_number_that_is_kept():
    used = {(name, field.number) for name, message in MESSAGES.items() for field in message.fields}
    assert not used & kept_numbers().keys()


def test_every_gap_is_in_the_table():
    gaps = {
        (name, number)
        for name, message in MESSAGES.items()
        for number in range(1, max(message.fields_by_number, default=0))
        if number not in message.fields_by_number
    }
    assert gaps <= kept_numbers().keys()
