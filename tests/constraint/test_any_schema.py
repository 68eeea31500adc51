"""Schemas of every kind and a model that writes nearly anything: what comes is right, or cut off and says so."""

import asyncio
import json
import math
import random
import sys
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path

import jsonschema_rs
import pytest
from nanoserve_client import AsyncClient, ConstraintOutcome, FinishReason, InvalidRequest
from serve_process import serving

SCHEMAS = [json.loads(line)["schema"] for line in Path(__file__).with_name("schemas.jsonl").read_text().splitlines()]
CALLERS = 24


@pytest.fixture(scope="module")
def address():
    with serving("--http-port", "0", "--max-num-seqs", "16", "--kv-memory", "8MiB") as server:
        yield server.address


def number(text):
    """As a float near to it, on the same side of every bound: JSON's numbers have no size and no precision."""
    exact = Decimal(text)
    near = float(Context(prec=15, rounding=ROUND_DOWN).plus(exact))
    if near == 0 != exact:
        return math.copysign(sys.float_info.min, exact)
    return min(max(near, -sys.float_info.max), sys.float_info.max)


def is_valid(schema, text):
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text, parse_float=number))


async def ask(client, number):
    """One answer, or none if the schema is refused. Returns its outcomes."""
    chance = random.Random(number)
    schema, relaxed = chance.choice(SCHEMAS), chance.random() < 0.3
    options = {
        "n": chance.choice([1, 1, 1, 3]),
        "max_tokens": chance.choice([3, 20, 60, 120]),
        "max_draft_tokens": chance.choice([0, None]),
        "temperature": 2.0,
        "seed": number,
        "priority": chance.choice([0, 0, 1]),
    }
    result = refusal = None
    try:
        result = await client.chat(f"Number {number}", schema=schema, relaxed=relaxed, **options).result()
    except InvalidRequest as error:
        refusal = error
    if result is None:
        assert refusal.reason == "CONSTRAINT_INVALID"
        assert refusal.metadata["keyword"], (schema, refusal)
        return []
    for completion in result.completions:
        completion.text.encode()  # no half of a character
        match completion.constraint_outcome:
            case ConstraintOutcome.TRUNCATED:
                assert completion.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
            case ConstraintOutcome.RELAXED_VIOLATED:
                assert result.unenforced
                assert not is_valid(schema, completion.text)
            case outcome:
                assert outcome is (ConstraintOutcome.RELAXED_OK if result.unenforced else ConstraintOutcome.SATISFIED)
                assert is_valid(schema, completion.text), (schema, completion.text)
    return [completion.constraint_outcome for completion in result.completions]


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_what_comes_is_right_or_cut_off(address, count):
    numbers = iter(range(count))
    seen = []
    async with AsyncClient(address) as client:

        async def call():
            for number in numbers:
                seen.extend(await ask(client, number))

        await asyncio.gather(*(call() for _ in range(CALLERS)))
        stats = await client.get_stats()
    assert seen.count(ConstraintOutcome.SATISFIED) > count // 8
    assert set(seen) >= {ConstraintOutcome.SATISFIED, ConstraintOutcome.TRUNCATED, ConstraintOutcome.RELAXED_OK}
    assert (stats.running, stats.waiting) == (0, 0)
