"""What constraints cost callers who have one, and those who have none; and what forced tokens give.

    python benchmarks/structured_output.py FOLDER [--rounds N] [--streams N] [--tokens N] [--workloads NAME ...]

One server serves all ways in turn. FOLDER: that of `make benchmarks/checkpoints/smollm2-135m`.

    streams      --streams callers at once, --tokens each, free and then under a schema: tokens/s of all together
    guesses      the same, where the server may guess: forced tokens come several at a time
    call         one caller, the arguments of a call under a schema, without guesses and with: tokens/s
    first        one caller, the time to the first token: free, under a schema that was seen before, and under a new one
    hostile      --streams free callers; the time between two of their tokens while nobody else is there, and while
                 others send schemas of 250 KiB that take long to compile and are refused
"""

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from nanoserve_client import AsyncClient, InvalidRequest
from served import serving

PROMPT = "Write down what you know of the lighthouses of the northern coast, one after the other."
# It cannot be complete before --tokens are drawn.
ENTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["lighthouse", "beacon", "daymark", "fog signal"]},
        "height_in_meters": {"type": "integer", "minimum": 1, "maximum": 200},
        "is_automated": {"type": "boolean"},
        "lamps": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 100}, "maxItems": 4},
    },
    "required": ["name", "kind", "height_in_meters", "is_automated", "lamps"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": ENTRY, "minItems": 1000}
CALL_PROMPT = "Book a table for four people in a quiet restaurant near the harbour for tomorrow evening."
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "book_a_table_in_a_restaurant"},
        "arguments": {
            "type": "object",
            "properties": {
                "restaurant_identifier": {"type": "string", "pattern": "^rst_[0-9]{6}$"},
                "number_of_people": {"type": "integer", "minimum": 1, "maximum": 12},
                "preferred_area_of_the_restaurant": {"enum": ["inside, near the window", "outside, on the terrace"]},
                "notification_channel": {"enum": ["short_message_service", "electronic_mail"]},
                "special_dietary_requirements": {
                    "type": "array",
                    "items": {"enum": ["vegetarian", "gluten_free"]},
                    "maxItems": 2,
                },
            },
            "required": [
                "restaurant_identifier",
                "number_of_people",
                "preferred_area_of_the_restaurant",
                "notification_channel",
                "special_dietary_requirements",
            ],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
HOSTILE_BRANCHES = 900
numbers = itertools.count()


async def run(client: AsyncClient, prompt: str, tokens: int, **options: Any) -> tuple[float, list[float]]:
    """Seconds to the first token, and between two steps of tokens, of one answer, which has that many."""
    start_s = last_s = time.perf_counter()
    first_s, gaps, num_tokens = 0.0, [], 0
    asked = {"ignore_eos": True, "temperature": 0.8, "seed": next(numbers), **options}
    async for delta in client.chat(prompt, max_tokens=tokens, **asked):
        now = time.perf_counter()
        if not delta.token_ids:
            continue
        num_tokens += len(delta.token_ids)
        if first_s:
            gaps.append(now - last_s)
        first_s, last_s = first_s or now - start_s, now
    assert num_tokens == tokens
    return first_s, gaps


async def streams(client: AsyncClient, arguments: argparse.Namespace, **options: Any) -> float:
    """Tokens/s of all."""
    start_s = time.perf_counter()
    callers = (run(client, f"{PROMPT} {i}", arguments.tokens, **options) for i in range(arguments.streams))
    await asyncio.gather(*callers)
    return arguments.streams * arguments.tokens / (time.perf_counter() - start_s)


async def call(client: AsyncClient, **options: Any) -> float:
    """Tokens/s of one call's arguments, the first token's time included."""
    start_s = time.perf_counter()
    result = await client.chat(
        CALL_PROMPT, schema=CALL, max_tokens=300, temperature=0, cache_salt=f"{next(numbers)}", **options
    ).result()
    assert result.parsed["name"] == CALL["properties"]["name"]["const"]  # type: ignore[index]
    return result.usage.completion_tokens / (time.perf_counter() - start_s)


async def in_turn(rounds: int, *ways: Callable[[], Awaitable[float]]) -> list[list[float]]:
    """Each way once in a round, after one round that does not count."""
    seen: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for place, way in enumerate(ways):
            figure = await way()
            if number:
                seen[place].append(figure)
    return seen


def show(what: str, unit: str, before: list[float], after: list[float]) -> None:
    ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(before, after, strict=True))
    ratio = statistics.median(after) / statistics.median(before)
    print(
        f"{what:10}{statistics.median(before):9.1f}{statistics.median(after):9.1f} {unit:9}{ratio:6.2f}   {ratios}",
        flush=True,
    )


def show_times(what: str, times: list[float]) -> None:
    at = sorted(1e3 * each for each in times)
    print(f"{what:28} p50 {at[len(at) // 2]:8.2f}   p99 {at[int(0.99 * len(at))]:8.2f} ms   of {len(at)}", flush=True)


async def first(client: AsyncClient, rounds: int) -> None:
    """The ways in turn, so that what else the machine does falls on all of them alike."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "free": dict,
        "under a known schema": lambda: {"schema": LIST},
        "under a new schema": lambda: {"schema": {**LIST, "title": f"{next(numbers)}"}},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(100 * rounds):
        for name, options in ways.items():
            times[name].append((await run(client, PROMPT, 1, **options()))[0])
    for name, each in times.items():
        show_times(f"first token, {name}"[:28], each)


async def attack(address: str) -> None:
    """Until it is ended: four callers."""
    async with AsyncClient(address) as client:
        await asyncio.gather(*(send_hostile(client) for _ in range(4)))


async def send_hostile(client: AsyncClient) -> None:
    while True:
        branches = [
            {"type": "object", "properties": {f"{next(numbers)}" + "x" * 200: {"pattern": "(a|b)*c{1,50}"}}}
            for _ in range(HOSTILE_BRANCHES)
        ]
        with contextlib.suppress(InvalidRequest):
            await client.chat("x", schema={"oneOf": branches}, max_tokens=1).result()
            raise AssertionError("it is expected to be refused")


async def hostile(address: str, client: AsyncClient, arguments: argparse.Namespace) -> None:
    gaps: dict[str, list[float]] = {"alone": [], "beside hostile schemas": []}
    for number in range(arguments.rounds + 1):
        for name, seen in gaps.items():
            attackers = []
            if name != "alone":
                # Elsewhere: what they take to write their schemas must not count.
                attackers.append(await asyncio.create_subprocess_exec(sys.executable, __file__, "--attack", address))
            callers = (run(client, f"{PROMPT} {i}", arguments.tokens) for i in range(arguments.streams))
            answers = await asyncio.gather(*callers)
            for attacker in attackers:
                attacker.terminate()
                await attacker.wait()
            if number:
                seen += [gap for _, own in answers for gap in own]
    for name, seen in gaps.items():
        show_times(f"between tokens, {name}", seen)


async def measure(address: str, arguments: argparse.Namespace) -> None:
    async with AsyncClient(address) as client:
        for what in arguments.workloads:
            match what:
                case "streams" | "guesses":
                    most = 0 if what == "streams" else None
                    free, constrained = await in_turn(
                        arguments.rounds,
                        lambda most=most: streams(client, arguments, max_draft_tokens=most),
                        lambda most=most: streams(client, arguments, max_draft_tokens=most, schema=LIST),
                    )
                    show(what, "tokens/s", free, constrained)
                case "call":
                    without, guessing = await in_turn(
                        3 * arguments.rounds, lambda: call(client, max_draft_tokens=0), lambda: call(client)
                    )
                    show(what, "tokens/s", without, guessing)
                case "first":
                    await first(client, arguments.rounds)
                case "hostile":
                    await hostile(address, client, arguments)


def main() -> None:
    workloads = ("streams", "guesses", "call", "first", "hostile")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--workloads", nargs="+", default=workloads, choices=workloads)
    arguments = parser.parse_args()
    if arguments.attack:
        asyncio.run(attack(arguments.attack))
    options = ("--http-port", "0", "--max-context-tokens", "2048", "--kv-memory", "1GiB")
    with serving((str(arguments.folder), *options)) as (_, address):
        asyncio.run(measure(address, arguments))


if __name__ == "__main__":
    main()
