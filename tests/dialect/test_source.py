"""The text that comes in pieces."""

import pytest

from nanoserve.dialect.source import Markers, Source


def result(source, reading, pieces):
    """What a reader returns when it has read all of some pieces, or as much as it wants."""
    try:
        for piece in pieces:
            source.add(piece)
            next(reading)
        source.is_over = True
        next(reading)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits for more than there is")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "found", "before", "rest"),
    [
        ("xabcd", "abc", "x", "d"),
        ("xabd", "ab", "x", "d"),
        ("xab", "ab", "x", ""),
        ("xaab", "ab", "xa", ""),
        ("xa", "", "x", "a"),
        ("b\nabz", "\nab", "b", "z"),
        ("b\n\nabz", "\nab", "b\n", "z"),
    ],
)
def test_the_longest_of_the_first_markers_is_found_in_any_cut(text, found, before, rest, size):
    source, written, markers = Source(), [], Markers(["ab", "abc", "\nab"])
    reading = source.until(markers, written.append)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    marker = result(source, reading, pieces)
    assert (marker, "".join(written)) == (found, before)
    left = "".join(pieces)[len(before) + len(found) :]
    assert left == rest
    assert left.startswith(source.rest())


def test_without_markers_everything_is_written():
    source, written = Source(), []
    assert result(source, source.until(Markers([]), written.append), ["ab", "c"]) == ""
    assert written == ["ab", "c"]
