"""Large JSON in pieces is the JSON that one call writes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanoserve_gateway import pieces


@pytest.fixture(scope="module", autouse=True)
def _small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "VALUES", 2)
        patch.setattr(pieces, "CHARS", 2)
        yield


@given(st.lists(st.integers(0, 2**32) | st.text(), max_size=9), st.text(max_size=9), st.lists(st.binary(), max_size=9))
def test_pieces_join_to_the_whole(values, text, tokens):
    def convert(token):
        return token.decode("utf-8", "replace")

    members = {"values": pieces.array(values), "text": pieces.text(text), "tokens": pieces.array(tokens, convert)}
    assert json.loads(pieces.of_members(members)) == {
        "values": values,
        "text": text,
        "tokens": [convert(token) for token in tokens],
    }
