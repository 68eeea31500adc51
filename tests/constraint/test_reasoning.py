"""Reasoning that is cut short: after so many tokens another grammar goes on, which closes it."""

import pytest
from constrained import allowed, byte_compiler

from nanoserve.constraint.matcher import make_masks
from nanoserve.request import BEGUN, REASONED, Constraint, ConstraintKind


@pytest.fixture(scope="module")
def compiled():
    """Of `open`: whether the prompt has opened the block. A block is [...], and the answer x or y."""
    compiler = byte_compiler()

    def compile_it(*, is_open):
        think = f"{REASONED}[capture]: think\nthink[lazy]: TEXT\nTEXT: /[a-z]*\\]/\n"
        close = f'{REASONED}[capture]: "]"\n'
        block = REASONED if is_open else f"({BEGUN} {REASONED})?"
        start = f'start: {block} answer\n{BEGUN}[capture]: "["\nanswer: "x" | "y"\n'
        text, closing = start + think, start + close
        if not is_open:
            closing = closing.replace(f"({BEGUN} {REASONED})?", REASONED)
        return compiler.compile(Constraint(ConstraintKind.DIALECT, text, closing_text=closing, is_reasoning=is_open))

    return compile_it


def follow(matcher, text):
    """What may come after each byte of the text, as far as it is read."""
    seen = []
    for byte in text.encode():
        masks = make_masks(1, 257)
        matcher.fill(masks)
        seen.append("".join(map(chr, sorted(allowed(masks, 0)))))
        if not matcher.read([byte]):
            break
    return seen


LETTERS = "]" + "".join(map(chr, range(ord("a"), ord("z") + 1)))


@pytest.mark.parametrize(("most", "text"), [(0, "]x"), (1, "a]x"), (3, "aaa]y"), (3, "a]x"), (4, "aaa]x")])
def test_an_open_block_is_closed_after_so_many_tokens(compiled, most, text):
    matcher = compiled(is_open=True).matcher([], most)
    seen = follow(matcher, text)
    assert seen == [LETTERS] * min(most, text.index("]") + 1) + ["]"] * (text.index("]") == most) + ["xy"]
    assert matcher.is_complete


def test_without_a_limit_it_goes_on(compiled):
    assert follow(compiled(is_open=True).matcher(), "aaaaaa]x") == [LETTERS] * 7 + ["xy"]


def test_a_block_that_the_model_has_begun_is_closed_and_an_answer_is_not(compiled):
    either = compiled(is_open=False)
    assert follow(either.matcher([], 3), "[aa]x") == ["[xy", LETTERS, LETTERS, "]", "xy"]
    assert follow(either.matcher([], 3), "x") == ["[xy"]
    assert follow(either.matcher([], 1), "x") == ["[xy"]
    assert follow(either.matcher([], 2), "[]y") == ["[xy", LETTERS, "xy"]


@pytest.mark.parametrize("cut", range(5))
def test_what_was_read_before_counts(compiled, cut):
    """After a preemption."""
    text = b"aa]x"
    matcher = compiled(is_open=True).matcher(text[:cut], 2)
    assert matcher.read(text[cut:]) == len(text[cut:])
    assert matcher.is_complete
    assert compiled(is_open=True).matcher([], 2).read(b"aaa") == 2


def test_drafts_end_where_it_is_closed(compiled):
    matcher = compiled(is_open=True).matcher([], 3)
    assert matcher.count_allowed(b"aaaaa") == 2
    masks = make_masks(6, 257)
    matcher.fill(masks, b"aaaaa")
    assert [mask.any() for mask in masks] == [True] * 3 + [False] * 3
    assert matcher.read(b"aaa]x") == 5
