"""What holds for all tests."""

import os
import signal

# Tiny models compute faster on one thread than two threads agree on who does what; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["servers"]


def pytest_configure() -> None:
    """Shells start in the background what shall not hear Ctrl-C. Tests press it, and would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
