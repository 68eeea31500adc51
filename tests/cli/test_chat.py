"""A conversation on a terminal, as a person has it, and through pipes."""

import json
import time

import pytest
from nanoserve_client import Client

from nanoserve.cli.chat import Chat, Pace

PROMPT = "> \x1b[0m"
ENDLESS = ("--ignore-eos", "--max-tokens", "1500")


@pytest.fixture
def chat(on_terminal, target):
    """Starts a chat with the server, on a terminal that shows a prompt."""

    def start(*arguments):
        terminal = on_terminal("chat", "--target", target, "--temperature", "0", *arguments)
        terminal.wait_for("nanoserve-builtin, context of 2048 tokens. /help lists commands, Ctrl-D leaves.")
        terminal.wait_for(PROMPT)
        return terminal

    return start


def test_an_answer_streams_with_its_pace_and_ctrl_d_leaves(chat):
    terminal = chat()
    terminal.type("What is paged attention?\r")
    terminal.wait_for("fixed-size blocks")
    assert "tokens, first after" in terminal.wait_for("tokens/s]")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.wait_for_exit() == 0


def test_the_time_to_the_first_token_begins_before_the_request_is_sent(monkeypatch):
    order = []

    class WatchedPace(Pace):
        def __init__(self):
            order.append("clock")
            super().__init__()

    class EmptyStream:
        def __iter__(self):
            return iter([])

        def cancel(self):
            pass

    class WatchedClient:
        def chat(self, _messages):
            order.append("sent")
            return EmptyStream()

    monkeypatch.setattr("nanoserve.cli.chat.Pace", WatchedPace)
    Chat(WatchedClient(), {}, None).take("Hello!")
    assert order == ["clock", "sent"]


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, target):
    terminal = chat(*ENDLESS)
    terminal.type("Hello!\r")
    terminal.wait_for("I am")
    terminal.type("\x03")
    terminal.wait_for(", stopped]")
    terminal.wait_for(PROMPT)
    deadline = time.monotonic() + 20
    with Client(target) as client:
        while client.get_stats().running:
            assert time.monotonic() < deadline
    terminal.type("/help\r")
    terminal.wait_for("/save FILE")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.wait_for_exit() == 0


def test_ctrl_c_at_the_prompt_throws_the_line_away(chat):
    terminal = chat()
    terminal.type("/nonsense")
    terminal.wait_for("/nonsense")
    # Python's readline may miss a Ctrl-C that comes before it waits for the next key; people press it again.
    terminal.type("\x03")
    while not terminal.has(PROMPT, within_s=5):
        terminal.type("\x03")
    terminal.type("/reset\r")
    assert "no command" not in terminal.wait_for("The conversation is forgotten.")


def test_the_conversation_is_remembered_saved_and_forgotten(chat, tmp_path):
    terminal = chat("--system", "Be short.", "--max-tokens", "5")
    path = tmp_path / "conversation.json"
    terminal.type("Hello!\r")
    terminal.wait_for("ended by its limit (length)]")
    terminal.type(f"/save {path}\r")
    terminal.wait_for(f"Saved to {path}.")
    system, question, answer = json.loads(path.read_text())
    assert system == {"role": "system", "content": "Be short."}
    assert question == {"role": "user", "content": "Hello!"}
    assert answer["role"] == "assistant"
    assert answer["content"]
    terminal.type(f"/save {path}\r")
    terminal.wait_for("File exists")
    terminal.type("/save /dev/full/x\r")
    terminal.wait_for("cannot write /dev/full/x")
    terminal.type("/system\r")
    terminal.wait_for("There are no instructions.")
    terminal.type("/reset\r")
    terminal.wait_for("The conversation is forgotten.")
    terminal.type(f"/save {tmp_path}/empty.json\r")
    terminal.wait_for("Saved to")
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_a_conversation_that_outgrows_the_context_says_what_to_do(chat):
    terminal = chat("--max-tokens", "5")
    terminal.type("Hello!\r")
    terminal.wait_for("tokens/s")
    terminal.wait_for(PROMPT)
    # A terminal takes at most 4095 characters a line, unless readline reads it.
    terminal.type("a b c d e f g " * 300 + "\r")
    terminal.wait_for("CONTEXT_LENGTH_EXCEEDED")
    terminal.wait_for("/reset begins anew.")
    terminal.wait_for(PROMPT)
    terminal.type("Hello!\r")
    terminal.wait_for("tokens/s")


def test_a_pasted_text_of_several_lines_is_one_message(chat, tmp_path):
    terminal = chat("--max-tokens", "3")
    terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
    terminal.wait_for("(length)]")
    terminal.type(f"/save {tmp_path}/pasted.json\r")
    terminal.wait_for("Saved to")
    assert json.loads((tmp_path / "pasted.json").read_text())[0]["content"] == "one\ntwo"


def test_lines_come_back_with_the_up_arrow_in_the_next_chat_and_are_nobody_elses(chat, tmp_path):
    terminal = chat()
    terminal.type("/nonsense\r")
    terminal.wait_for("There is no command /nonsense.")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    terminal.wait_for_exit()
    assert (tmp_path / ".nanoserve_history").stat().st_mode & 0o777 == 0o600
    terminal = chat()
    terminal.type("\x1b[A\r")
    terminal.wait_for("There is no command /nonsense.")


def test_a_model_in_this_process_is_loaded_with_its_progress_and_talked_to(on_terminal):
    terminal = on_terminal("chat", *ENDLESS, "--temperature", "0")
    terminal.wait_for("importing torch")
    terminal.wait_for(PROMPT)
    terminal.type("Hello!\r")
    terminal.wait_for("I am")
    terminal.type("\x03")
    terminal.wait_for(", stopped]")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.wait_for_exit() == 0


def test_ctrl_c_while_the_model_loads_ends_the_program(on_terminal):
    terminal = on_terminal("chat")
    terminal.wait_for("importing torch")
    terminal.type("\x03")
    assert terminal.wait_for_exit() == 130


def test_through_pipes_the_output_is_the_answers_alone(command, target):
    done = command("chat", "--target", target, "--temperature", "0", stdin="What is TTFT?\n\nHello!\n")
    first, second = done.stdout.splitlines()
    assert "first token" in first
    assert second.startswith("Hello!")
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == 0


def test_through_pipes_a_failure_is_in_the_exit_code(command, target):
    done = command("chat", "--target", target, "--top-p", "2", stdin="Hello!\n")
    assert "top_p: 2 is not allowed" in done.stderr
    assert done.stdout == ""
    assert done.returncode == 1
