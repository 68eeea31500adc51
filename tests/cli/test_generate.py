"""Completions from the command line: where prompts come from, and what is written."""

import json
import subprocess
from pathlib import Path

import pytest
from nanoserve_client import Client
from serve_process import NANOSERVE

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture
def generate(command, target):
    """Runs `nanoserve generate` against the server."""

    def run(*arguments, **options):
        return command("generate", "--target", target, *GREEDY, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def complete(target):
    """What the client gets for a prompt."""
    with Client(target) as client:
        yield lambda prompt: client.generate(prompt, temperature=0, max_tokens=12).result().text


def test_a_prompt_is_completed_in_a_model_of_this_process(command, complete):
    done = command("generate", "Paged attention is", *GREEDY, "--dtype", "float32")
    assert done.stderr == ""
    assert done.stdout == complete("Paged attention is") + "\n"


def test_standard_input_is_one_prompt(generate, complete):
    done = generate(stdin="Paged\nattention is\n")
    assert done.stdout == complete("Paged\nattention is") + "\n"
    assert done.returncode == 0


@pytest.mark.parametrize("source", ["file", "-", "arguments"])
def test_several_prompts_are_answered_in_their_order_under_headings(source, generate, complete, tmp_path):
    prompts = [f"Block {i} of the cache" for i in range(80)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts))
    done = {
        "file": lambda: generate("--file", str(path)),
        "-": lambda: generate("--file", "-", stdin="\n".join(prompts)),
        "arguments": lambda: generate(*prompts),
    }[source]()
    headings = [line for line in done.stdout.splitlines() if line.startswith("==> ")]
    assert headings == [f"==> {prompt} <==" for prompt in prompts]
    assert f"==> {prompts[70]} <==\n{complete(prompts[70])}\n" in done.stdout


def test_prompts_may_stand_on_both_sides_of_a_flag(generate, complete):
    expected = "".join(f"==> {prompt} <==\n{complete(prompt)}\n" for prompt in ("Hello", "Block"))
    assert generate("Hello", "--seed", "5", "Block").stdout == expected


def test_a_prompt_behind_two_dashes_may_look_like_a_flag(generate, complete):
    assert generate("--", "--chat").stdout == complete("--chat") + "\n"


def test_several_completions_of_a_prompt_have_headings(generate, complete):
    text = complete("Hello")
    assert generate("Hello", "--n", "2").stdout == f"==> Hello (1 of 2) <==\n{text}\n==> Hello (2 of 2) <==\n{text}\n"


def test_a_message_goes_through_the_chat_template(generate):
    assert "fixed-size" in generate("--chat", "What is paged attention?", "--max-tokens", "40").stdout


def test_a_line_of_json_for_each_prompt_has_all_of_the_result(generate, complete):
    done = generate("Hello", "Block", "--json", "--seed", "5", "--logprobs", "1")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("Hello", "Block")
    assert first["completions"][0]["text"] == complete("Hello")
    assert first["completions"][0]["finish_reason"] == "length"
    assert len(first["completions"][0]["logprobs"]) == first["usage"]["completion_tokens"] == 12
    assert first["started"]["sampling"]["seed"] == 5


def test_a_request_that_fails_is_told_of_and_the_others_are_answered(generate, complete):
    long = "word " * 3000
    done = generate(long, "Hello")
    assert f"==> Hello <==\n{complete('Hello')}\n" == done.stdout
    assert done.stderr.startswith("nanoserve: prompt 'word word")
    assert "CONTEXT_LENGTH_EXCEEDED" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1
    done = generate(long, "--json")
    assert "CONTEXT_LENGTH_EXCEEDED" in json.loads(done.stdout)["error"]


def test_a_value_out_of_range_is_told_of(generate):
    done = generate("Hello", "--top-p", "2")
    assert "top_p: 2 is not allowed; allowed: 0 to 1" in done.stderr
    assert done.returncode == 1
    done = generate("Hello", "--top-k", "-1")
    assert "a value does not fit its parameter: top_k is -1: " in done.stderr
    assert done.returncode == 2
    done = generate("Hello", "--time-limit", "1e30")
    assert "a value does not fit its parameter: time_limit is 1e+30: " in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["Hello", "--file", "x"], "", "not both"),
        (["--file", "/no/prompts.txt"], "", "cannot read /no/prompts.txt: No such file"),
        ([], "", "there is no prompt: the input is empty"),
        (["Hello", "--dtype", "float32"], "", "--dtype would change nothing: --target"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, stdin, words, generate):
    done = generate(*arguments, stdin=stdin)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_no_prompt_on_a_terminal_is_said_instead_of_waiting_for_one(on_terminal):
    terminal = on_terminal("generate")
    terminal.wait_for("there is no prompt: give one as an argument, through a pipe, or with --file")
    assert terminal.wait_for_exit() == 2


def test_what_is_for_a_server_elsewhere_is_refused_without_one(command):
    done = command("generate", "Hello", "--api-key", "key")
    assert done.stderr == ("nanoserve: --api-key would change nothing without --target: the model is in this process\n")
    assert done.returncode == 2


def test_a_server_that_is_not_there_is_one_line(command):
    done = command("generate", "Hello", "--target", "127.0.0.1:1")
    assert "no server is ready at 127.0.0.1:1" in done.stderr
    assert "`nanoserve serve` starts one" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_a_reader_that_leaves_ends_the_command_without_a_word(target, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Hello\n" * 2000)
    command = [NANOSERVE, "generate", "--target", target, *GREEDY, "--file", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "==> Hello <==\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_full_disk_is_one_line(generate):
    with Path("/dev/full").open("w") as full:
        done = generate("Hello", stdout=full)
    assert done.stderr == "nanoserve: cannot write to standard output: No space left on device\n"
    assert done.returncode == 2
