"""The field numbers of a message have no gaps: no field was taken out, and no number is kept for one to come."""

import pytest
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

MESSAGES = [
    message
    for file in (admin_pb2, generation_pb2, model_pb2)
    for message in file.DESCRIPTOR.message_types_by_name.values()
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_every_number_is_a_fields(message):
    assert sorted(message.fields_by_number) == list(range(1, len(message.fields) + 1))
