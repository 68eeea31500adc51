"""Requests with a constraint: how they wait for it, are turned away because of it, and end."""

import asyncio
import threading

import pytest
from engine_bench import PROMPT, SECONDS, running
from fake_executor import expected_completion
from llguidance import LLParserLimits

from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.constraint.outcome import Outcome
from nanoserve.engine.reply import Wanted
from nanoserve.engine.stream import Delta, Finished, Started
from nanoserve.errors import ConstraintInvalid, DeadlineExceeded, EngineFailure, Overloaded
from nanoserve.observer import Observer, Observers
from nanoserve.request import Constraint, ConstraintKind, FinishReason
from nanoserve.step_record import WaitReason

CHOICES = Constraint.of_choices(["no", "nonesuch", "yes"])


def regex(text):
    return Constraint(ConstraintKind.REGEX, text)


def schema(text, *, is_relaxed=False):
    return Constraint(ConstraintKind.JSON_SCHEMA, text, is_relaxed)


def under(constraint):
    return {"wanted": Wanted(constraint)}


def text(events, index=0):
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def ends(events):
    return {e.index: e.finish_reason for e in events if isinstance(e, Delta) and e.finish_reason}


@pytest.fixture
def gate(monkeypatch):
    """No constraint is compiled before it is set."""
    opened = threading.Event()
    compile_one = ConstraintCompiler._compile

    def wait(self, *args):
        assert opened.wait(SECONDS)
        return compile_one(self, *args)

    monkeypatch.setattr(ConstraintCompiler, "_compile", wait)
    yield opened
    opened.set()


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_complete_output_ends_at_once_and_is_satisfied():
    async with running() as bench:
        events = await bench.collect(n=4, max_tokens=20, min_tokens=15, request=under(CHOICES))
    assert {text(events, i) for i in range(4)} <= {"no", "nonesuch", "yes"}
    assert {end is FinishReason.COMPLETE for end in ends(events).values()} == {True}
    assert events[-1].outcomes == [Outcome.SATISFIED] * 4
    assert not events[-1].relaxed


async def test_without_a_constraint_there_is_no_outcome():
    async with running() as bench:
        assert (await bench.collect())[-1].outcomes == []


@pytest.mark.parametrize(
    ("params", "outcome", "reason"),
    [
        ({"max_tokens": 3}, Outcome.TRUNCATED, FinishReason.LENGTH),
        ({"max_tokens": 0}, Outcome.TRUNCATED, FinishReason.LENGTH),
        ({"max_tokens": 4}, Outcome.SATISFIED, FinishReason.COMPLETE),
        ({"stop": ("bc",)}, Outcome.TRUNCATED, FinishReason.STOP),
        ({"stop": ("cd",)}, Outcome.TRUNCATED, FinishReason.STOP),
        ({"stop": ("cd",), "include_stop": True}, Outcome.SATISFIED, FinishReason.STOP),
        ({"stop": ("bc",), "include_stop": True}, Outcome.TRUNCATED, FinishReason.STOP),
        ({"stop_token_ids": frozenset(b"b")}, Outcome.TRUNCATED, FinishReason.STOP),
        ({"stop_token_ids": frozenset(b"d")}, Outcome.TRUNCATED, FinishReason.STOP),
        ({"stop_token_ids": frozenset(b"d"), "include_stop": True}, Outcome.SATISFIED, FinishReason.STOP),
    ],
)
async def test_what_is_cut_off_is_truncated_whatever_cut_it(params, outcome, reason):
    async with running() as bench:
        events = await bench.collect(request=under(regex("abcd")), **{"max_tokens": 9, **params})
    assert events[-1].outcomes == [outcome]
    assert ends(events) == {0: reason}


async def test_an_output_that_may_go_on_is_satisfied_where_it_may_end():
    async with running() as bench:
        events = await bench.collect(max_tokens=5, request=under(regex("a+")))
    assert text(events) == "aaaaa"
    assert ends(events) == {0: FinishReason.LENGTH}
    assert events[-1].outcomes == [Outcome.SATISFIED]


@pytest.mark.parametrize("detokenize", [True, False])
async def test_what_is_not_enforced_is_checked_at_the_end_and_told(detokenize):
    pairs = schema(
        '{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": true}',
        is_relaxed=True,
    )
    found = set()
    async with running() as bench:
        for seed in range(12):
            request = under(pairs)
            events = await bench.collect(seed=seed, max_tokens=100, detokenize=detokenize, request=request)
            tokens = bytes(t for e in events if isinstance(e, Delta) for t in e.token_ids)
            is_unique = b"1" in tokens and b"2" in tokens
            assert events[-1].outcomes == [Outcome.RELAXED_OK if is_unique else Outcome.RELAXED_VIOLATED]
            assert [(use.pointer, use.keyword) for use in events[-1].relaxed] == [("", "uniqueItems")]
            found.add(is_unique)
        events = await bench.collect(max_tokens=1, request=under(pairs))
        assert events[-1].outcomes == [Outcome.TRUNCATED]
    assert found == {True, False}


async def test_a_wrong_constraint_is_refused_before_the_request_starts():
    async with running() as bench:
        with pytest.raises(ConstraintInvalid) as caught:
            await bench.collect(request=under(schema('{"properties": {"a": {"uniqueItems": true}}}')))
        assert caught.value.facts["pointer"] == "/properties/a"
        assert caught.value.facts["keyword"] == "uniqueItems"
        assert not bench.executor.plans
        assert len(await bench.collect()) > 2


async def test_others_pass_while_a_constraint_is_compiled(gate):
    seen = []

    class Watcher(Observer):
        def step_ended(self, record):
            seen.append(record.wait)

    async with running(observers=Observers(Watcher())) as bench:
        constrained = asyncio.create_task(bench.collect(request=under(CHOICES)))
        await until(lambda: bench.engine.stats().scheduler.num_waiting == 1)
        events = await bench.collect()
        assert [t for e in events if isinstance(e, Delta) for t in e.token_ids] == expected_completion(
            PROMPT, 7, 6, 256
        )
        assert bench.engine.stats().scheduler.num_waiting == 1
        assert not constrained.done()
        gate.set()
        events = await constrained
        assert isinstance(events[0], Started)
        assert events[-1].outcomes == [Outcome.SATISFIED]
    reasons = {wait.reason for wait in seen if wait is not None}
    assert reasons == {WaitReason.CONSTRAINT}


async def test_a_caller_may_leave_while_its_constraint_is_compiled(gate):
    async with running() as bench:
        leaving = asyncio.create_task(bench.collect(request=under(CHOICES)))
        staying = asyncio.create_task(bench.collect(request=under(CHOICES)))
        await until(lambda: bench.engine.stats().scheduler.num_waiting == 2)
        leaving.cancel()
        await until(lambda: bench.engine.stats().scheduler.num_waiting == 1)
        gate.set()
        assert (await staying)[-1].outcomes == [Outcome.SATISFIED]
        await bench.until_free()


@pytest.mark.usefixtures("gate")
async def test_a_deadline_counts_while_a_constraint_is_compiled_and_nothing_runs():
    async with running() as bench:
        with pytest.raises(DeadlineExceeded, match="while waiting"):
            await bench.collect(request={**under(CHOICES), "timeout_s": 0.05})
        assert bench.engine.stats().scheduler.num_waiting == 0


@pytest.mark.usefixtures("gate")
async def test_a_time_limit_counts_while_a_constraint_is_compiled():
    async with running() as bench:
        events = await bench.collect(time_limit_s=0.05, request=under(CHOICES))
    assert ends(events) == {0: FinishReason.TIME_LIMIT}
    assert events[-1].outcomes == [Outcome.TRUNCATED]


@pytest.mark.usefixtures("gate")
async def test_who_waits_too_long_for_the_constraints_of_others_may_try_again(monkeypatch):
    monkeypatch.setattr("nanoserve.engine.core.MAX_WAIT_S", 0.01)
    async with running() as bench:
        with pytest.raises(Overloaded, match="before this one's; retry later"):
            await bench.collect(request=under(CHOICES))


@pytest.mark.usefixtures("gate")
async def test_more_constraints_than_may_wait_are_refused(monkeypatch):
    monkeypatch.setattr("nanoserve.constraint.compiler.MAX_WAITING", 1)
    async with running(max_waiting=100) as bench:
        tasks = [asyncio.create_task(bench.collect(request=under(regex(f"a{{{i}}}b")))) for i in range(1, 9)]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        with pytest.raises(Overloaded):
            await done.pop()
        for task in waiting:
            task.cancel()


async def test_a_fault_of_the_compiler_fails_its_request_alone(monkeypatch):
    async with running() as bench:
        monkeypatch.setattr(bench.compiler, "_make_vocabulary", lambda: 1 / 0)
        with pytest.raises(EngineFailure):
            await bench.collect(request=under(CHOICES))
        with pytest.raises(EngineFailure):
            await bench.engine.compile_constraint(CHOICES)
        assert isinstance((await bench.collect())[-1], Finished)


async def test_a_preempted_output_goes_on_where_it_was():
    """Two that need more blocks than there are."""
    async with running(num_blocks=14, max_num_seqs=2) as bench:
        list_of = schema('{"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 9}')
        options = {"max_tokens": 40, "request": under(list_of)}
        alone = [await bench.collect(seed=seed, **options) for seed in (1, 2)]
        assert bench.scheduler.stats().num_preemptions == 0
        together = await asyncio.gather(*(bench.collect(seed=seed, **options) for seed in (1, 2)))
        assert bench.scheduler.stats().num_preemptions > 0
        assert list(map(text, together)) == list(map(text, alone))


async def test_what_a_constraint_comes_to_is_found_out_once_for_all_who_ask():
    async with running() as bench:
        ask = bench.engine.compile_constraint
        one, other = await asyncio.gather(ask(regex("ab+")), ask(regex("ab+")))
        assert one == other
        assert one.num_grammar_bytes > 0
        with pytest.raises(ConstraintInvalid, match="unclosed group"):
            await ask(regex("("))


async def test_who_waits_too_long_to_hear_what_a_constraint_comes_to_is_told(monkeypatch):
    monkeypatch.setattr("nanoserve.engine.engine.MAX_WAIT_S", 0)
    async with running() as bench:
        with pytest.raises(Overloaded, match="before this one's; retry later"):
            await bench.engine.compile_constraint(Constraint(ConstraintKind.JSON_OBJECT))


async def test_a_constraint_that_is_too_hard_to_follow_is_the_callers_to_mend(monkeypatch):
    """It is known only where an output has led: after the request has started."""
    monkeypatch.setattr(
        "nanoserve.constraint.checker.LIMITS", LLParserLimits(max_lexer_states=30, verbose_errors=False)
    )
    async with running() as bench:
        with pytest.raises(ConstraintInvalid, match="takes more than its limits allow to be followed") as caught:
            await bench.collect(max_tokens=60, request=under(regex(r"x(\S+\s+){9,99}y")))
        assert caught.value.field == "constraint.regex"
        assert isinstance((await bench.collect())[-1], Finished)
        await bench.until_free()
