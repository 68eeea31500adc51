"""What cannot be served is one line that says why, exit code 2, and no traceback."""

import io
import json
import shutil

import pytest

from nanoserve.cli import main
from nanoserve.config import BUILTIN_MODEL


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def truncate_and_hide_dtype(folder):
    truncate(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "falcon"}')


def invent_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "nonsense"}')


def see_pictures(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "model.safetensors").unlink()


def drop_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.fixture
def refuse(capfd):
    """Runs the command in this process, where torch is imported only once, and checks that it is refused."""

    def run(words, *arguments):
        code = main(list(arguments))
        check_refusal(code, capfd.readouterr().err, words)

    return run


def check_refusal(code, error, words):
    [line] = [line for line in error.splitlines() if " INFO " not in line]
    assert line.startswith("nanoserve: ")
    assert words in line
    assert code == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "there is no folder"),
        (truncate, "incomplete metadata, file not fully covered"),
        (truncate_and_hide_dtype, "incomplete metadata, file not fully covered"),
        (scramble, "cannot be read: Error while deserializing header"),
        (pickle, "found only pytorch_model.bin, which are not loaded"),
        (change_architecture, "falcon cannot be served: its attention cannot be replaced"),
        (invent_architecture, "nonsense cannot be served: transformers"),
        (see_pictures, "vit cannot be served: it is no language model that writes text"),
        (drop_tokenizer, "has no tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_served(damage, words, refuse, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN_MODEL, folder)
    damage(folder)
    refuse(words, "generate", "Hello!", "--model", str(folder))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-memory", "900GiB"], "a KV cache of 900 GiB was asked for"),
        (["--kv-memory", "10KB"], "the KV cache of 10000 bytes"),
        (["--max-context-tokens", "999999"], "the model's limit is 2048"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_a_machine_that_has_not_what_is_asked_for(arguments, words, refuse):
    refuse(words, "generate", "Hello!", *arguments)


def test_a_port_in_use(refuse, target):
    refuse(
        f"cannot listen on {target}: Address already in use; --grpc-port and --host choose where",
        "serve",
        "--http-port",
        "0",
        "--grpc-port",
        target.rpartition(":")[2],
    )


def test_a_wrong_configuration(refuse, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("max-num-seq = 3")
    refuse("there is no option 'max-num-seq'", "serve", "--config", str(file))
    missing = str(tmp_path / "missing.pem")
    refuse("cannot read", "serve", "--grpc-port", "0", "--http-port", "0", "--tls-cert", missing, "--tls-key", missing)


def test_where_a_wrong_value_comes_from_is_said_once(capfd, monkeypatch):
    monkeypatch.setenv("NANOSERVE_BLOCK_SIZE", "0")
    check_refusal(main(["generate", "Hello!"]), error := capfd.readouterr().err, "--block-size is 0")
    assert error.count("(block-size comes from NANOSERVE_BLOCK_SIZE)") == 1


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_model_in_this_process_is_refused_in_the_same_way(name, refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOSERVE_MODEL", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!"))
    refuse("has no config.json: it is not a model in Hugging Face format (model comes from NANOSERVE_MODEL)", name)


def test_a_server_whose_engine_refuses_ends_in_the_same_way(command, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN_MODEL, folder)
    truncate(folder)
    done = command("serve", str(folder), "--grpc-port", "0", "--http-port", "0")
    check_refusal(done.returncode, done.stderr, "incomplete metadata, file not fully covered")
