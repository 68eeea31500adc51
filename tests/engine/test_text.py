"""Text and tokens: every kind of tokenizer, streams that equal the one-shot decode, stop strings."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, PythonBackend, dynamic_module_utils

from nanoserve.config import BUILTIN_MODEL
from nanoserve.engine import detokenizer
from nanoserve.engine.chat_template import Chat
from nanoserve.engine.text import TextCodec, TextPiece, TextStream
from nanoserve.request import FinishReason, SamplingParams

CORPUS = [
    "the quick brown fox jumps over the lazy dog, don't you see? I'm sure it does not.",
    "def f(x):\n    return x * 2  # twice\n",
    "日本語のテキスト。 Äpfel und Öl, naïve café",
    "emoji 👩‍👩‍👧 👍🏽 🇩🇪 done",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
# In letters that byte-level BPE does not use.
END_OF_TEXT = "<\uff5cend▁of▁text\uff5c>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁the", "▁▁", "the", "é", "日", "▁日本", ".", "'s", "n't", "a", "b", "▁a", "<0xZZ>", "👍"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([*SPECIAL, END_OF_TEXT])
    # The last one looks like a byte that is no UTF-8, and the library takes it for that.
    tokenizer.add_tokens(["<think>", "two words", "日本", "þ"])
    return tokenizer


def byte_fallback(*, strips: bool) -> Tokenizer:
    """As Llama 2 and, without stripping, Gemma have it."""
    vocab = [*SPECIAL, *BYTES, *WORDS]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strips else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    vocab = [(t, 0.0 if t in SPECIAL else -float(i)) for i, t in enumerate([*SPECIAL, *WORDS, "q", "u", "i", "c", "k"])]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, "a", "b", "é"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def nested_strip() -> Tokenizer:
    tokenizer = byte_fallback(strips=True)
    first = decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.decoder = decoders.Sequence(
        [first, decoders.Fuse(), decoders.Replace("a", "ä"), decoders.Strip(" ", 3, 0)]
    )
    return tokenizer


def opaque() -> Tokenizer:
    """Its decoder is not among the known ones."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("[xc]"), "<>")])
    return tokenizer


def codec_of(backend: Tokenizer, **kwargs) -> TextCodec:
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs))


CODECS = {
    "byte level": codec_of(byte_level()),
    "byte fallback": codec_of(byte_fallback(strips=True)),
    "byte fallback without strip": codec_of(byte_fallback(strips=False)),
    "metaspace": codec_of(metaspace("always")),
    "metaspace never": codec_of(metaspace("never")),
    "word level": codec_of(word_level()),
    "nested and stripped": codec_of(nested_strip()),
}
BYTE_LEVEL = CODECS["byte level"]
OPAQUE = codec_of(opaque())


def texts(ids: list[int], codec: TextCodec = BYTE_LEVEL, cuts: list[int] | None = None, **params) -> list[TextPiece]:
    """What a stream makes of ids, pushed in parts of the given lengths and then the rest, as the last."""
    stream = TextStream(codec, SamplingParams(**params))
    pieces = []
    for cut in cuts or []:
        pieces.append(stream.push(ids[:cut]))
        ids = ids[cut:]
        if pieces[-1].stop_string is not None:
            return pieces
    return [*pieces, stream.push(ids, FinishReason.LENGTH)]


def joined(pieces: list[TextPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def byte_level_ids(content: bytes) -> list[int]:
    """A token a byte."""
    letter_of = {byte: letter for letter, byte in detokenizer._ByteLevel.BYTES.items()}
    return [BYTE_LEVEL._backend.token_to_id(letter_of[byte]) for byte in content]


CUTS = st.lists(st.integers(0, 3), max_size=30)
EMOJI_AND_GARBAGE = "a👍🏽é日e\u0301 👩‍👩‍👧".encode() + b"\xff\xe2\x82a\xf0\x9f\x91\xc0\x80\xed\xa0\x80\xe2\x82"


# --------------------------------------------------------------------------------------- streams and one-shot decode


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=80, deadline=None)
@given(st.data(), CUTS, st.booleans())
def test_a_stream_gives_what_the_one_shot_decode_gives(
    name: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    codec = CODECS[name]
    # Most of some vocabularies are bytes; words are drawn as often.
    words = [i for i in range(codec.vocab_size) if codec.token(i) not in BYTES]
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size + 2) | st.sampled_from(words), max_size=30))
    whole = codec.decode(ids, skip_special_tokens=skip)
    assert joined(texts(ids, codec, cuts, skip_special_tokens=skip)) == whole
    if "\ufffd" not in whole:
        assert codec._backend.decode(ids, skip_special_tokens=skip) == whole
        known = [i for i in ids if i < codec.vocab_size]
        assert codec._tokenizer.decode(known, skip_special_tokens=skip) == whole


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback without strip"])
@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.text(max_size=3).map(str.encode), st.binary(max_size=4))).map(b"".join),
    CUTS,
)
@example(EMOJI_AND_GARBAGE, [1] * len(EMOJI_AND_GARBAGE))
def test_any_bytes_stream_as_they_decode(name: str, garbage: bytes, cuts: list[int]) -> None:
    codec = CODECS[name]
    ids = [codec._backend.token_to_id(BYTES[byte]) for byte in garbage]
    if name == "byte level":
        ids = byte_level_ids(garbage)
        assert codec.decode(ids) == garbage.decode(errors="replace")
    assert joined(texts(ids, codec, cuts)) == codec.decode(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback without strip"])
def test_text_survives_the_way_there_and_back(name: str) -> None:
    codec = CODECS[name]
    for text in [*CORPUS, "e\u0301 한국어 👩‍👩‍👧‍👦\n\n\t x", "\x00\x7f", " leading", "trailing "]:
        ids = codec.encode(text, add_special_tokens=False)
        assert joined(texts(ids, codec, [1] * len(ids))) == text
        assert b"".join(map(codec.token_bytes, ids)) == (b" " if name == "byte fallback" else b"") + text.encode()


def test_a_character_is_never_split() -> None:
    ids = byte_level_ids("한👍".encode())
    assert [piece.text for piece in texts(ids, cuts=[1] * 7)] == ["", "", "한", "", "", "", "👍", ""]


def test_text_does_not_lag_without_need() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams())
    for token_id in BYTE_LEVEL.encode("the quick brown fox"):
        assert stream.push([token_id]).text == BYTE_LEVEL.decode([token_id]) != ""


def test_an_unfinished_character_comes_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("a👍")[:-1]
    assert [piece.text for piece in texts(ids, cuts=[len(ids)])] == ["a", "\ufffd"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="fox cat日👍é.", max_size=30), CUTS)
def test_an_unknown_decoder_streams_text_too(text: str, cuts: list[int]) -> None:
    # What it does depends on one character at a time.
    assert isinstance(OPAQUE.detokenizer(skip_special_tokens=True), detokenizer.Window)
    ids = OPAQUE.encode(text)
    assert joined(texts(ids, OPAQUE, cuts)) == OPAQUE.decode(ids) == text.replace("x", "<>").replace("c", "<>")


def test_a_window_does_not_wait_for_ever_and_stays_small() -> None:
    window = OPAQUE.detokenizer(skip_special_tokens=True)
    assert isinstance(window, detokenizer.Window)
    bad = OPAQUE._backend.token_to_id("ÿ")
    text = "".join(window.feed(bad) for _ in range(100)) + window.finish()
    assert text == "\ufffd" * 100
    assert len(window._token_ids) <= 2 * window.MAX_WAIT


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Strip(" ", 0, 1),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_not_guessed_at(decoder: decoders.Decoder) -> None:
    assert detokenizer.compile_decoder(decoder) is None


# ------------------------------------------------------------------------------------------------ stop strings


def reference_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first stop string is complete, and which: of several there the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


STOPPY = st.text(alphabet="ab 日👍", max_size=40)
STOPS = st.lists(st.text(alphabet="ab 日👍", min_size=1, max_size=5), max_size=4)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@settings(max_examples=150, deadline=None)
@given(STOPPY, STOPS, CUTS, st.booleans())
@example("aaab", ["aab"], [1] * 9, False)
@example("abcd aab", ["ab ", "b", "aab"], [2, 1], True)
def test_stop_strings_are_found_as_in_the_whole_text(
    name: str, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    codec = CODECS[name]
    ids = codec.encode(text, add_special_tokens=False)
    pieces = texts(ids, codec, cuts, stop=tuple(stops), include_stop=include)
    found = reference_stop(text, stops)
    if found is None:
        assert joined(pieces) == text
        assert pieces[-1].stop_string is None
        assert sum(piece.num_tokens for piece in pieces) == len(ids)
    else:
        end, stop = found
        assert pieces[-1].stop_string == stop
        assert joined(pieces) == text[: end if include else end - len(stop)]


@settings(max_examples=60, deadline=None)
@given(STOPPY, STOPS, CUTS, st.integers(0, 12))
def test_cuts_change_neither_text_nor_token_count(
    text: str, stops: list[str], cuts: list[int], min_tokens: int
) -> None:
    ids = BYTE_LEVEL.encode(text)

    def outcome(cuts: list[int]) -> tuple[str, str | None, int]:
        pieces = texts(ids, cuts=cuts, stop=tuple(stops), min_tokens=min_tokens)
        return joined(pieces), pieces[-1].stop_string, sum(piece.num_tokens for piece in pieces)

    assert outcome(cuts) == outcome([]) == outcome([1] * len(ids))


def single_tokens(text: str) -> list[int]:
    return [i for char in text for i in BYTE_LEVEL.encode(char)]


def test_a_match_reports_the_token_that_completed_it() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("END",)))
    assert stream.push(single_tokens("ab E")) == TextPiece("ab ", 4)
    assert stream.push(single_tokens("NDxyz")) == TextPiece("", 2, "END")


def test_text_behind_the_stop_string_in_the_same_token_is_dropped() -> None:
    ids = BYTE_LEVEL.encode("the quick")
    assert [BYTE_LEVEL.decode([i]) for i in ids] == ["the", " quick"]
    assert texts(ids, stop=(" q",)) == [TextPiece("the", 2, " q")]
    assert texts(ids, stop=(" q",), include_stop=True) == [TextPiece("the q", 2, " q")]


def test_a_partial_match_never_leaks_and_is_given_up_when_it_fails() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("aab",)))
    given = [stream.push([i]).text for i in single_tokens("aaaxaa")]
    assert given == ["", "", "a", "aax", "", ""]
    assert stream.push([], FinishReason.LENGTH).text == "aa"


def test_the_first_complete_stop_string_wins_and_the_longest_of_those() -> None:
    assert texts(single_tokens("xabcdef"), stop=("abcdef", "cd"))[0] == TextPiece("xab", 5, "cd")
    assert texts(single_tokens("xabcd"), stop=("cd", "bcd"))[0] == TextPiece("xa", 5, "bcd")
    assert texts(single_tokens("a\n\n"), stop=("\n\n", "\n"))[0] == TextPiece("a", 2, "\n")


def test_stop_strings_do_not_match_before_min_tokens() -> None:
    ids = single_tokens("abxabx")
    assert texts(ids, stop=("ab",), min_tokens=2)[0] == TextPiece("", 2, "ab")
    assert texts(ids, stop=("ab",), min_tokens=3)[0] == TextPiece("abx", 5, "ab")
    # It may begin before, if it is complete only then.
    assert texts(ids, stop=("bx",), min_tokens=3)[0] == TextPiece("a", 3, "bx")
    assert texts(ids, stop=("ab",), min_tokens=6)[0] == TextPiece("abxabx", 6)
    # One that came too early may be the start of the one that counts.
    assert texts(single_tokens("ababa"), stop=("aba",), min_tokens=4)[0] == TextPiece("ab", 5, "aba")


def test_a_stop_string_may_be_complete_only_at_the_end() -> None:
    codec = CODECS["byte fallback"]
    ids = [codec._backend.token_to_id(BYTES[byte]) for byte in "ü".encode()]
    assert texts(ids[:1], codec, stop=("\ufffd",), include_stop=True) == [TextPiece("\ufffd", 1, "\ufffd")]


def test_long_stop_strings_that_almost_match_hold_the_text_only_for_so_long() -> None:
    stops = tuple("a" * 1000 + chr(ord("b") + i) for i in range(16))
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=stops))
    given = [stream.push([i]).text for i in single_tokens("a" * 3000)]
    assert given == [""] * 1000 + ["a"] * 2000
    assert stream.push(single_tokens("ag")) == TextPiece("a", 2, stops[5])


# -------------------------------------------------------------------------------------------------- last tokens


@pytest.mark.parametrize(
    ("reason", "params", "expected"),
    [
        (FinishReason.EOS, {}, "the"),
        (FinishReason.EOS, {"include_stop": True}, "the"),
        (FinishReason.EOS, {"skip_special_tokens": False}, "the</s>"),
        (FinishReason.STOP, {}, "the"),
        (FinishReason.STOP, {"skip_special_tokens": False}, "the"),
        (FinishReason.STOP, {"skip_special_tokens": False, "include_stop": True}, "the</s>"),
        (FinishReason.STOP, {"include_stop": True}, "the"),
        (FinishReason.LENGTH, {}, "the"),
        (FinishReason.CONTEXT, {"skip_special_tokens": False}, "the</s>"),
    ],
)
def test_the_text_of_a_special_last_token(reason: FinishReason, params: dict[str, bool], expected: str) -> None:
    ids = [*BYTE_LEVEL.encode("the"), BYTE_LEVEL._backend.token_to_id("</s>")]
    assert TextStream(BYTE_LEVEL, SamplingParams(**params)).push(ids, reason) == TextPiece(expected, len(ids))


@pytest.mark.parametrize(
    ("reason", "params", "expected"),
    [
        (FinishReason.EOS, {"include_stop": True}, "the"),
        (FinishReason.STOP, {}, "the"),
        (FinishReason.STOP, {"include_stop": True}, "the quick"),
        (FinishReason.LENGTH, {}, "the quick"),
    ],
)
def test_the_text_of_an_ordinary_last_token(reason: FinishReason, params: dict[str, bool], expected: str) -> None:
    ids = BYTE_LEVEL.encode("the quick")
    assert TextStream(BYTE_LEVEL, SamplingParams(**params)).push(ids, reason) == TextPiece(expected, len(ids))


def test_a_hidden_last_token_completes_no_stop_string() -> None:
    ids = BYTE_LEVEL.encode("the quick")
    params = SamplingParams(stop=(" quick", "e q"))
    assert TextStream(BYTE_LEVEL, params).push(ids, FinishReason.STOP) == TextPiece("the", 2)


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 3}])
def test_a_stop_string_may_be_a_special_token_that_is_not_shown(params: dict) -> None:
    ids = [*single_tokens("hi"), BYTE_LEVEL._backend.token_to_id("</s>"), *single_tokens("more")]
    assert texts(ids, stop=("</s>",), **params)[0] == TextPiece("hi", 3, "</s>")
    assert texts(ids, cuts=[1] * 7, stop=("</s>",), **params)[2] == TextPiece("", 1, "</s>")
    assert texts(ids, stop=("</s>",), include_stop=True, **params)[0] == TextPiece("hi</s>", 3, "</s>")
    assert texts(ids, stop=("</s>",), skip_special_tokens=False, **params)[0] == TextPiece("hi", 3, "</s>")
    # In part, and across.
    assert texts(ids, stop=("i</s>m",), **params)[0] == TextPiece("h", 4, "i</s>m")
    assert texts(ids, stop=("</s>mi",), **params)[0] == TextPiece("himore", 7)
    assert joined(texts(ids, cuts=[1] * 7, stop=("</s>mi", "s>x"), **params)) == "himore"


# --------------------------------------------------------------------------------- completions, which have no start


def continued(name: str, prompt: list[str], *completion: str, **params) -> str:
    """The text of tokens behind a prompt of others, pushed one by one."""
    codec = CODECS.get(name, OPAQUE)
    context, *ids = ([codec._backend.token_to_id(token) for token in tokens] for tokens in (prompt, completion))
    stream = TextStream(codec, SamplingParams(**params), context)
    pieces = []
    for token_id in ids[0]:
        pieces.append(stream.push([token_id]))
        if pieces[-1].stop_string is not None:
            return joined(pieces)
    return joined([*pieces, stream.push([], FinishReason.LENGTH)])


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "want"),
    [
        ("byte fallback", ["▁the"], ["▁a", "▁the"], " a the"),
        ("byte fallback without strip", ["▁the"], ["▁a"], " a"),
        ("metaspace", ["▁the"], ["▁a", "b"], " ab"),
        ("metaspace never", ["▁the"], ["▁a"], " a"),
        ("word level", ["a"], ["b", "a"], " b a"),
        ("nested and stripped", ["▁the"], ["▁▁", "▁the"], " the"),
        ("byte level", ["Ġthe"], ["Ġquick"], " quick"),
        ("opaque", ["Ġthe"], ["Ġquick"], " qui<>k"),
    ],
)
def test_a_completion_goes_on_from_its_prompt(name: str, prompt: list[str], completion: list[str], want: str) -> None:
    assert continued(name, prompt, *completion) == want


@pytest.mark.parametrize("name", ["metaspace", "byte fallback", "word level"])
def test_behind_a_prompt_that_shows_nothing_a_text_begins(name: str) -> None:
    word = {"metaspace": "▁the", "byte fallback": "▁the", "word level": "a"}[name]
    text = word.replace("▁", "")
    assert continued(name, ["<s>"], word, word) == f"{text} {text}"
    assert continued(name, [word, "<s>"], word) == f" {text}"


def test_a_stop_string_may_begin_with_the_completions_first_space() -> None:
    assert continued("byte fallback", ["▁the"], "▁a", "b", stop=[" a"]) == ""
    assert continued("metaspace", ["▁the"], "▁a", "b", stop=[" a"]) == ""


def test_a_message_of_its_own_has_no_space_before_it() -> None:
    codec = CODECS["byte fallback"]
    ids = [codec._backend.token_to_id(token) for token in ("▁the", "▁a")]
    assert joined(texts(ids, codec, [1])) == "the a"


# ------------------------------------------------------------------------------------------------ tokens of a byte


def bytes_of_fallback(content: bytes) -> list[int]:
    return [CODECS["byte fallback"]._backend.token_to_id(BYTES[byte]) for byte in content]


def test_each_character_of_a_run_of_bytes_comes_when_it_is_complete() -> None:
    ids = bytes_of_fallback("né👍日".encode())
    given = [piece.text for piece in texts(ids, CODECS["byte fallback"], cuts=[1] * len(ids))]
    assert given == ["n", "", "é", "", "", "", "👍", "", "", "日", ""]


def test_a_stop_string_in_a_run_of_bytes_is_found_at_once() -> None:
    ids = bytes_of_fallback("日本本日".encode())
    assert texts(ids, CODECS["byte fallback"], cuts=[1] * 12, stop=("本",))[5] == TextPiece("", 1, "本")


def test_a_cut_within_a_character_spoils_only_that_one() -> None:
    ids = bytes_of_fallback("日👍👍".encode()[:-2])
    assert joined(texts(ids, CODECS["byte fallback"])) == "日👍\ufffd" == CODECS["byte fallback"].decode(ids)


# ------------------------------------------------------------------------------------------------------ encode


def test_special_tokens_are_added_to_text_and_not_to_chat() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    codec = codec_of(byte_fallback(strips=True), bos_token="<s>", chat_template=template)
    plain, _ = codec.encode_prompt("a")
    assert plain[0] == 1
    assert plain == codec._tokenizer("a").input_ids
    chat, text = codec.encode_prompt(Chat([{"role": "user", "content": "a"}]))
    assert text == "<s>a"
    assert chat.count(1) == 1
    assert codec.encode("a", add_special_tokens=False) == plain[1:]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_encode_gives_the_tokens_of_transformers(text: str) -> None:
    for codec in CODECS.values():
        assert codec.encode(text) == codec._tokenizer(text).input_ids


def test_settings_of_the_training_do_not_cut_or_fill_prompts() -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    assert codec_of(backend).encode(CORPUS[0]) == BYTE_LEVEL.encode(CORPUS[0])


def test_four_threads_and_the_event_loop_use_one_codec() -> None:
    prompts = [text * 20 for text in CORPUS]
    codec = codec_of(byte_level(), chat_template="{{ messages[0].content }}")
    expected = [BYTE_LEVEL.encode(text) for text in prompts]

    def work(i: int) -> None:
        text, ids = prompts[i % len(prompts)], expected[i % len(prompts)]
        assert codec.encode_prompt(text) == (ids, text)
        assert codec.encode_prompt(Chat([{"role": "user", "content": text}])) == (ids, text)
        assert codec.decode(ids) == text
        assert joined(texts(ids, codec, [7, 3])) == text
        assert b"".join(map(codec.token_bytes, ids)) == text.encode()

    with ThreadPoolExecutor(4) as pool:
        running = pool.map(work, range(80))
        for i in range(20):
            work(i)
        assert len(list(running)) == 80


def holds_the_interpreter(work: Callable[[], object]) -> bool:
    """Whether another thread stands still for most of the time that `work` takes."""
    longest = 0.0
    is_done = threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not is_done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    work()
    duration = time.perf_counter() - start
    is_done.set()
    ticker.join()
    return longest > duration / 2


def test_a_long_prompt_does_not_hold_the_interpreter() -> None:
    text = "the quick brown fox " * 20_000
    # On a busy machine a thread may wait for other reasons, so one good run of some is enough.
    assert any(not holds_the_interpreter(lambda: BYTE_LEVEL.encode(text)) for _ in range(4))
    ids = BYTE_LEVEL.encode(text)
    assert any(not holds_the_interpreter(lambda: BYTE_LEVEL.decode(ids)) for _ in range(4))


def test_importing_the_module_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, nanoserve.engine.text; print({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_load_reads_a_checkpoint(tmp_path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>").save_pretrained(tmp_path)
    codec = TextCodec.load(tmp_path)
    assert codec.encode(CORPUS[0]) == BYTE_LEVEL.encode(CORPUS[0])
    assert codec.vocab_size == BYTE_LEVEL.vocab_size
    assert {codec.token(i) for i in codec.special_token_ids} == {*SPECIAL, END_OF_TEXT}


# ------------------------------------------------------------------------------------------------- token bytes


def test_bytes_of_tokens() -> None:
    def bytes_of(name: str, token: str) -> bytes:
        codec = CODECS[name]
        return codec.token_bytes(codec._backend.token_to_id(token))

    assert bytes_of("byte level", "Ġquick") == b" quick"
    assert bytes_of("byte level", "ð") == b"\xf0"
    assert bytes_of("byte level", END_OF_TEXT) == END_OF_TEXT.encode()
    assert bytes_of("byte fallback", "▁the") == b" the"
    assert bytes_of("byte fallback", "<0xE2>") == b"\xe2"
    assert bytes_of("byte fallback", "<0xZZ>") == b"<0xZZ>"
    assert bytes_of("byte fallback", "</s>") == b"</s>"
    assert bytes_of("metaspace", "▁日本") == " 日本".encode()
    assert BYTE_LEVEL.token_bytes(10_000) == b""


# ----------------------------------------------------------------------------------------- without the library


class CharTokenizer(PythonBackend):
    """A tokenizer in Python: a token a character."""

    def __init__(self, **kwargs) -> None:
        self._chars = [*SPECIAL, *"abcde é日👍"]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._chars)

    def get_vocab(self) -> dict[str, int]:
        return {char: i for i, char in enumerate(self._chars)}

    def _tokenize(self, text: str, **_kwargs) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._chars[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abcde é日👍", max_size=20), CUTS)
def test_a_tokenizer_in_python_works_too(text: str, cuts: list[int]) -> None:
    codec = TextCodec(CharTokenizer(chat_template="{{ messages[0].content }}!"))
    ids = codec.encode(text, add_special_tokens=False)
    assert codec.decode(ids) == text
    assert joined(texts(ids, codec, cuts)) == text
    assert b"".join(map(codec.token_bytes, ids)) == text.encode()
    assert codec.encode_prompt(Chat([{"role": "user", "content": text}]))[1] == text + "!"
    assert codec.special_token_ids == {0, 1, 2}
    # The model may have more tokens than the tokenizer.
    assert joined(texts([*ids, 999], codec)) == codec.decode([*ids, 999]) == text
    assert codec.token_bytes(999) == b""


# --------------------------------------------------------------------------------------------- from process to process

UNPICKLE = """
import pickle, sys
codec = pickle.load(sys.stdin.buffer)
assert "torch" not in sys.modules
print(codec.encode("HELLO"))
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def unpickled(codec: TextCodec, modules: Path) -> str:
    """What another process, where torch is not imported, makes of it and prints."""
    return subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        input=pickle.dumps(codec),
        capture_output=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(modules)},
    ).stdout.decode()


@pytest.mark.parametrize("name", CODECS)
def test_every_kind_of_codec_travels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    codec = CODECS[name]
    arrived = pickle.loads(pickle.dumps(codec))
    for text in CORPUS:
        assert arrived.encode(text) == codec.encode(text)
    ids = list(range(codec.vocab_size))
    assert arrived.decode(ids) == codec.decode(ids)
    assert arrived.special_token_ids == codec.special_token_ids
    assert texts(ids, arrived) == texts(ids, codec)


def test_a_codec_travels_to_a_process_without_torch(tmp_path: Path) -> None:
    codec = TextCodec.load(BUILTIN_MODEL)
    assert unpickled(codec, tmp_path) == f"{codec.encode('HELLO')}\n"


def test_a_codec_travels_with_code_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, modules = tmp_path / "model", tmp_path / "modules"
    shutil.copytree(BUILTIN_MODEL, folder)
    (folder / "own_tokenizer.py").write_text(OWN_TOKENIZER)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    codec = TextCodec.load(folder, trust_remote_code=True)
    assert type(codec._tokenizer).__name__ == "OwnTokenizer"
    assert unpickled(codec, modules) == f"{codec.encode('HELLO')}\n"
