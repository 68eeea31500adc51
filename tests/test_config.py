"""Options: each has one name, help, and values that are checked."""

import dataclasses
import re
from pathlib import Path

import pytest

from nanoserve.config import (
    BUILTIN_ADAPTERS,
    BUILTIN_DRAFT,
    SECTIONS,
    AdapterOptions,
    ClientOptions,
    ConfigError,
    ModelOptions,
    Options,
    SchedulerConfig,
    ServerConfig,
    format_size,
    parse_size,
    settings,
)

ALL = settings(*SECTIONS)


def test_every_option_has_a_name_of_its_own_and_help_in_sentences():
    assert len({each.name for each in ALL}) == len(ALL) == sum(len(dataclasses.fields(s)) for s in SECTIONS.values())
    for each in ALL:
        assert each.help.endswith("."), each.name


def test_a_switch_that_is_on_by_default_says_no():
    for each in ALL:
        if each.kind is bool:
            assert each.name.startswith("no-") == each.default, each.name
            assert each.parse("true") != each.default
            assert each.parse(False) == each.default


def test_help_tells_the_default_once():
    for each in ALL:
        assert each.full_help.count("Default:") <= 1, each.name
    assert setting("block-size").full_help.endswith("Default: 16.")
    assert setting("step-timeout").full_help.endswith("Default: 60.")


def setting(name):
    return next(each for each in ALL if each.name == name)


def test_a_setting_has_one_name_everywhere():
    assert setting("max-num-seqs").flag == "--max-num-seqs"
    assert setting("max-num-seqs").variable == "NANOSERVE_MAX_NUM_SEQS"
    assert setting("no-compile").opposite == "--compile"
    assert setting("trust-remote-code").opposite == "--no-trust-remote-code"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max-num-seqs", "8", 8),
        ("max-num-seqs", 8, 8),
        ("step-timeout", "2.5", 2.5),
        ("step-timeout", 3, 3),
        ("kv-memory", "2GiB", 2**31),
        ("kv-memory", 4096, 4096),
        ("dtype", "float16", "float16"),
        ("model", "owner/name", "owner/name"),
        ("tls", "on", True),
        ("no-compile", "0", True),
        ("no-compile", True, False),
    ],
)
def test_values_are_read_from_text_and_from_toml(name, value, expected):
    assert setting(name).parse(value) == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max-num-seqs", "many", "a whole number"),
        ("max-num-seqs", 1.5, "a whole number"),
        ("max-num-seqs", True, "a whole number"),
        ("step-timeout", "soon", "a number"),
        ("kv-memory", "2TB", "such as 2GiB"),
        ("dtype", "float8", "auto, float32, bfloat16 or float16"),
        ("dtype", 8, "auto, float32"),
        ("tls", "maybe", "true or false"),
        ("tls", 1, "true or false"),
        ("host", 127, "a text"),
        ("api-keys", "", "a text"),
    ],
)
def test_values_of_another_kind_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words):
        setting(name).parse(value)


@pytest.mark.parametrize(
    ("text", "count"), [("1000", 1000), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("3kib", 3072), ("1gb", 10**9)]
)
def test_sizes_have_units(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2TB", "1,5MB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="a size such as"):
        parse_size(text)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", ""])
def test_devices_that_do_not_exist_are_refused(device):
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
        Options(model=ModelOptions(device=device))


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="below --max-num-seqs"):
        Options(scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4))
    with pytest.raises(ConfigError, match="go together"):
        ClientOptions(client_key="key.pem")
    with pytest.raises(ConfigError, match="--grpc-port and --http-port are both 8000"):
        Options(server=ServerConfig(grpc_port=8000))
    Options(server=ServerConfig(grpc_port=0, http_port=0))


@pytest.mark.parametrize(
    ("speculate", "draft_model", "message"),
    [
        ("draft", None, "--speculate is 'draft'; that needs a --draft-model"),
        ("draft:4", None, "--speculate is 'draft:4'; that needs a --draft-model"),
        ("off", "builtin", "--draft-model is of no use with --speculate off; it must be auto or draft"),
        ("ngram:3", "builtin", "--draft-model is of no use with --speculate ngram:3"),
    ],
)
def test_a_draft_model_and_the_way_to_guess_go_together(speculate, draft_model, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Options(ModelOptions(draft_model=draft_model), scheduler=SchedulerConfig(speculate=speculate))


@pytest.mark.parametrize("speculate", ["auto", "auto:3", "draft", "draft:64"])
def test_a_draft_model_is_loaded_as_the_served_one_is(speculate):
    model = ModelOptions("big", revision="v1", served_name="it", dtype="float32", draft_model="small", device="cpu")
    options = Options(model, scheduler=SchedulerConfig(speculate=speculate))
    assert options.model.draft == ModelOptions("small", dtype="float32", device="cpu")
    assert ModelOptions(draft_model="builtin").draft == ModelOptions(str(BUILTIN_DRAFT))
    assert ModelOptions().draft is None


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (96 << 10, "96 KiB"), (16 << 20, "16 MiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes_are_shown_in_their_unit(num_bytes, text):
    assert format_size(num_bytes) == text


def test_the_default_of_a_size_is_shown_as_a_person_would_write_it():
    size = setting("http-max-body")
    assert size.full_help.endswith("Default: 16 MiB.")
    assert size.parse(size.shown_default) == size.default


def test_the_built_in_models_adapters_have_a_name():
    assert AdapterOptions(adapters=Path("builtin")).root == BUILTIN_ADAPTERS
    assert AdapterOptions(adapters=Path("./folder")).root == Path("folder")
    assert AdapterOptions().root is None
