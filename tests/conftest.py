"""What holds for all tests."""

import os

# Tiny models compute faster on one thread than two threads agree on who does what; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
