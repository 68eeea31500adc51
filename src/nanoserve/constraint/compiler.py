"""Compiles constraints for one model, and keeps those that were used last.

submit() ──▶ cache, by SHA-256 of the constraint ── not there ──▶ queue ──▶ compile threads ◀──▶ check_process.py
                    ◀──────────────── a Future, shared by all who ask for the same ───┘
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from nanoserve.constraint.check_process import NICENESS, STACK_BYTES, CheckProcess
from nanoserve.constraint.checker import make_parser
from nanoserve.constraint.grammar import refusal
from nanoserve.constraint.matcher import Closing, Matcher
from nanoserve.constraint.vocabulary import Encode, Vocabulary
from nanoserve.errors import ConstraintInvalid, Overloaded
from nanoserve.request import Constraint, ConstraintReport

logger = logging.getLogger(__name__)

# Two, so that one hostile constraint does not hold up all others. The second begins when it is needed.
NUM_THREADS = 2
# Of a CPU's time, so that a good constraint is not refused because a machine is busy.
COMPILE_CPU_S = 10.0
# How long a request may wait for its constraint, and for those before it.
MAX_WAIT_S = 60.0
# Constraints that may wait for a thread; one more is refused.
MAX_WAITING = 64
# Of all compiled constraints that are kept, by _num_bytes.
MAX_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class CompiledConstraint:
    """A constraint that is ready for any number of sequences. Any thread.

    The matchers share a lexer, which keeps every state that one of them has come to. So it may get full, even if each
    completion needs few: then the constraint is compiled anew for whoever asks next.
    """

    report: ConstraintReport
    # At its start. Never reads a token.
    parser: LLMatcher = field(repr=False)
    # How its reasoning can be cut short, if it can.
    closing: Closing | None = field(repr=False, default=None)
    # Set once the lexer is full.
    is_worn: threading.Event = field(repr=False, default_factory=threading.Event)

    def matcher(self, token_ids: Sequence[int] = (), max_reasoning_tokens: int | None = None) -> Matcher:
        """A new one, which has read these tokens of the completion."""
        limit = None
        if max_reasoning_tokens is not None and self.closing is not None:
            limit = max_reasoning_tokens, self.closing
        return Matcher(self.parser, self.is_worn.set, token_ids, limit)

    @property
    def num_bytes(self) -> int:
        """An estimate of the memory it takes, of which the grammar's text is the best sign."""
        return BYTES_EACH + BYTES_PER_GRAMMAR_BYTE * self.report.num_grammar_bytes


# Measured over 704 schemas of MaskBench: 176 KiB each, for 1.8 KiB of grammar.
BYTES_EACH = 64 * 1024
BYTES_PER_GRAMMAR_BYTE = 64


class ConstraintCompiler:
    """Any thread. Its threads, and a process for each, begin when they are needed, and end with this process."""

    def __init__(
        self,
        make_vocabulary: Callable[[], Vocabulary],
        encode: Encode | None = None,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        """make_vocabulary: called once, on a compile thread. encode: as for Vocabulary.tokenizer."""
        self._make_vocabulary = make_vocabulary
        self._encode = encode
        self._vocabulary: tuple[Vocabulary, LLTokenizer] | None = None
        self._vocabulary_lock = threading.Lock()
        self._max_cache_bytes = max_cache_bytes
        self._lock = threading.Lock()
        # By digest, least recently used first: what is compiled, or will be.
        self._cache: OrderedDict[str, Future[CompiledConstraint]] = OrderedDict()
        # Of what is compiled: at most max_cache_bytes, but for a single one that is larger.
        self._num_cached_bytes = 0
        self._waiting: queue.SimpleQueue[tuple[str, Constraint]] = queue.SimpleQueue()
        self._num_threads = self._num_idle = 0

    def warm_up(self) -> None:
        """Get the vocabulary ready on a thread. It takes up to a second of the interpreter: no step should run yet."""
        with self._lock:
            if not self._num_threads:
                self._start_thread()

    def submit(self, constraint: Constraint) -> "Future[CompiledConstraint]":
        """The compiled constraint, when there is one. The future raises ConstraintInvalid, and is not to be cancelled:
        others may wait for it. Raises Overloaded if too many wait."""
        with self._lock:
            key = _digest(constraint)
            if (future := self._cache.get(key)) is not None:
                if not future.done() or not future.result().is_worn.is_set():
                    self._cache.move_to_end(key)
                    return future
                self._num_cached_bytes -= future.result().num_bytes
            if self._waiting.qsize() >= MAX_WAITING:
                raise Overloaded(MAX_WAITING)
            future = self._cache[key] = Future()
            # A running future cannot be cancelled.
            future.set_running_or_notify_cancel()
            self._waiting.put((key, constraint))
            self._start_thread_if_needed()
        return future

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """Wait for it. Raises ConstraintInvalid, and Overloaded, also when others are compiled for MAX_WAIT_S."""
        try:
            return self.submit(constraint).result(MAX_WAIT_S)
        except TimeoutError:
            raise waited_too_long() from None

    # ------------------------------------------------------------------------------------------------- threads

    def _start_thread_if_needed(self) -> None:
        if self._waiting.qsize() > self._num_idle and self._num_threads < NUM_THREADS:
            self._start_thread()

    def _start_thread(self) -> None:
        self._num_threads += 1
        previous = threading.stack_size(STACK_BYTES)
        try:
            name = f"nanoserve-constraint-{self._num_threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        finally:
            threading.stack_size(previous)

    def _work(self) -> None:
        if sys.platform == "linux":
            # There a thread has a niceness of its own. Steps go first where the CPUs are busy.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        process: CheckProcess | None = None
        with contextlib.suppress(Exception):  # whoever needs it hears of it
            self._ready_vocabulary()
        while True:
            with self._lock:
                self._num_idle += 1
            key, constraint = self._waiting.get()
            with self._lock:
                self._num_idle -= 1
                future = self._cache[key]
                self._start_thread_if_needed()
            try:
                vocabulary, tokenizer = self._ready_vocabulary()
                process = process or CheckProcess(vocabulary)
                compiled = self._compile(constraint, process, tokenizer)
            except Exception as error:
                if not isinstance(error, ConstraintInvalid):
                    logger.exception("a constraint could not be compiled")
                with self._lock:
                    del self._cache[key]
                future.set_exception(error)
            else:
                self._keep(key, compiled)
                future.set_result(compiled)
            del future

    def _compile(self, constraint: Constraint, process: CheckProcess, tokenizer: LLTokenizer) -> CompiledConstraint:
        try:
            checked = process.check(constraint, COMPILE_CPU_S)
        except TimeoutError:
            why = f"takes longer than {COMPILE_CPU_S:g} s of a CPU to compile; make it simpler"
            raise refusal(constraint, why) from None
        closing = None
        if checked.closing_grammar:
            closing = Closing(make_parser(tokenizer, checked.closing_grammar), constraint.is_reasoning)
        return CompiledConstraint(checked.report, make_parser(tokenizer, checked.grammar), closing)

    def _ready_vocabulary(self) -> tuple[Vocabulary, LLTokenizer]:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                vocabulary = self._make_vocabulary()
                self._vocabulary = vocabulary, vocabulary.tokenizer(self._encode)
            return self._vocabulary

    def _keep(self, key: str, compiled: CompiledConstraint) -> None:
        """Count it, and forget the oldest others for it."""
        with self._lock:
            self._num_cached_bytes += compiled.num_bytes
            for other, future in list(self._cache.items()):
                if self._num_cached_bytes <= self._max_cache_bytes:
                    break
                if other != key and future.done():
                    del self._cache[other]
                    self._num_cached_bytes -= future.result().num_bytes


def waited_too_long() -> Overloaded:
    """The error of a request whose constraint is not compiled within MAX_WAIT_S."""
    return Overloaded(MAX_WAITING, why=f"constraints of others were compiled for {MAX_WAIT_S:g} s before this one's")


def too_hard(constraint: Constraint) -> ConstraintInvalid:
    """The error of a constraint that compiles, and takes more than LIMITS allow where an output has led it."""
    return refusal(constraint, "takes more than its limits allow to be followed; make it simpler")


def _digest(constraint: Constraint) -> str:
    """Of all that the compiled constraint depends on."""

    def spelled(each: Constraint) -> list[Any]:
        parts = [[name, spelled(part)] for name, part in each.parts]
        return [each.kind.value, each.text, each.is_relaxed, each.field, parts, each.closing_text, each.is_reasoning]

    return hashlib.sha256(json.dumps(spelled(constraint)).encode()).hexdigest()
