"""The asyncio face over simulated KV memory and a real tokenizer: what callers read, and how requests end."""

import asyncio
import threading

import pytest
from engine_bench import BLOCK, PROMPT, SECONDS, VOCAB, byte_codec, running, two_right_drafts
from fake_executor import expected_completion

from nanoserve.engine.chat_template import Chat
from nanoserve.engine.engine import LONG_PROMPT_CHARS
from nanoserve.engine.statistics import RollingSum
from nanoserve.engine.stream import Delta, Finished, PromptLogprobs, RequestStream, Started
from nanoserve.errors import (
    CancelledByOperator,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotReady,
    Overloaded,
)
from nanoserve.request import (
    DraftCounts,
    DraftSource,
    DraftTotals,
    FinishReason,
    Request,
    RequestStarted,
    SamplingParams,
    SequenceOutput,
)


def deltas(events, index=0):
    return [e for e in events if isinstance(e, Delta) and e.index == index]


def token_ids(events, index=0):
    return [t for d in deltas(events, index) for t in d.token_ids]


def text(events, index=0):
    return "".join(d.text for d in deltas(events, index))


async def test_events_come_in_the_order_of_the_contract():
    async with running() as bench:
        events = await bench.collect(n=2, logprobs=0, prompt_logprobs=0)
    kinds = [type(e) for e in events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    first_delta = kinds.index(Delta)
    assert set(kinds[1:first_delta]) == {PromptLogprobs}
    assert set(kinds[first_delta:-1]) == {Delta}
    prompt = [t for e in events if isinstance(e, PromptLogprobs) for t in e.tokens]
    assert [t.token_id for t in prompt] == PROMPT
    assert [t.logprob is None for t in prompt] == [True] + [False] * (len(PROMPT) - 1)
    for index in range(2):
        expected = expected_completion(PROMPT, 7 + index, 6, VOCAB)
        assert token_ids(events, index) == expected
        assert text(events, index) == bench.codec.decode(expected)
        assert [d.finish_reason for d in deltas(events, index)][-1] is FinishReason.LENGTH
        assert not any(d.finish_reason for d in deltas(events, index)[:-1])
        assert [lp.token_id for d in deltas(events, index) for lp in d.logprobs] == expected
    finished = events[-1]
    assert (finished.prompt_tokens, finished.completion_tokens) == (len(PROMPT), 12)
    assert min(finished.queue_s, finished.prefill_s, finished.decode_s) >= 0


async def test_a_text_prompt_is_encoded_and_a_drawn_seed_is_reported():
    async with running() as bench:
        first = await bench.collect("once upon", seed=None)
        seed = first[0].params.seed
        again = await bench.collect(PROMPT, seed=seed)
    assert first[0].prompt_tokens == len(PROMPT)
    assert token_ids(first) == token_ids(again) == expected_completion(PROMPT, seed, 6, VOCAB)


async def test_a_slow_reader_gets_the_same_output_in_fewer_deltas():
    async with running() as bench:
        stream = bench.engine.generate(PROMPT, SamplingParams(seed=7, max_tokens=40))
        events = [await anext(stream)]
        await bench.until_free()
        events += [e async for e in stream]
    assert len(deltas(events)) < 40
    assert token_ids(events) == expected_completion(PROMPT, 7, 40, VOCAB)


@pytest.mark.parametrize("n", [1, 3])
async def test_without_new_tokens_the_prompt_is_computed_and_told_of(n):
    async with running() as bench:
        events = await bench.collect(n=n, max_tokens=0, prompt_logprobs=0, logprobs=0)
        await bench.until_free()
    given = [event for event in events if isinstance(event, Delta)]
    assert [(d.text, d.token_ids, d.logprobs) for d in given] == [("", [], [])] * n
    assert {(d.index, d.finish_reason) for d in given} == {(i, FinishReason.LENGTH) for i in range(n)}
    told = [token.token_id for event in events if isinstance(event, PromptLogprobs) for token in event.tokens]
    assert told == PROMPT
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (len(PROMPT), 0)


async def test_a_prompt_that_fills_the_context_is_computed_if_nothing_more_is_wanted():
    async with running() as bench:
        events = await bench.collect([1] * 128, max_tokens=0, prompt_logprobs=0)
        assert sum(len(event.tokens) for event in events if isinstance(event, PromptLogprobs)) == 128
        with pytest.raises(ContextLengthExceeded):
            await bench.collect([1] * 128, max_tokens=1)
        with pytest.raises(ContextLengthExceeded):
            await bench.collect([1] * 129, max_tokens=0)
        await bench.until_free()


async def test_more_tokens_than_the_context_leaves_are_not_promised():
    async with running() as bench:
        with pytest.raises(InvalidRequest, match=r"stopping.min_tokens: is 29; .* room for 28"):
            await bench.collect([1] * 100, max_tokens=None, min_tokens=29)
        events = await bench.collect([1] * 100, max_tokens=None, min_tokens=28)
        assert len(token_ids(events)) == 28


@pytest.mark.parametrize("minimum", [0, 1, 4, 100])
async def test_min_delta_tokens_changes_the_cut_alone(minimum):
    async with running() as bench:
        events = await bench.collect(request={"min_delta_tokens": minimum}, max_tokens=10)
    assert token_ids(events) == expected_completion(PROMPT, 7, 10, VOCAB)
    assert all(len(d.token_ids) >= minimum for d in deltas(events)[:-1])


async def test_a_stop_string_ends_the_sequence_and_the_computation():
    tokens = expected_completion(PROMPT, 7, 60, VOCAB)
    decoded = byte_codec().decode(tokens)
    stop = next(c for c in decoded if c.isascii() and c.isprintable())
    async with running() as bench:
        events = await bench.collect(stop=(stop,), max_tokens=60)
        await bench.until_free()
    last = deltas(events)[-1]
    assert (last.finish_reason, last.stop_string) == (FinishReason.STOP, stop)
    assert text(events) == decoded[: decoded.index(stop)]
    used = token_ids(events)
    assert used == tokens[: len(used)]
    assert used[-1] == ord(stop)
    assert events[-1].completion_tokens == len(used)


def test_what_the_engine_computes_before_it_hears_of_a_stop_string_is_dropped():
    stream = RequestStream(Request("1", PROMPT, SamplingParams(n=2, stop=("b",))), byte_codec(), keeps_text=True)
    stream.start(RequestStarted("1", 1.0, 0))
    assert stream.push(SequenceOutput("1", 0, 1.0, list(b"ab")))
    assert not stream.push(SequenceOutput("1", 0, 2.0, list(b"cb"), finish_reason=FinishReason.LENGTH))
    assert stream.texts == ["a", ""]
    assert stream.progress.num_completion_tokens == 2
    assert stream.progress.finish_reasons == {0: FinishReason.STOP}


def test_guesses_behind_a_stop_string_were_not_accepted():
    stream = RequestStream(Request("1", PROMPT, SamplingParams(stop=("b",))), byte_codec())
    stream.start(RequestStarted("1", 1.0, 0))
    stream.push(SequenceOutput("1", 0, 1.0, list(b"abcd"), draft=DraftCounts(DraftSource.NGRAM, 5, 3)))
    assert stream.progress.num_completion_tokens == 2
    assert stream.progress.drafts == {DraftSource.NGRAM: DraftTotals(1, 5, (1, 1))}


def test_guesses_are_summed_up_by_source_and_place():
    stream = RequestStream(Request("1", PROMPT, SamplingParams(max_tokens=9)), byte_codec())
    stream.start(RequestStarted("1", 1.0, 0))
    stream.push(SequenceOutput("1", 0, 1.0, list(b"ab"), draft=DraftCounts(DraftSource.NGRAM, 4, 1)))
    before = stream.progress.copied()
    stream.push(SequenceOutput("1", 0, 2.0, list(b"c"), draft=DraftCounts(DraftSource.NGRAM, 2, 0)))
    stream.push(SequenceOutput("1", 0, 3.0, list(b"d")))
    stream.push(SequenceOutput("1", 0, 4.0, list(b"efg"), draft=DraftCounts(DraftSource.NGRAM, 2, 2)))
    last = DraftCounts(DraftSource.SUFFIX, 1, 1)
    stream.push(SequenceOutput("1", 0, 5.0, list(b"hi"), finish_reason=FinishReason.LENGTH, draft=last))
    expected = {DraftSource.NGRAM: DraftTotals(3, 8, (2, 1)), DraftSource.SUFFIX: DraftTotals(1, 1, (1,))}
    assert stream.progress.drafts == expected
    assert stream._finished.drafts == expected
    # A record of the request is as it was when it was made.
    assert before["drafts"] == {DraftSource.NGRAM: DraftTotals(1, 4, (1,))}


async def test_eos_ends_a_sequence_and_is_counted_but_not_shown():
    tokens = expected_completion(PROMPT, 7, 10, VOCAB)
    eos = next(t for t in tokens[2:] if t not in tokens[:2])
    async with running(eos=[eos]) as bench:
        events = await bench.collect(max_tokens=50)
        ignored = await bench.collect(max_tokens=10, ignore_eos=True)
    shown = token_ids(events)
    assert shown[-1] == eos
    assert deltas(events)[-1].stop_token_id == eos
    assert text(events) == bench.codec.decode(shown[:-1])
    assert token_ids(ignored) == tokens


async def test_token_ids_in_and_out_need_no_text():
    async with running() as bench:
        bench.engine.codec = None
        events = await bench.collect(detokenize=False)
    assert text(events) == ""
    assert len(token_ids(events)) == 6


async def test_closing_the_iterator_frees_the_blocks():
    async with running() as bench:
        stream = bench.engine.generate(PROMPT, SamplingParams(seed=7, n=3))
        await anext(stream)
        await stream.aclose()
        await bench.until_free()


async def test_cancelling_the_reader_frees_the_blocks():
    async with running() as bench:
        bench.executor.gate.clear()
        task = asyncio.create_task(bench.collect())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        bench.executor.gate.set()
        await bench.until_free()
        assert await bench.collect()


async def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    async with running() as bench:
        with pytest.raises(ContextLengthExceeded) as refusal:
            await bench.collect([1] * 128)
        events = await bench.collect([1] * 127, max_tokens=None)
    assert refusal.value.facts == {"prompt_tokens": 128, "max_context_tokens": 128}
    assert deltas(events)[-1].finish_reason is FinishReason.CONTEXT


async def test_an_empty_text_and_a_chat_without_template_are_refused():
    async with running() as bench:
        for prompt, field in (("", "text"), (Chat([{"role": "user", "content": "hi"}]), "chat")):
            with pytest.raises(InvalidRequest) as refusal:
                await bench.collect(prompt)
            assert refusal.value.violations[0].field == field


async def test_one_request_above_the_queue_bound_is_refused_and_the_others_run():
    async with running(max_num_seqs=1, max_waiting=3) as bench:
        bench.executor.gate.clear()
        tasks = [asyncio.create_task(bench.collect()) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as refusal:
            await bench.collect()
        assert refusal.value.retry_after_s > 0
        bench.executor.gate.set()
        for events in await asyncio.gather(*tasks):
            assert isinstance(events[-1], Finished)
        assert await bench.collect()


async def test_refused_and_cancelled_requests_leave_the_queue():
    async with running(max_waiting=2) as bench:
        for _ in range(5):
            with pytest.raises(ContextLengthExceeded):
                await bench.collect([1] * 500)
        bench.executor.gate.clear()
        for _ in range(5):
            task = asyncio.create_task(bench.collect())
            await asyncio.sleep(0.01)
            task.cancel()
        bench.executor.gate.set()
        assert await bench.collect()


async def test_deadline_cuts_a_waiting_and_a_running_request():
    async with running(max_num_seqs=1) as bench:
        with pytest.raises(DeadlineExceeded) as failure:
            await bench.collect(request={"timeout_s": 0.0})
        assert failure.value.facts["phase"] == "waiting"
        bench.executor.gate.clear()
        run = asyncio.create_task(bench.collect(request={"timeout_s": 0.1}, max_tokens=100))
        wait = asyncio.create_task(bench.collect(request={"timeout_s": 0.1}))
        await asyncio.sleep(0.2)
        bench.executor.gate.set()
        for task, phase in ((run, "running"), (wait, "waiting")):
            with pytest.raises(DeadlineExceeded) as failure:
                await task
            assert failure.value.facts["phase"] == phase
        await bench.until_free()


async def test_time_limit_is_an_ordinary_end():
    async with running() as bench:
        events = await bench.collect(time_limit_s=1e-9, max_tokens=100)
    assert deltas(events)[-1].finish_reason is FinishReason.TIME_LIMIT
    assert isinstance(events[-1], Finished)


async def test_operator_cancels_by_label_every_request_that_bears_it():
    async with running() as bench:
        bench.executor.gate.clear()
        doomed = [asyncio.create_task(bench.collect(request={"label": "x"})) for _ in range(2)]
        spared = asyncio.create_task(bench.collect(request={"label": "y"}))
        await asyncio.sleep(0.05)
        assert bench.engine.cancel("x") == 2
        assert bench.engine.cancel("nobody") == 0
        bench.executor.gate.set()
        for task in doomed:
            with pytest.raises(CancelledByOperator):
                await task
        assert isinstance((await spared)[-1], Finished)
        await bench.until_free()


async def test_a_failed_step_fails_its_requests_alone():
    async with running() as bench:
        bench.executor.is_broken = True
        with pytest.raises(EngineFailure):
            await bench.collect()
        bench.executor.is_broken = False
        assert isinstance((await bench.collect())[-1], Finished)


async def test_an_error_in_delivery_fails_that_request_alone(monkeypatch):
    async with running() as bench:
        real = bench.codec.detokenizer

        def explode(**options):
            detokenizer = real(**options)
            monkeypatch.setattr(bench.codec, "detokenizer", real)
            monkeypatch.setattr(detokenizer, "feed", lambda _: 1 / 0)
            return detokenizer

        monkeypatch.setattr(bench.codec, "detokenizer", explode)
        bad, good = await asyncio.gather(bench.collect(), bench.collect(), return_exceptions=True)
        assert isinstance(bad, EngineFailure)
        assert isinstance(good[-1], Finished)
        await bench.until_free()


async def test_a_dead_engine_thread_is_unhealthy_and_refuses_at_once(monkeypatch):
    async with running() as bench:
        monkeypatch.setattr(bench.scheduler, "commit", lambda *_: 1 / 0)
        with pytest.raises(EngineFailure):
            await bench.collect()
        bench.core._thread.join(SECONDS)
        assert "died" in bench.engine.health()
        with pytest.raises(NotReady):
            await bench.collect()
        with pytest.raises(NotReady):
            await bench.engine.reset_cache()


@pytest.mark.parametrize("method", ["add", "schedule", "commit"])
async def test_nobody_waits_for_an_engine_that_died(monkeypatch, method):
    async with running() as bench:
        bench.executor.gate.clear()
        tasks = [asyncio.create_task(bench.collect(max_tokens=100)) for _ in range(3)]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(bench.scheduler, method, lambda *_: 1 / 0)
        tasks.append(asyncio.create_task(bench.collect(max_tokens=100)))
        # The shut gate holds a step until the fourth request is posted.
        await asyncio.sleep(0.05)
        bench.executor.gate.set()
        async with asyncio.timeout(SECONDS):
            await bench.engine.wait_until_ended()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineFailure | NotReady)


async def test_steps_that_keep_failing_are_unhealthy_until_one_succeeds():
    async with running() as bench:
        bench.executor.is_broken = True
        for _ in range(3):
            assert bench.engine.health() is None
            with pytest.raises(EngineFailure):
                await bench.collect()
        assert "the last 3 steps failed" in bench.engine.health()
        bench.executor.is_broken = False
        await bench.collect()
        assert bench.engine.health() is None


async def test_a_token_that_only_the_tokenizer_knows_is_refused_and_harms_nobody():
    async with running() as bench:
        bench.codec._backend.add_special_tokens(["<image>"])
        good, bad = await asyncio.gather(bench.collect(), bench.collect("a <image>"), return_exceptions=True)
        assert isinstance(good[-1], Finished)
        assert isinstance(bad, InvalidRequest)
        assert "the model knows 0 to 255" in str(bad)


async def test_the_engine_refuses_an_empty_list_of_tokens():
    async with running() as bench:
        with pytest.raises(InvalidRequest):
            await bench.collect([])
        assert bench.engine.health() is None


async def test_operator_cancels_a_request_that_is_being_encoded(monkeypatch):
    async with running() as bench:
        encoding, begun = threading.Event(), asyncio.Event()
        loop, real = asyncio.get_running_loop(), bench.codec.encode_prompt

        def slow(prompt, **how):
            loop.call_soon_threadsafe(begun.set)
            assert encoding.wait(SECONDS)
            return real(prompt, **how)

        monkeypatch.setattr(bench.codec, "encode_prompt", slow)
        task = asyncio.create_task(bench.collect("once", request={"label": "x"}))
        await begun.wait()
        assert bench.engine.cancel("x") == 1
        encoding.set()
        with pytest.raises(CancelledByOperator):
            await task


async def test_a_stalled_step_is_unhealthy_until_steps_resume():
    async with running(step_timeout_s=0.05) as bench:
        assert bench.engine.health() is None
        bench.executor.gate.clear()
        task = asyncio.create_task(bench.collect())
        await asyncio.sleep(0.3)
        assert "no step has ended" in bench.engine.health()
        bench.executor.gate.set()
        await task
        assert bench.engine.health() is None


async def test_drain_refuses_new_requests_and_waits_for_running_ones():
    async with running() as bench:
        bench.executor.gate.clear()
        task = asyncio.create_task(bench.collect())
        await asyncio.sleep(0.05)
        drain = asyncio.create_task(bench.engine.drain(SECONDS))
        await asyncio.sleep(0.01)
        assert "draining" in bench.engine.health()
        with pytest.raises(NotReady):
            await bench.collect()
        bench.executor.gate.set()
        await drain
        assert isinstance((await task)[-1], Finished)


async def test_drain_cuts_what_outlasts_its_bound():
    async with running() as bench:
        bench.executor.gate.clear()
        task = asyncio.create_task(bench.collect())
        await asyncio.sleep(0.05)
        await bench.engine.drain(0.05)
        with pytest.raises(NotReady):
            await task


async def test_a_long_prompt_does_not_hold_up_other_streams(monkeypatch):
    async with running() as bench:
        encoding = threading.Event()
        real = bench.codec.encode_prompt

        def slow(prompt, **how):
            assert encoding.wait(SECONDS)
            return real(prompt, **how)

        monkeypatch.setattr(bench.codec, "encode_prompt", slow)
        waiting = asyncio.create_task(bench.collect("once upon"))
        assert isinstance((await bench.collect(PROMPT))[-1], Finished)
        assert not waiting.done()
        encoding.set()
        assert isinstance((await waiting)[-1], Finished)


async def test_long_prompts_do_not_hold_up_short_ones_however_many_they_are(monkeypatch):
    async with running() as bench:
        encoding = threading.Event()
        real = bench.codec.encode_prompt

        def slow_if_long(prompt, **how):
            if prompt != "once upon":
                assert encoding.wait(SECONDS)
            return real(prompt, **how)

        monkeypatch.setattr(bench.codec, "encode_prompt", slow_if_long)
        chat = Chat([{"role": "user", "content": "a" * LONG_PROMPT_CHARS}])
        long = [asyncio.create_task(bench.collect(p)) for p in ["a" * LONG_PROMPT_CHARS, chat] * 3]
        await asyncio.sleep(0)  # they are all given to threads
        assert isinstance((await bench.collect("once upon"))[-1], Finished)
        encoding.set()
        refusals = await asyncio.gather(*long, return_exceptions=True)
        assert [type(r) for r in refusals] == [ContextLengthExceeded, InvalidRequest] * 3


async def test_a_prompt_that_is_too_long_is_refused_before_a_look_at_its_tokens():
    async with running() as bench:
        with pytest.raises(ContextLengthExceeded):
            await bench.collect([VOCAB] * 128)


async def test_the_acceptance_ratio_is_of_guessed_tokens():
    async with running() as bench:
        assert bench.engine.stats().draft_acceptance_ratio == 0
        bench.executor._draft = two_right_drafts
        await bench.collect(max_tokens=6)
        assert bench.engine.stats().draft_acceptance_ratio == 3 / 4


async def test_statistics_and_cache_reset():
    async with running() as bench:
        await bench.collect(list(range(20)))
        await bench.collect(list(range(20)))
        stats = bench.engine.stats()
        assert stats.prefix_hit_ratio == 16 / 40
        assert stats.tokens_per_s == 12 / 10
        assert stats.scheduler.num_cached_blocks == 6
        assert await bench.engine.reset_cache() == 6
        assert bench.engine.stats().scheduler.num_cached_blocks == 0


def test_rolling_sum_forgets(monkeypatch):
    now = 100.0
    monkeypatch.setattr("nanoserve.engine.statistics.time.monotonic", lambda: now)
    total = RollingSum(10)
    total.add(3)
    now = 105.5
    total.add(4)
    assert total.total == 7
    now = 110.1
    assert total.total == 4
    now = 120.0
    assert total.total == 0


async def test_a_prompts_blocks_are_named_before_the_step_loop_has_the_request(monkeypatch):
    async with running() as bench:
        posted = []
        add = bench.scheduler.add
        monkeypatch.setattr(bench.scheduler, "add", lambda request: (posted.append(request), add(request)))
        prompt = list(range(4 * BLOCK + 1))
        await bench.collect(prompt, max_tokens=1)
        await bench.collect(prompt, max_tokens=1, request={"cache_salt": "other"})
        first, salted = posted
        assert len(first.block_hashes) == 4
        assert not set(first.block_hashes) & set(salted.block_hashes)
        # By these names a later request finds the first one's blocks.
        [started] = [e for e in await bench.collect(prompt, max_tokens=1) if isinstance(e, Started)]
        assert started.cached_tokens == 4 * BLOCK
