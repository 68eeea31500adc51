"""The start as people see it."""

import logging
import queue

from nanoserve.cli.loading import Loading
from nanoserve.request import Fact, Stage


def test_without_a_terminal_each_stage_is_a_log_line_once(caplog):
    caplog.set_level(logging.INFO)
    with Loading(None) as loading:
        for share in (0.0, 0.5):
            loading.report(Stage("reading the weights", share))
        loading.report(Stage("warming up"))
    assert [record.message for record in caplog.records] == ["reading the weights", "warming up"]


def test_facts_stand_in_columns():
    loading = Loading(None)
    loading.report(Fact("model", "M"))
    loading.report(Fact("KV cache", "one\ntwo"))
    assert loading.summary() == "  model     M\n  KV cache  one\n            two"


class Line:
    """A status line that tells what it shows."""

    def __init__(self):
        self.shown = queue.Queue()

    def show(self, status):
        self.shown.put(status)


def test_on_a_terminal_a_bar_shows_the_share_and_goes_away():
    line = Line()
    with Loading(line) as loading:
        loading.report(Stage("reading the weights", 0.5))
        while not (shown := line.shown.get(timeout=10)).startswith("reading"):
            pass
        assert shown.startswith(f"reading the weights [{'#' * 15}{'.' * 15}]  50%  ")
        loading.report(Stage("warming up"))
        while not (shown := line.shown.get(timeout=10)).startswith("warming up  "):
            pass
    last = ""
    while not line.shown.empty():
        last = line.shown.get()
    assert last == ""


def test_on_a_terminal_log_lines_stand_above_the_progress_and_the_summary_after_it(on_terminal):
    terminal = on_terminal("serve", "--grpc-port", "0", "--http-port", "0", "--max-num-seqs", "4")
    terminal.wait_for("not ready yet: loading nanoserve-builtin\r\n")
    terminal.wait_for("\r\x1b[Kimporting torch and transformers")
    terminal.wait_for("\r\x1b[Kready after")
    summary = terminal.wait_for("without keys")
    for words in (
        "Qwen3ForCausalLM, 5.4 M parameters",
        "blocks = ",
        " sequences of 2048 tokens",
        "at most 4 sequences",
    ):
        assert words in summary
    terminal.type("\x03")
    terminal.wait_for("stopped")
    assert terminal.wait_for_exit() == 0


def test_in_a_log_the_summary_follows_the_line_that_says_ready(served):
    served.wait_for("without keys")
    log = "".join(served.log)
    assert "\x1b" not in log
    stages = [
        "not ready yet: loading",
        "importing torch",
        "reading the weights",
        "warming up",
        "ready after",
        "KV cache",
    ]
    assert stages == sorted(stages, key=log.index)
