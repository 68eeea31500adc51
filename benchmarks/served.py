"""A server in a process of its own, for what is measured through the network."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence


@contextlib.contextmanager
def serving(
    arguments: Sequence[str], variables: Mapping[str, str] | None = None, *, wait_until_fast: bool = False
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`nanoserve serve ARGUMENTS` on any free gRPC port: its process, and its address once it is ready.

    variables: of its environment, besides those of this process. wait_until_fast: it is ready when all that can be
    compiled is in use. Leaving the block ends it.
    """
    command = [sys.executable, "-m", "nanoserve", "serve", "--grpc-port", "0", *arguments]
    environment = {**os.environ, **(variables or {})}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            target, is_fast = "", not wait_until_fast
            for line in process.stderr:
                if ready := re.search(r"ready after .* on (\S+)", line):
                    target = ready[1]
                is_fast = is_fast or "compiled parts are in use" in line
                if target and is_fast:
                    break
            else:
                sys.exit(f"the server has ended: {line}")
            # It logs a line a request, and would stand still once they fill the pipe.
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            yield process, target
        finally:
            process.terminate()
    drain.join()
