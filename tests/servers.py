"""Server processes that many tests share: one of each kind for all tests of a run, or of each of pytest's workers.

A test leaves them as it found them, but for what is in the prefix cache.
"""

from collections.abc import Iterator

import pytest
from serve_process import ServeProcess, free_port, serving

# Of `guarded`.
USERS, ADMIN = ("one", "two"), "boss"
MAX_WAITING = 100


@pytest.fixture(scope="session")
def served() -> Iterator[ServeProcess]:
    """Over gRPC and HTTP, without keys; in float32, where greedy answers do not depend on the batch."""
    with serving("--dtype", "float32", "--no-compile", "--http-port", str(free_port())) as server:
        server.wait_until_ready_over_http()
        yield server


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """The same with keys for two users and an operator; runs one sequence at a time, and lets a hundred wait."""
    users, admins = (tmp_path_factory.mktemp("keys") / name for name in ("users", "admins"))
    users.write_text("".join(f"{user}\n" for user in ("# people", *USERS)))
    admins.write_text(f"{ADMIN}\n")
    limits = ("--max-num-seqs", "1", "--max-waiting", f"{MAX_WAITING}", "--kv-memory", "16MiB")
    keys = ("--api-keys", str(users), "--admin-keys", str(admins))
    with serving("--no-compile", "--http-port", str(free_port()), *limits, *keys) as server:
        server.wait_until_ready_over_http()
        yield server
