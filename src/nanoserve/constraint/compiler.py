"""Compiles constraints for one model, on threads of their own, and keeps those that were used last.

    compile() ──▶ cache, by SHA-256 of the constraint ── not there ──▶ queue ──▶ compile threads
                        ◀──────────────── a Future, shared by all who ask for the same ────────┘

The compiler of llguidance recurses as deep as definitions refer to each other, and a stack that is too small would end
the process. So these threads have a stack that no text of MAX_TEXT_BYTES can fill. It cannot be stopped either: its
limits end it, and whoever waits for it does so no longer than COMPILE_TIMEOUT_S.
"""

import functools
import hashlib
import json
import logging
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nanoserve.constraint.grammar import check, grammar_of, grammar_of_schema, refusal
from nanoserve.constraint.matcher import Matcher
from nanoserve.constraint.outcome import Validator
from nanoserve.constraint.schema import Schema, SchemaError
from nanoserve.errors import ConstraintInvalid, ConstraintProblem, Overloaded
from nanoserve.request import Constraint, ConstraintKind, ConstraintReport, KeywordUse

logger = logging.getLogger(__name__)

# Two, so that one hostile constraint does not hold up all others.
NUM_THREADS = 2
# Of address space: only what is used becomes memory. The deepest chain of definitions in 256 KiB takes about 40 MiB.
STACK_BYTES = 256 << 20
COMPILE_TIMEOUT_S = 10.0
# Constraints that may wait for a thread; one more is refused.
MAX_WAITING = 64
# Of all compiled constraints that are kept, by _num_bytes.
MAX_CACHE_BYTES = 256 << 20
# What else the compiler refuses, a relaxed schema may lose.
MAX_DROPS = 16

# Numbers of llguidance's own units. The first two bound compiling, the others each mask.
LIMITS = LLParserLimits(
    max_grammar_size=500_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class CompiledConstraint:
    """A constraint that is ready for any number of sequences. Any thread.

    The matchers share a lexer, which keeps every state that one of them has come to. So it may get full, even if each
    completion needs few: then the constraint is compiled anew for whoever asks next.
    """

    report: ConstraintReport
    # At its start. Never reads a token.
    parser: LLMatcher = field(repr=False)
    # Set once the lexer is full.
    is_worn: threading.Event = field(repr=False, default_factory=threading.Event)

    def matcher(self, token_ids: Sequence[int] = ()) -> Matcher:
        """A new one, which has read these tokens of the completion."""
        return Matcher(self.parser, self.is_worn.set, token_ids)

    @property
    def num_bytes(self) -> int:
        """An estimate of the memory it takes, of which the grammar's text is the best sign."""
        return BYTES_EACH + BYTES_PER_GRAMMAR_BYTE * self.report.num_grammar_bytes


# Measured over 704 schemas of MaskBench: 176 KiB each, for 1.8 KiB of grammar.
BYTES_EACH = 64 * 1024
BYTES_PER_GRAMMAR_BYTE = 64


class ConstraintCompiler:
    """Any thread. Its threads begin with the first constraint, and end with the process."""

    def __init__(
        self,
        make_tokenizer: Callable[[], LLTokenizer],
        vocab_size: int,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        """make_tokenizer: called once, on a compile thread: it takes up to a second.
        vocab_size: width of the model's logits, and so of the masks.
        """
        self._make_tokenizer = make_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._vocab_size = vocab_size
        self._max_cache_bytes = max_cache_bytes
        self._lock = threading.Lock()
        # By digest, least recently used first: what is compiled, or will be.
        self._cache: OrderedDict[str, Future[CompiledConstraint]] = OrderedDict()
        # Of what is compiled: at most max_cache_bytes, but for a single one that is larger.
        self._num_cached_bytes = 0
        self._waiting: queue.SimpleQueue[tuple[str, Constraint]] = queue.SimpleQueue()
        self._has_threads = False

    def submit(self, constraint: Constraint) -> "Future[CompiledConstraint]":
        """The compiled constraint, when there is one. The future raises ConstraintInvalid, and is not to be cancelled:
        others may wait for it. Raises Overloaded if too many wait."""
        with self._lock:
            self._start_threads()
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
        return future

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """Wait for it. Raises Overloaded, and ConstraintInvalid, also when it takes longer than COMPILE_TIMEOUT_S."""
        try:
            return self.submit(constraint).result(COMPILE_TIMEOUT_S)
        except TimeoutError:
            raise too_slow(constraint) from None

    # ------------------------------------------------------------------------------------------------- threads

    def _start_threads(self) -> None:
        if self._has_threads:
            return
        self._has_threads = True
        previous = threading.stack_size(STACK_BYTES)
        try:
            for i in range(NUM_THREADS):
                threading.Thread(target=self._work, name=f"nanoserve-constraint-{i}", daemon=True).start()
        finally:
            threading.stack_size(previous)

    def _work(self) -> None:
        while True:
            key, constraint = self._waiting.get()
            future = self._cache[key]
            try:
                compiled = self._compile(constraint)
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

    # ------------------------------------------------------------------------------------------------- compile

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        self._ready_tokenizer()
        start_s = time.perf_counter()
        check(constraint)
        schema: Schema | None = None
        if constraint.kind is ConstraintKind.JSON_SCHEMA:
            schema, grammar, parser = self._compile_schema(constraint)
        else:
            grammar = grammar_of(constraint)
            parser = self._parser(grammar)
            if error := parser.get_error():
                raise refusal(constraint.kind, _first_lines(error))
        compile_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        first = parser.deep_copy()
        mask = np.frombuffer(first.compute_bitmask(), dtype=np.int32)[: -(-self._vocab_size // 32)]
        if (error := first.get_error()) or not mask.any():
            too_much = "" if error.startswith("NoExtension") else _first_lines(error)
            raise refusal(constraint.kind, too_much or "allows no output: no token can be the first")
        first_mask_s = time.perf_counter() - start_s
        uses = tuple(schema.uses if schema else ())
        report = ConstraintReport(uses, len(grammar), compile_s, first_mask_s)
        if report.relaxed:
            _check_validator(constraint)
        return CompiledConstraint(report, parser)

    def _compile_schema(self, constraint: Constraint) -> tuple[Schema, str, LLMatcher]:
        kind = constraint.kind
        try:
            schema = Schema(constraint.text)
        except SchemaError as wrong:
            raise refusal(kind, str(wrong)) from None
        if refused := schema.refused():
            if not constraint.is_relaxed:
                raise _refusal_of(refused)
            schema.relax()
        for _ in range(MAX_DROPS):
            grammar = grammar_of_schema(schema.text)
            parser = self._parser(grammar)
            error = parser.get_error()
            if "coerce_one_of" in error and constraint.is_relaxed:
                self._note_one_ofs(schema)
                grammar = grammar_of_schema(schema.text, one_of_as_any_of=True)
                parser = self._parser(grammar)
                error = parser.get_error()
            if not error:
                return schema, grammar, parser
            # The compiler's own asserts are about sizes, and come as errors.
            if "too large" in error or error.startswith("panic"):
                raise refusal(kind, "takes a grammar that is too large; make it simpler")
            pointer, keyword = schema.locate(error, functools.partial(self._error_of, is_relaxed=constraint.is_relaxed))
            why = _in_plain_words(error)
            if not constraint.is_relaxed or not keyword or "Unsatisfiable" in error:
                raise refusal(kind, why, pointer=pointer, keyword=keyword)
            schema.drop(pointer, keyword, why)
        raise refusal(kind, f"more than {MAX_DROPS} keywords cannot be enforced")

    def _note_one_ofs(self, schema: Schema) -> None:
        """Find those oneOf in which two branches may match one value."""
        for pointer in schema.places_of("oneOf"):
            error = self._error_of(schema.alone(pointer), is_relaxed=False)
            if "coerce_one_of" in error:
                schema.note(pointer, "oneOf", _in_plain_words(error))

    def _error_of(self, schema: str, *, is_relaxed: bool) -> str:
        return self._parser(grammar_of_schema(schema, one_of_as_any_of=is_relaxed)).get_error()

    def _parser(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._ready_tokenizer(), grammar, log_level=0, limits=LIMITS)

    def _ready_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer


def _check_validator(constraint: Constraint) -> None:
    """Raise ConstraintInvalid if outputs could not be checked at their end."""
    try:
        Validator(constraint.text)
    except ValueError as error:
        raise refusal(constraint.kind, f"cannot be checked: {_first_lines(str(error))}") from None


def too_slow(constraint: Constraint) -> ConstraintInvalid:
    """The error of a constraint that is not compiled in time."""
    return refusal(constraint.kind, f"takes longer than {COMPILE_TIMEOUT_S:g} s to compile; make it simpler")


def _digest(constraint: Constraint) -> str:
    """Of all that the compiled constraint depends on."""
    asked = [constraint.kind.value, constraint.text, constraint.is_relaxed]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _refusal_of(refused: list[KeywordUse]) -> ConstraintInvalid:
    problems = [ConstraintProblem(use.pointer, use.keyword, use.why) for use in refused]
    return ConstraintInvalid(f"constraint.{ConstraintKind.JSON_SCHEMA.value}", problems)


def _in_plain_words(error: str) -> str:
    """What llguidance says of a schema, less its advice on options that callers do not have."""
    if "coerce_one_of" in error:
        return "two of its branches may match one value, which cannot be enforced"
    if "Unable to determine" in error:
        return "brings patterns together that take too long to compare"
    if "Default retriever" in error:
        return "leads out of the schema, and nothing is fetched"
    return _first_lines(error)


def _first_lines(error: str) -> str:
    """Without the parser's state and the drawing of the place."""
    told = re.split(r"<non-verbose/>|\n +\d+ \|", error.partition("(in regex): ")[2] or error)[0]
    return " ".join(told.split())[:500]
