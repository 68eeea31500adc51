"""flag > environment > file > default, and where a wrong value came from."""

import pytest

from nanoserve.cli import main
from nanoserve.cli.flags import Parser, add_options
from nanoserve.cli.sources import Choices
from nanoserve.config import ConfigError


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file; returns its path."""

    def write(text):
        path = tmp_path / "server.toml"
        path.write_text(text)
        return str(path)

    return write


def parse(*argv):
    parser = Parser("nanoserve test")
    add_options(parser)
    return parser.parse_args(argv)


def options_of(arguments):
    return Choices.of(arguments).options()


def test_a_flag_overrules_a_variable_and_a_variable_the_file(file, monkeypatch):
    config = file("block-size = 1\nmax-waiting = 1\nmax-num-seqs = 1\n")
    monkeypatch.setenv("NANOSERVE_MAX_WAITING", "2")
    monkeypatch.setenv("NANOSERVE_MAX_NUM_SEQS", "2")
    options = options_of(parse("--config", config, "--max-num-seqs", "3"))
    assert (options.cache.block_size, options.scheduler.max_waiting, options.scheduler.max_num_seqs) == (1, 2, 3)
    assert options.server.grpc_port == 50051


def test_a_flag_turns_back_what_a_file_or_variable_switched(file, monkeypatch):
    config = file("no-compile = true\nno-prefix-cache = true\n")
    monkeypatch.setenv("NANOSERVE_TRUST_REMOTE_CODE", "yes")
    options = options_of(parse("--config", config, "--compile", "--no-trust-remote-code"))
    assert options.model.compile
    assert not options.model.trust_remote_code
    assert not options.cache.enable_prefix_cache


def test_the_file_takes_every_kind_of_value(file):
    options = options_of(
        parse("--config", file('model = "a/b"\nkv-memory = "2GiB"\nstep-timeout = 3\ntls-cert = "x.pem"\n'))
    )
    assert options.model.path == "a/b"
    assert options.cache.kv_memory_bytes == 2**31
    assert options.server.step_timeout_s == 3
    assert str(options.server.tls_cert) == "x.pem"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-num-seq = 3", r"there is no option 'max-num-seq' \(did you mean 'max-num-seqs'\?\)"),
        ("max_num_seqs = 3\nxyz = 1", r"'max_num_seqs' \(did you mean 'max-num-seqs'\?\), 'xyz'"),
        ("[scheduler]\nmax-num-seqs = 3", r"section \[scheduler\]"),
        ("max-num-seqs = ", "is not valid TOML"),
        ("max-num-seqs = 'many'", "max-num-seqs in .*server.toml is 'many'; it must be a whole number"),
        ("max-num-seqs = 0", r"--max-num-seqs is 0; .* \(max-num-seqs comes from .*server.toml\)"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(file, text, words):
    with pytest.raises(ConfigError, match=words):
        options_of(parse("--config", file(text)))


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.toml: No such file"):
        options_of(parse("--config", str(tmp_path / "nothing.toml")))


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("NANOSERVE_GRPC_PORT", "http")
    with pytest.raises(ConfigError, match="NANOSERVE_GRPC_PORT is 'http'; it must be a whole number"):
        options_of(parse())


def test_an_error_names_the_origins_of_all_that_it_speaks_of_but_the_flags(monkeypatch):
    monkeypatch.setenv("NANOSERVE_MAX_NUM_BATCHED_TOKENS", "4")
    with pytest.raises(ConfigError) as failure:
        options_of(parse("--max-num-seqs", "8"))
    assert str(failure.value).endswith(" (max-num-batched-tokens comes from NANOSERVE_MAX_NUM_BATCHED_TOKENS)")


def test_an_error_that_quotes_a_value_names_its_origin(monkeypatch):
    monkeypatch.setenv("NANOSERVE_MODEL", "/no/model")
    monkeypatch.setenv("NANOSERVE_REVISION", "el")
    choices = Choices.of(parse())
    with pytest.raises(ConfigError) as failure, choices.origins_in_errors():
        raise ConfigError("there is no folder '/no/model'")
    assert str(failure.value) == "there is no folder '/no/model' (model comes from NANOSERVE_MODEL)"


def test_an_unknown_variable_is_warned_about_and_does_not_matter(monkeypatch, caplog):
    monkeypatch.setenv("NANOSERVE_MAX_SEQS", "3")
    assert options_of(parse()).scheduler.max_num_seqs == 64
    assert "NANOSERVE_MAX_SEQS is set" in caplog.text
    assert "did you mean 'NANOSERVE_MAX_NUM_SEQS'?" in caplog.text


def test_what_kubernetes_sets_for_a_service_called_nanoserve_is_none_of_ours(monkeypatch, caplog):
    for name, value in {
        "NANOSERVE_SERVICE_HOST": "10.0.0.1",
        "NANOSERVE_SERVICE_PORT": "50051",
        "NANOSERVE_SERVICE_PORT_GRPC": "50051",
        "NANOSERVE_PORT": "tcp://10.0.0.1:50051",
        "NANOSERVE_PORT_50051_TCP_ADDR": "10.0.0.1",
        # Of a service called nanoserve-grpc; ours has the same name.
        "NANOSERVE_GRPC_PORT": "tcp://10.0.0.1:50051",
    }.items():
        monkeypatch.setenv(name, value)
    assert options_of(parse()).server.grpc_port == 50051
    assert not caplog.records


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("NANOSERVE_GRPC_PORT", "")
    assert options_of(parse()).server.grpc_port == 50051


def test_what_the_command_line_says_of_some_sections_is_known(monkeypatch):
    monkeypatch.setenv("NANOSERVE_BLOCK_SIZE", "8")
    assert Choices.of(parse("a/b", "--dtype", "auto", "--host", "x")).flags("model", "cache") == ["MODEL", "--dtype"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block-size", "0"], "--block-size is 0; it must be at least 1"),
        (["--kv-memory", "0"], "--kv-memory is 0"),
        (["--kv-memory", "much"], "--kv-memory is 'much'; it must be a size"),
        (["--max-context-tokens", "1"], "at least 2"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "below --max-num-seqs"),
        (["--grpc-port", "65536"], "at most 65535"),
        (["--dtype", "float8"], "--dtype is 'float8'; it must be auto"),
        (["--step-timeout", "nan"], "--step-timeout is nan"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(argv, words, capsys):
    assert main(["serve", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
