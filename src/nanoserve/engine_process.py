"""The step loop in a process of its own, for `nanoserve serve`: both ends of the pipe.

    event loop ── post ──▶ writer thread ══╗              ╔══▶ reader thread ── post ──▶ EngineCore
               ◀─ deliver ── on readable ══╝     pipe     ╚═══ sender thread ◀── events of a step, engine thread

In one process Python's interpreter lock would make gRPC and the engine wait for each other: with 100 streams of a small
model on two cores that cost a tenth of the throughput. Requests and events are plain data, so all that changes is how
they travel. If the server dies, the pipe closes and the engine ends itself; if the engine dies, the server hears of it
as of the end of a thread. This module imports torch in the engine's process only.
"""

import contextlib
import gc
import logging
import logging.handlers
import os
import queue
import signal
import subprocess
import sys
import threading
from asyncio import AbstractEventLoop, get_running_loop
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as make_pipe
from typing import Any, TypeAlias

from nanoserve.checkpoint import check_path
from nanoserve.config import ConfigError, Options
from nanoserve.engine.core import CoreState, Deliver, EngineCore
from nanoserve.engine.engine import Engine, ServedModel
from nanoserve.engine.text import TextCodec
from nanoserve.observer import Observers
from nanoserve.request import EngineEnded, Event, Fact, Message, Report, Stage

# Anything that can be pickled, both ways.
Pipe: TypeAlias = "Connection[Any, Any]"

# Steps, and lines of the log, that wait to be sent. More are made only for a server that has stood still for seconds;
# then the engine waits for it, rather than fill the memory.
MAX_UNSENT = 1000

# ------------------------------------------------------------------------------------------------- the server's end


def start_engine(
    process: "EngineProcess", options: Options, report: Report, observers: Observers | None = None
) -> Engine:
    """An engine whose steps run in a process of their own, warm but not started. Takes as long as the model does.

    process: launched with these options; whoever did so kills it in the end.
    observers: of its requests and steps; None = nobody watches.
    Raises ConfigError.
    """
    # Meanwhile; it takes a while, too, and the codec will need it.
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    codec, model, state = process.wait_until_ready(report)
    return Engine(
        RemoteCore(process, state),
        codec,
        model,
        max_waiting=options.scheduler.max_waiting,
        step_timeout_s=options.server.step_timeout_s,
        observers=observers,
    )


class EngineProcess:
    """The process and our end of its pipe. One thread at a time may receive, and one send.

    It begins at once, and ends when its pipe does, at the latest with this process.
    """

    def __init__(self, options: Options) -> None:
        """Raises ConfigError if the model's path is none."""
        check_path(options.model)
        self.pipe, theirs = make_pipe()
        with theirs:
            # Not "-m": what it sends would be of a module named __main__.
            code = f"from nanoserve.engine_process import main; main({theirs.fileno()})"
            # Nor may what lies in the working directory stand for a module: -P.
            command = [sys.executable, "-P", "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        with contextlib.suppress(OSError):  # it died at once; `wait_until_ready` hears of it
            self.pipe.send((options, logging.getLogger().level))

    def wait_until_ready(self, report: Report) -> tuple[TextCodec, ServedModel, CoreState]:
        """Pass on how the start goes, and return what it ends with. Raises ConfigError if it comes to no end."""
        while True:
            try:
                said = self.pipe.recv()
            except (EOFError, OSError):
                raise ConfigError(f"the engine's process died while it loaded the model: {self._fate()}") from None
            match said:
                case logging.LogRecord():
                    _log(said)
                case Stage() | Fact():
                    report(said)
                case ConfigError():
                    raise said
                case codec, model, state:
                    return codec, model, state

    def kill(self) -> None:
        """End it, if it has not ended, and close the pipe."""
        self._process.kill()
        self.pipe.close()
        self._process.wait()

    def _fate(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "it was killed, as the system does when memory runs out"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}; its error is above"


def _log(record: logging.LogRecord) -> None:
    """As if it had been written in this process."""
    logging.getLogger(record.name).handle(record)


class RemoteCore:
    """A Core whose EngineCore runs in the engine's process. Event loop only.

    The state is that of the last step whose events have arrived.
    """

    def __init__(self, process: EngineProcess, state: CoreState) -> None:
        self.state = state
        self.is_alive = True
        self._process = process
        # "stop" = let the core stop, "ended" = it has.
        self._to_send: queue.SimpleQueue[Message | str] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="nanoserve-pipe", daemon=True)

    def start(self, deliver: Deliver) -> None:
        """Call it on the event loop that will serve."""
        loop = get_running_loop()
        loop.add_reader(self._process.pipe.fileno(), self._read, loop, deliver)
        self._writer.start()

    def post(self, message: Message) -> None:
        self._to_send.put(message)

    def stop(self) -> None:
        self._to_send.put("stop")

    def _read(self, loop: AbstractEventLoop, deliver: Deliver) -> None:
        """A step's events have arrived, or a line for the log, or the pipe's end."""
        events: list[Event] = [EngineEnded()]
        with contextlib.suppress(EOFError, OSError):
            said = self._process.pipe.recv()
            if isinstance(said, logging.LogRecord):
                _log(said)
                return
            events, self.state = said
        if any(isinstance(event, EngineEnded) for event in events):
            loop.remove_reader(self._process.pipe.fileno())
            self.is_alive = False
            self._to_send.put("ended")
        deliver(events)

    def _write(self) -> None:
        """A thread, because a long prompt fills the pipe until it is read."""
        while (message := self._to_send.get()) != "ended":
            with contextlib.suppress(OSError):  # the process has died, and `_read` hears of it
                self._process.pipe.send(message)


# ------------------------------------------------------------------------------------------------- the engine's end


class _Speaker(logging.handlers.QueueHandler):
    """Tells the server how the start goes, what to log, and what came of steps. Any thread.

    A thread of its own writes into the pipe, so that no step waits for a server that has no time to read.
    """

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(queue.SimpleQueue())  # not used: `enqueue` is ours
        self._pipe = pipe
        self._unsent: queue.Queue[object] = queue.Queue(MAX_UNSENT)
        self._sender = threading.Thread(target=self._send, name="nanoserve-sender", daemon=True)
        self._sender.start()

    def say(self, what: object) -> None:
        """Have it sent, in order."""
        self._unsent.put(what)

    def finish(self) -> None:
        """Return when all has been sent. Nothing may be said after this."""
        self._unsent.put(None)
        self._sender.join()

    def _send(self) -> None:
        while (what := self._unsent.get()) is not None:
            with contextlib.suppress(OSError):  # the server is gone, and nobody must hear it
                self._pipe.send(what)

    def enqueue(self, record: logging.LogRecord) -> None:
        """A line of the log, which QueueHandler has made fit to travel."""
        self.say(record)


def main(descriptor: int) -> None:
    """Build the core, say so, and run it until it is stopped."""
    # Ctrl-C on a terminal goes to both processes; the server decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is imported and loaded stays: to look for garbage among it would take a quarter of the imports' time now, and
    # hold up a step for tenths of a second later.
    gc.disable()
    pipe: Pipe = Connection(descriptor)
    options, log_level = pipe.recv()
    speaker = _Speaker(pipe)
    # Not basicConfig, which would dress the lines up already here.
    logging.getLogger().addHandler(speaker)
    logging.getLogger().setLevel(log_level)
    core: Future[EngineCore] = Future()
    threading.Thread(target=_obey, args=(pipe, core), name="nanoserve-pipe", daemon=True).start()
    try:
        _run(options, speaker, core)
    finally:
        speaker.finish()


def _run(options: Options, speaker: _Speaker, core: "Future[EngineCore]") -> None:
    from nanoserve.build import build_core  # torch, which the server does without

    try:
        built = build_core(options, report=speaker.say)
    except ConfigError as error:
        speaker.say(ConfigError(str(error)))  # not one of those classes that the server would need torch for
        return
    gc.freeze()
    gc.enable()
    speaker.say((built.codec, built.model, built.core.state))
    built.core.start(lambda events: speaker.say((events, built.core.state)))
    core.set_result(built.core)
    built.core.wait_until_ended()


def _obey(pipe: Pipe, core: "Future[EngineCore]") -> None:
    """Hand over what the server sends; end with it, also while the model loads."""
    try:
        while (message := pipe.recv()) != "stop":
            core.result().post(message)
        core.result().stop()
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)
