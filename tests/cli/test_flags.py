"""Flags that are made from options."""

import pytest

from nanoserve.cli import main
from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.sources import Choices
from nanoserve.config import ENGINE_SECTIONS, SERVE_SECTIONS, Options, settings

SAMPLES = {int: "70", "size": "70", float: "2.5", "speculate": "ngram:3"}


def parse(*argv, **options):
    parser = Parser("nanoserve test")
    add_options(parser, **options)
    return Choices.of(parser.parse_args(argv)).options()


def test_without_flags_the_options_are_the_defaults():
    assert parse() == Options()


@pytest.mark.parametrize("setting", settings(*SERVE_SECTIONS), ids=lambda s: s.name)
def test_every_option_has_a_flag_that_reaches_it(setting):
    value = setting.choices[-1] if setting.choices else SAMPLES.get(setting.name, SAMPLES.get(setting.kind, "cpu"))
    argv = [value] if setting.is_positional else [setting.flag, value]
    if setting.kind is bool:
        argv = [setting.flag]
    if setting.name == "max-num-seqs":
        argv += ["--max-num-batched-tokens", "100"]
    assert getattr(getattr(parse(*argv), setting.section), setting.field) != setting.default


def test_the_opposite_of_a_switch_turns_it_back():
    assert not parse("--no-compile").model.compile
    assert parse("--no-compile", "--compile").model.compile
    assert not parse("--trust-remote-code", "--no-trust-remote-code").model.trust_remote_code


def test_the_model_may_be_a_flag_where_something_else_stands_alone():
    assert parse("--model", "a/b", sections=ENGINE_SECTIONS, has_positional=False).model.path == "a/b"


@pytest.mark.parametrize("flag", ["--max-num", "--host"])
def test_flags_are_not_abbreviated_and_sections_not_asked_for_have_none(flag, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "1", sections=ENGINE_SECTIONS)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    lines = capsys.readouterr().out.partition("Examples:")[0].splitlines()
    assert max(map(len, lines)) <= 60
    assert [line for line in lines if line.endswith("-")] == []  # a flag in two parts
