"""The word lists of words.txt."""

import functools
from pathlib import Path


@functools.cache
def words() -> dict[str, tuple[str, ...]]:
    """Every list by its name."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    lists = {}
    for section in text.split("== ")[1:]:
        kind, _, body = section.partition("\n")
        lists[kind] = tuple(word.strip() for word in body.replace("\n", " ").split("|"))
    return lists
