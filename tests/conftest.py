"""What holds for all tests."""

import os
import signal

import pytest

# Tiny models compute faster on one thread than two threads agree on who does what; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["servers"]

# Files that take longest. Workers take files in order, and with these first they end at about the same time.
LONGEST = ("test_docs.py", "test_serve.py", "test_mishaps.py", "test_compiled.py", "test_abuse.py", "test_wheel.py")


def pytest_configure() -> None:
    """Shells start in the background what shall not hear Ctrl-C. Tests press it, and would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
