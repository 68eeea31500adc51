"""Flags to options, and the command line's clear refusals."""

import argparse
import dataclasses
import typing

import pytest

from nanoserve.cli import add_options, main, parse_size, read_options
from nanoserve.config import ConfigError, Options, flag_of


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_options(parser.parse_args(argv))


def test_without_flags_the_options_are_the_defaults():
    assert parse() == Options()


def test_every_field_has_a_flag_with_help_that_reaches_it():
    samples = {int: "70", int | None: "70", float: "2.5", str: "cpu", str | None: "abc"}
    for section in dataclasses.fields(Options):
        section_type = typing.get_type_hints(Options)[section.name]
        hints = typing.get_type_hints(section_type)
        for each in dataclasses.fields(section_type):
            assert each.metadata["help"].endswith("."), each.name
            hint = hints[each.name]
            flag = flag_of(each)
            if hint is bool:
                argv = [flag]
            elif typing.get_origin(hint) is typing.Literal:
                argv = [flag, typing.get_args(hint)[-1]]
            elif flag.startswith("--"):
                argv = [flag, samples.get(hint, "file.pem")]
            else:
                argv = ["some/model"]
            if flag == "--max-num-seqs":
                argv += ["--max-num-batched-tokens", "100"]
            value = getattr(getattr(parse(*argv), section.name), each.name)
            assert value != each.default, flag


@pytest.mark.parametrize(
    ("text", "count"), [("1000", 1000), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("3kib", 3072), ("1gb", 10**9)]
)
def test_sizes_have_units(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2TB", "1,5MB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block-size", "0"], "--block-size is 0; it must be at least 1"),
        (["--kv-memory", "0"], "--kv-memory is 0"),
        (["--max-context-tokens", "1"], "at least 2"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "below --max-num-seqs"),
        (["--grpc-port", "65536"], "at most 65535"),
        (["--step-timeout", "nan"], "--step-timeout is nan"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(argv, words, capsys):
    with pytest.raises(ConfigError, match=words):
        parse(*argv)
    assert main(["serve", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["serve", "--no-such-flag"], ["serve", "--dtype", "float8"]])
def test_unknown_commands_and_flags_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert "usage: nanoserve" in capsys.readouterr().err
