"""What the output must be, as flags: each reaches the request, and a wrong one is one line."""

import json

import pytest
from nanoserve_client import ConstraintOptions
from nanoserve_client.requests import generate_request
from nanoserve_client.v1 import generation_pb2 as pb
from reference.flags import render

from nanoserve.cli.constraint import CONSTRAINT_FLAGS, RELAXED_FLAG, add_constraint, read_constraint
from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import CommandError

CITY = {"type": "object", "properties": {"name": {"enum": ["Bonn", "Rome"]}}, "required": ["name"]}
UNIQUE = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
GREEDY = ("--temperature", "0", "--max-tokens", "200")


@pytest.fixture
def file(tmp_path):
    """Writes a file, and returns its path."""

    def write(text):
        path = tmp_path / "constraint"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


def parse(*argv):
    parser = Parser("nanoserve test")
    add_constraint(parser)
    return read_constraint(parser.parse_args(argv))


def test_every_option_of_the_client_has_a_flag_on_the_page():
    given = {told["dest"] for told in CONSTRAINT_FLAGS.values()} | {"relaxed"}
    # A terminal shows all that is generated.
    assert given == ConstraintOptions.__optional_keys__ - {"from_start"}
    for flag, told in CONSTRAINT_FLAGS.items():
        assert f"`{flag}" in render()
        assert told["help"] in render()
    assert RELAXED_FLAG in render()


def test_every_flag_reaches_the_request(file):
    text = json.dumps(CITY)
    cases = [
        (["--schema", file(CITY)], pb.Constraint(json_schema=text)),
        (["--schema", file(CITY), "--relaxed"], pb.Constraint(json_schema=text, relaxed=True)),
        (["--json-object"], pb.Constraint(json_object=True)),
        (["--regex", "a+"], pb.Constraint(regex="a+")),
        (["--choice", "a", "--choice", "b c"], pb.Constraint(choices=pb.Choices(texts=["a", "b c"]))),
    ]
    for argv, constraint in cases:
        assert generate_request("x", parse(*argv)).constraint == constraint
    assert generate_request("x", parse("--grammar", file('start: "a"'))).constraint == pb.Constraint(
        grammar='start: "a"'
    )
    assert parse() == {}


def test_a_file_that_is_no_constraint_is_named(file, tmp_path):
    for argv, words in (
        (["--schema", "/no/city.json"], "cannot read /no/city.json: No such file or directory"),
        (["--grammar", str(tmp_path)], f"cannot read {tmp_path}: Is a directory"),
        (["--schema", path := file('{"type": ')], f"{path} is not JSON: Expecting value: line 1 column 10"),
        (["--relaxed"], "--relaxed is for --schema"),
    ):
        with pytest.raises(CommandError) as caught:
            parse(*argv)
        assert str(caught.value).startswith(words)
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(CommandError, match="latin is not UTF-8"):
        parse("--schema", str(tmp_path / "latin"))


def test_of_two_constraints_both_are_named(capsys):
    with pytest.raises(SystemExit):
        parse("--regex", "a", "--choice", "b")
    assert "argument --choice: not allowed with argument --regex" in capsys.readouterr().err


def test_outputs_of_generate_are_what_the_flags_say(command, target, file):
    generate = ("generate", "--target", target, *GREEDY, "A city:")
    done = command(*generate, "--schema", file(CITY), "--json")
    [completion] = json.loads(done.stdout)["completions"]
    assert json.loads(completion["text"])["name"] in ("Bonn", "Rome")
    assert completion["constraint_outcome"] == "satisfied"
    assert (done.returncode, done.stderr) == (0, "")
    done = command(*generate, "--choice", "Bonn", "--choice", "Rome", "--n", "2")
    assert done.stdout.count("Bonn\n") + done.stdout.count("Rome\n") == 2


def test_an_output_that_is_not_what_it_must_be_is_told_of(command, target, file):
    generate = ("generate", "--target", target, *GREEDY, "A city:")
    done = command(*generate, "--regex", "[a-z]{9}", "--max-tokens", "1")
    assert done.stderr == ("nanoserve: prompt 'A city:': the output is cut off before it is what it must be (length)\n")
    assert done.returncode == 1
    done = command(*generate, "--schema", file(UNIQUE))
    assert "/uniqueItems cannot be enforced" in done.stderr
    assert done.returncode == 1
    done = command(*generate, "--schema", file(UNIQUE), "--relaxed")
    assert json.loads(done.stdout) == [1, 1]
    assert "the output breaks the schema, of which this was only checked: /uniqueItems" in done.stderr
    assert done.returncode == 1


def test_what_cannot_be_read_is_said_before_a_model_is_loaded(command):
    done = command("generate", "Hello", "--model", "/no/model", "--schema", "/no/city.json")
    assert done.stderr == "nanoserve: cannot read /no/city.json: No such file or directory\n"
    assert done.returncode == 2


def test_every_answer_of_a_chat_is_what_the_flags_say(command, target, file):
    chat = ("chat", "--target", target, *GREEDY)
    done = command(*chat, "--choice", "Bonn", stdin="a\nb\n")
    assert done.stdout == "Bonn\nBonn\n"
    assert "limit" not in done.stderr
    done = command(*chat, "--schema", file(UNIQUE), "--relaxed", stdin="a\n")
    assert done.stderr.endswith(", breaks the schema]\n")
