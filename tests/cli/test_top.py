"""`nanoserve top` on a terminal, through a pipe, and where there is nothing to see."""

import re
import signal
import subprocess

import pytest
from nanoserve_client import Client
from nanoserve_client.results import Stats
from nanoserve_client.watching import (
    EngineSnapshot,
    QueueWait,
    SequencePhase,
    SequenceSnapshot,
    StepSnapshot,
    WaitReason,
)
from serve_process import NANOSERVE
from servers import USERS

from nanoserve.cli import top


@pytest.fixture
def watching(on_terminal, target):
    terminal = on_terminal("top", "--target", target, "--interval", "0.1")
    terminal.wait_for("\x1b[?1049h")
    return terminal


def test_it_shows_sequences_and_blocks_until_q(watching, target):
    with Client(target) as client:
        stream = client.generate("Once upon a time", max_tokens=1000, ignore_eos=True, request_id="my-request")
        next(stream)
        watching.wait_for("nanoserve-builtin at ")
        watching.wait_for("KV blocks, each")
        watching.wait_for("my-request")
        shown = watching.wait_for("decode")
        assert "prefix hits" in shown + watching.wait_for("prefix hits")
        stream.cancel()
    watching.type("q")
    watching.wait_for("\x1b[?1049l")
    assert watching.wait_for_exit() == 0


def test_ctrl_c_leaves_the_terminal_as_it_was(watching):
    watching.wait_for("Queue: nobody waits")
    watching.type("\x03")
    watching.wait_for("\x1b[?25h\x1b[?1049l")
    assert watching.wait_for_exit() == 0


def test_through_a_pipe_it_writes_a_line_a_snapshot_until_nobody_reads(target):
    command = f"{NANOSERVE} top --target {target} --interval 0.1 | head -3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    pattern = r"running \d+  waiting \d+  tokens/s [\d.]+  KV \d+ owned \+ \d+ cached of \d+  "
    pattern += r"prefix hits \d+%  guesses right \d+%  step .*"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert not done.stderr


def test_a_dumb_terminal_gets_lines(on_terminal, target):
    terminal = on_terminal("top", "--target", target, "--interval", "0.1", variables={"TERM": "dumb"})
    assert "\x1b" not in terminal.wait_for("preemptions")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait_for_exit() == 130


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "--target is missing"),
        (("--target", "127.0.0.1:1"), "no server is ready at 127.0.0.1:1"),
        (("--target", "127.0.0.1:1", "--interval", "0"), "it must be 0.05 to 60"),
        (("--target", "127.0.0.1:1", "--interval", "soon"), "it must be 0.05 to 60"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(command, arguments, problem):
    done = command("top", *arguments)
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2


def test_without_an_admin_key_it_says_so(command, guarded):
    done = command("top", "--target", guarded.address, "--api-key", USERS[0])
    assert "PERMISSION_DENIED" in done.stderr
    assert done.returncode == 2


# --------------------------------------------------------------------------------------------------- what is shown


def sequence(number, phase=SequencePhase.DECODE, blocks=(), **values):
    defaults = {"index": 0, "prompt_tokens": 10, "cached_tokens": 4, "computed_tokens": 10, "completion_tokens": 5}
    more = {"max_completion_tokens": 10, "age_s": 1.5, "preemptions": 0}
    more |= {"draft_tokens": 0, "accepted_draft_tokens": 0, "adapter": ""}
    return SequenceSnapshot(
        number, f"request-{number}", phase=phase, block_ids=blocks, **{**defaults, **more, **values}
    )


def snapshot(*sequences, cached=(), wait=None, total=16):
    stats = Stats(len(sequences), 1 if wait else 0, total, 3, len(cached), 16, 0.5, 0.75, 100.0, 3725.0, 2)
    step = StepSnapshot(7, 0.01, (), (), wait, 1, 1, 0, 0, False)
    return EngineSnapshot(stats, sequences, tuple(cached), (step,), 0)


def shown(taken, width=130, height=40):
    return top.screen(taken, "model at address", width, height, is_coloured=False)


def test_the_kv_map_marks_shared_owned_cached_and_free_blocks():
    taken = snapshot(sequence(1, blocks=(0, 1, 2)), sequence(2, blocks=(0, 1, 5)), cached=(3, 4))
    lines = shown(taken)
    assert "++#oo#.........." in lines
    assert "shared by sequences (2)" in "\n".join(lines)


def test_a_large_pool_shares_characters():
    lines = shown(snapshot(sequence(1, blocks=(5,)), total=2000), width=100)
    assert "each 5 blocks" in lines[3]
    assert lines[4].startswith(".#.")
    assert [len(line) for line in lines[4:8]] == [100] * 4


def test_the_queue_says_what_it_waits_for_and_behind_whom():
    wait = QueueWait(2, 0, WaitReason.BLOCKS, 1, "KV blocks behind request request-1")
    lines = shown(snapshot(sequence(1), sequence(2, SequencePhase.WAITING), wait=wait))
    assert "Queue: 1 wait, the first for KV blocks behind request request-1" in lines


def test_progress_is_of_the_prompt_and_then_of_what_may_be_generated():
    prefill = sequence(1, SequencePhase.PREFILL, computed_tokens=5, prompt_tokens=10, completion_tokens=0)
    lines = "\n".join(shown(snapshot(prefill, sequence(2, completion_tokens=5, max_completion_tokens=10))))
    assert f"{'=' * 15}{'.' * 15}" in lines
    assert f"{'#' * 15}{'.' * 15}" in lines


def test_guesses_are_told_of_each_sequence_and_of_all():
    lines = shown(snapshot(sequence(1, draft_tokens=20, accepted_draft_tokens=12), sequence(2)))
    assert "guesses right 75%" in lines[1]
    [heading] = [line for line in lines if line.startswith("REQUEST")]
    [guessing, other] = [line for line in lines if line.startswith("request-")]
    assert heading.endswith("  GUESSES  ADAPTER")
    assert guessing.endswith(" 12/20  -")
    assert other.endswith(" -  -")
    assert heading.index("GUESSES") + len("GUESSES") == len(guessing) - len("  -") == len(other) - len("  -")


def test_adapters_are_told_of_each_sequence_and_counted():
    taken = snapshot(*(sequence(i, adapter=name) for i, name in enumerate(["pirate", "", "german", "pirate"])))
    lines = shown(taken, width=150)
    assert "Adapters: pirate 2, no adapter 1, german 1" in lines
    rows = [line for line in lines if line.startswith("request-")]
    assert [row.rpartition(" ")[2] for row in rows] == ["pirate", "-", "german", "pirate"]
    assert not any(line.startswith("Adapters") for line in shown(snapshot(sequence(1))))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 3), (11, 9), (20, 6), (80, 12), (130, 50), (300, 100)])
def test_it_fits_every_terminal(width, height):
    taken = snapshot(*(sequence(i, blocks=(i,), index=i % 2) for i in range(30)), total=5000)
    lines = shown(taken, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_what_has_no_room_is_counted():
    lines = shown(snapshot(*map(sequence, range(30))), height=20)
    assert re.fullmatch(r"\.\.\. and \d+ more", lines[-1])


def test_labels_that_could_move_the_cursor_cannot_come():
    """x-request-id is printable ASCII: the server refuses the rest."""
    assert all(line.isprintable() for line in shown(snapshot(sequence(1))))
