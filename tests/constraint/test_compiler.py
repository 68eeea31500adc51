"""What may be asked besides schemas, the matcher, the cache and the threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from constrained import allowed, byte_compiler
from llguidance import LLParserLimits

from nanoserve.config import BUILTIN_MODEL
from nanoserve.constraint import checker
from nanoserve.constraint import compiler as compiler_module
from nanoserve.constraint.compiler import MAX_WAITING, NUM_THREADS, ConstraintCompiler
from nanoserve.constraint.grammar import MAX_CHOICES, MAX_TEXT_BYTES
from nanoserve.constraint.matcher import make_masks
from nanoserve.engine.text import TextCodec
from nanoserve.errors import ConstraintInvalid, Overloaded
from nanoserve.request import Constraint, ConstraintKind

ANY_OBJECT = Constraint(ConstraintKind.JSON_OBJECT)


def regex(text):
    return Constraint(ConstraintKind.REGEX, text)


def grammar(text):
    return Constraint(ConstraintKind.GRAMMAR, text)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (ANY_OBJECT, ['{"a": [1, "b"]}', "{}"], ["[]", "1", '{"a"}']),
        (regex("[a-c]+x?"), ["abc", "ax"], ["x", "abcxx", "abcd"]),
        (regex("^abc$"), ["abc"], ["abcd"]),
        (regex(r"\d\w/[\d]\\d"), ["1a/2\\d"], ["\u0661a/2\\d", "1\u00e9/2\\d"]),
        (regex("a\nb"), ["a\nb"], ["ab"]),
        (grammar('start: "x" (A | start)\nA: /[0-9]+/'), ["x12", "xxx3"], ["12", "x"]),
        (Constraint.of_choices(["a", "ab", 'q"\\\n', "é\u2028"]), ["a", "ab", 'q"\\\n', "é\u2028"], ["b", "", "abb"]),
    ],
)
def test_each_kind_allows_what_it_says(compiler, accepts, constraint, good, bad):
    compiled = compiler.compile(constraint)
    assert [text for text in [*good, *bad] if accepts(compiled, text)] == good
    assert compiled.report.keywords == ()


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        (regex(""), "constraint.regex: must not be empty"),
        (regex("a(?=b)"), "look-around"),
        (regex("(a"), "unclosed group"),
        (regex("a" * (MAX_TEXT_BYTES + 1)), "has 262145 bytes; at most 262144 are allowed"),
        (regex("(" * 20_000), "regex parse error"),
        (grammar(" "), "constraint.grammar: must not be empty"),
        (grammar('start: "a" foo'), 'unknown name: "foo"'),
        (grammar('foo: "a"'), "no start rule found"),
        (grammar("start: " + "(" * 20_000), "too deeply nested"),
        (grammar("start: start"), "allows no output"),
        (grammar('start: %json {"not": {}}'), "%json is not allowed in a grammar; a schema is given as json_schema"),
        (grammar('%llguidance {}\nstart: "a"'), "%llguidance is not allowed"),
        (Constraint.of_choices([]), "constraint.choices: at least one is required"),
        (Constraint.of_choices(["a", ""]), "constraint.choices: /1 must not be empty"),
        (Constraint.of_choices(["a", "b", "a"]), "constraint.choices: /2 is the same as choice 0"),
        (Constraint.of_choices(map(str, range(MAX_CHOICES + 1))), "has 10001 entries; at most 10000 are allowed"),
    ],
)
def test_what_is_wrong_is_told(compiler, constraint, told):
    with pytest.raises(ConstraintInvalid) as caught:
        compiler.compile(constraint)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "constraint",
    [
        regex("((a{1,1000}){1,1000}){1,1000}"),
        regex("(x+x+)+y"),
        regex("[^a]{300}b.{300}|.{400}c"),
        regex("|".join(f"x{i}y{{1,9}}" for i in range(15_000))),
        grammar("start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(15_000)) + 'a15000: "x"'),
        grammar("start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(15_000)) + 'A15000: "x"'),
        Constraint.of_choices([f"choice {i}" for i in range(MAX_CHOICES)]),
    ],
    ids=["repetition", "nested", "states", "alternatives", "rules", "terminals", "choices"],
)
def test_hostile_ones_are_compiled_or_refused_in_time(compiler, constraint):
    """Neither does one end the process."""
    try:
        compiled = compiler.compile(constraint)
    except ConstraintInvalid:
        return
    assert compiled.report.compile_s + compiled.report.first_mask_s < compiler_module.COMPILE_CPU_S


# ---------------------------------------------------------------------------------------------- the matcher


def test_a_mask_has_the_tokens_that_may_be_next(compiler, codec, vocab_size):
    masks = make_masks(3, vocab_size)
    assert masks.shape == (3, (vocab_size + 31) // 32)
    compiler.compile(Constraint.of_choices(["a", "ab"])).matcher().fill(masks[1:2])
    spelled = {codec.token_bytes(token_id) for token_id in allowed(masks, 1)}
    assert spelled == {b"a", b"ab"}
    assert not masks[[0, 2]].any()


def test_what_has_no_token_is_never_allowed(compiler, codec, vocab_size):
    masks = make_masks(1, vocab_size)
    compiler.compile(regex("(?s:.*)")).matcher().fill(masks)
    assert max(allowed(masks, 0)) < codec.vocab_size


def test_special_tokens_are_no_text(compiler, codec, vocab_size):
    masks = make_masks(1, vocab_size)
    compiler.compile(regex("(?s:.+)")).matcher().fill(masks)
    assert not allowed(masks, 0) & codec.special_token_ids


def test_a_model_with_fewer_tokens_than_its_tokenizer_gets_masks_of_its_own_width(codec):
    vocab_size = codec.vocab_size - 100
    narrow = ConstraintCompiler(lambda: codec.vocabulary(vocab_size, [codec.eos_token_id]), codec.encode_plain)
    masks = make_masks(1, vocab_size)
    narrow.compile(regex("a+")).matcher().fill(masks)
    assert masks.any()


def test_an_output_may_end_before_it_must():
    matcher = byte_compiler().compile(Constraint.of_choices(["a", "ab"])).matcher()
    masks = make_masks(1, 257)
    assert (matcher.may_end, matcher.is_complete) == (False, False)
    assert matcher.read(b"a") == 1
    assert (matcher.may_end, matcher.is_complete) == (True, False)
    matcher.fill(masks)
    assert allowed(masks, 0) == {ord("b"), 256}
    assert matcher.read(b"b") == 1
    assert (matcher.may_end, matcher.is_complete) == (True, True)
    matcher.fill(masks)
    assert allowed(masks, 0) == {256}


def test_eos_ends_it():
    matcher = byte_compiler().compile(regex("a*")).matcher()
    assert matcher.read([97, 256, 97]) == 2
    assert matcher.is_complete


def test_a_wrong_token_is_not_read_and_does_no_harm():
    matcher = byte_compiler().compile(regex("abc")).matcher()
    assert matcher.read(b"axc") == 1
    assert matcher.read(b"bc") == 2
    assert matcher.is_complete


def test_matchers_of_one_constraint_are_apart():
    compiled = byte_compiler().compile(regex("abcd"))
    one, other = compiled.matcher(), compiled.matcher()
    assert one.read(b"abcd") == 4
    assert other.read(b"cd") == 0
    assert (one.is_complete, other.is_complete) == (True, False)


def test_a_character_may_be_split_over_tokens():
    matcher = byte_compiler().compile(Constraint.of_choices(["é"])).matcher()
    assert matcher.read(b"\xc3") == 1
    assert not matcher.may_end
    assert matcher.read(b"\xa9") == 1
    assert matcher.is_complete


def test_the_mask_behind_each_drafted_token():
    """As if they had been read; and they are not."""
    matcher = byte_compiler().compile(regex("abc|ax")).matcher()
    masks = make_masks(4, 257)
    matcher.fill(masks, b"abc")
    assert [allowed(masks, i) for i in range(4)] == [{97}, {98, 120}, {99}, {256}]
    matcher.fill(masks, b"ayz")
    assert [allowed(masks, i) for i in range(4)] == [{97}, {98, 120}, set(), set()]
    assert matcher.count_allowed(b"abx") == 2
    assert matcher.read(b"abc") == 3


def test_forced_tokens_spell_what_must_follow():
    matcher = byte_compiler().compile(Constraint.of_choices(["nonesuch", "nobody"])).matcher()
    assert bytes(matcher.forced()) == b"no"
    matcher.read(b"non")
    assert bytes(matcher.forced()) == b"esuch"
    matcher.read(b"esuch")
    assert matcher.forced() == []


def test_beyond_its_limits_a_matcher_allows_nothing_and_the_next_one_is_compiled_anew(monkeypatch):
    monkeypatch.setattr(checker, "LIMITS", LLParserLimits(max_lexer_states=30, verbose_errors=False))
    compiler, constraint = byte_compiler(), regex(r"x(\S+\s+){0,99}y")
    compiled = compiler.compile(constraint)
    matcher = compiled.matcher()
    masks = make_masks(13, 257)
    matcher.fill(masks, b"xab ab ab ab")
    assert [bool(mask.any()) for mask in masks][:3] == [True, True, False]
    matcher.fill(masks[:1])
    assert not masks[0].any()
    assert matcher.read(b"x") == 0
    assert not matcher.may_end
    assert not matcher.is_complete
    anew = compiler.compile(constraint)
    assert anew is not compiled
    assert anew.matcher().read(b"x") == 1
    assert compiler.compile(constraint) is anew


# -------------------------------------------------------------------------------------- cache and threads


def test_the_same_constraint_is_compiled_once():
    compiler = byte_compiler()
    one = compiler.compile(regex("a"))
    assert compiler.compile(regex("a")) is one
    assert compiler._num_cached_bytes == one.num_bytes
    relaxed = Constraint(ConstraintKind.JSON_SCHEMA, "{}", is_relaxed=True)
    strict = Constraint(ConstraintKind.JSON_SCHEMA, "{}")
    assert compiler.compile(relaxed) is not compiler.compile(strict)


def test_the_cache_is_bounded_in_bytes_and_forgets_the_oldest_use():
    size = byte_compiler().compile(regex("a")).num_bytes
    compiler = byte_compiler(max_cache_bytes=2 * size)
    one, two = compiler.compile(regex("a")), compiler.compile(regex("b"))
    assert compiler.compile(regex("a")) is one
    compiler.compile(regex("c"))
    assert compiler._num_cached_bytes == 2 * size
    assert compiler.compile(regex("a")) is one
    assert compiler.compile(regex("b")) is not two


def test_one_more_than_may_wait_is_refused_and_the_others_are_compiled(monkeypatch):
    are_busy, may_go_on = threading.Barrier(NUM_THREADS + 1), threading.Event()
    compile_one = ConstraintCompiler._compile

    def wait(self, *args):
        if not may_go_on.is_set():
            are_busy.wait(60)
        assert may_go_on.wait(60)
        return compile_one(self, *args)

    monkeypatch.setattr(ConstraintCompiler, "_compile", wait)
    compiler = byte_compiler()
    futures = [compiler.submit(regex(f"a{{{i + 1}}}")) for i in range(NUM_THREADS)]
    are_busy.wait(60)
    futures += [compiler.submit(regex(f"a{{{i + 1}}}b")) for i in range(MAX_WAITING)]
    with pytest.raises(Overloaded, match=f"{MAX_WAITING} requests wait"):
        compiler.submit(regex("c"))
    # What is compiled, or will be, can be asked for.
    assert compiler.submit(regex("a{1}b")) in futures
    may_go_on.set()
    assert all(future.result(60).matcher().read(b"a") == 1 for future in futures)
    assert compiler.compile(regex("b")).matcher().read(b"b") == 1


def test_a_refusal_is_not_kept():
    compiler = byte_compiler()
    for _ in range(2):
        with pytest.raises(ConstraintInvalid):
            compiler.compile(regex("("))
    assert compiler._num_cached_bytes == 0


def test_many_threads_may_compile_and_match_at_once():
    compiler = byte_compiler()
    start = threading.Barrier(8)

    def run(number):
        start.wait()
        texts = [f"{(number + i) % 5}" for i in range(20)]
        compiled = [compiler.compile(regex(f"x{text}+")) for text in texts]
        counts = [each.matcher().read(f"x{text}9".encode()) for each, text in zip(compiled, texts, strict=True)]
        return compiled, counts

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(run, range(8)))
    assert len({id(each) for compiled, _ in results for each in compiled}) == 5
    assert {count for _, counts in results for count in counts} == {2}


def test_who_waits_too_long_is_told(monkeypatch):
    """And the one that takes long does not stand in the way of others."""
    may_go_on = threading.Event()
    compile_one = ConstraintCompiler._compile

    def slow(self, constraint, *args):
        if constraint.text == "slow":
            may_go_on.wait()
        return compile_one(self, constraint, *args)

    monkeypatch.setattr(ConstraintCompiler, "_compile", slow)
    compiler = byte_compiler()
    with monkeypatch.context() as patch:
        patch.setattr(compiler_module, "MAX_WAIT_S", 0.2)
        with pytest.raises(Overloaded, match=r"constraints of others were compiled for 0.2 s .* retry later"):
            compiler.compile(regex("slow"))
    assert compiler.compile(regex("quick")).matcher().read(b"quick") == 5
    may_go_on.set()
    assert compiler.compile(regex("slow")).matcher().read(b"slow") == 4


# ------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_of_another_kind_gives_the_same_masks(compiler, vocab_size, monkeypatch):
    """One that is not of the tokenizers library is known by the bytes of its tokens."""
    codec = TextCodec.load(BUILTIN_MODEL)
    monkeypatch.setattr(codec, "_backend", None)
    other = ConstraintCompiler(lambda: codec.vocabulary(vocab_size, [codec.eos_token_id]), codec.encode_plain)
    masks = make_masks(2, vocab_size)
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object", "required": ["name"]}')
    for row, each in enumerate((compiler, other)):
        matcher = each.compile(constraint).matcher()
        matcher.read(codec.encode('{"na', add_special_tokens=False))
        matcher.fill(masks[row : row + 1])
    assert allowed(masks, 0) == allowed(masks, 1)
    assert allowed(masks, 0)


@pytest.mark.parametrize("has_backend", [True, False])
def test_a_model_without_eos_ends_where_nothing_can_follow(monkeypatch, has_backend):
    """And no token stands for EOS where something can."""
    codec = TextCodec.load(BUILTIN_MODEL)
    if not has_backend:
        monkeypatch.setattr(codec, "_backend", None)
    vocab_size = codec.vocab_size
    endless = ConstraintCompiler(lambda: codec.vocabulary(vocab_size, []), codec.encode_plain)
    matcher = endless.compile(regex("a+b")).matcher()
    matcher.read(codec.encode("ab", add_special_tokens=False))
    assert matcher.is_complete
    matcher = endless.compile(regex("a+")).matcher()
    matcher.read(codec.encode("a", add_special_tokens=False))
    masks = make_masks(1, vocab_size)
    matcher.fill(masks)
    assert matcher.may_end
    assert {codec.token_bytes(token_id)[:1] for token_id in allowed(masks, 0) if token_id < vocab_size} == {b"a"}
