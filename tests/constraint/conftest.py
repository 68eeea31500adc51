"""A compiler for the built-in model's tokens."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from nanoserve.config import BUILTIN_MODEL
from nanoserve.constraint.compiler import CompiledConstraint, ConstraintCompiler
from nanoserve.engine.text import TextCodec
from nanoserve.errors import ConstraintInvalid
from nanoserve.request import Constraint, ConstraintKind

# The model's logits are wider than its tokenizer, as those of many are.
PADDING = 40


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    return TextCodec.load(BUILTIN_MODEL)


@pytest.fixture(scope="session")
def vocab_size(codec: TextCodec) -> int:
    return codec.vocab_size + PADDING


@pytest.fixture(scope="session")
def compiler(codec: TextCodec, vocab_size: int) -> ConstraintCompiler:
    return ConstraintCompiler(lambda: codec.vocabulary(vocab_size, [codec.eos_token_id]), codec.encode_plain)


@pytest.fixture(scope="session")
def compile_schema(compiler: ConstraintCompiler) -> Callable[..., CompiledConstraint]:
    def run(schema: Any, *, is_relaxed: bool = False) -> CompiledConstraint:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, text, is_relaxed))

    return run


@pytest.fixture(scope="session")
def accepts(codec: TextCodec) -> Callable[[CompiledConstraint, str], bool]:
    """Whether a whole text may be generated, token by token."""

    def run(compiled: CompiledConstraint, text: str) -> bool:
        token_ids = codec.encode(text, add_special_tokens=False)
        matcher = compiled.matcher()
        return matcher.read(token_ids) == len(token_ids) and matcher.may_end

    return run


@pytest.fixture(scope="session")
def may_begin(codec: TextCodec) -> Callable[[CompiledConstraint, str], bool]:
    """Whether an output may begin so, token by token."""

    def run(compiled: CompiledConstraint, text: str) -> bool:
        token_ids = codec.encode(text, add_special_tokens=False)
        return compiled.matcher().read(token_ids) == len(token_ids)

    return run


@pytest.fixture(scope="session")
def refused(compile_schema: Callable[..., CompiledConstraint]) -> Callable[..., list[tuple[str, str]]]:
    """Pointer and keyword of everything for which a schema is refused."""

    def run(schema: Any, *, is_relaxed: bool = False) -> list[tuple[str, str]]:
        with pytest.raises(ConstraintInvalid) as caught:
            compile_schema(schema, is_relaxed=is_relaxed)
        return [(problem.pointer, problem.keyword) for problem in caught.value.problems]

    return run
