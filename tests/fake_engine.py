"""An engine's face without an engine: it "generates" bytes of a fixed text, or what a test scripts.

Its vocabulary is the 256 bytes and one EOS, so tokens split characters, as real ones do.
"""

import asyncio
import codecs
import dataclasses
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from nanoserve.adapter.vocabulary import Adapter, AdapterInfo, AdapterStats, AdapterStatus, Residency
from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.constraint.vocabulary import Vocabulary
from nanoserve.dialect.formats import Dialect, call_format, reasoning_format
from nanoserve.engine.chat_template import Chat
from nanoserve.engine.engine import ServedModel
from nanoserve.engine.statistics import Stats
from nanoserve.engine.stream import Delta, Finished, PromptLogprobs, Started, StreamEvent
from nanoserve.errors import AdapterInUse, AdapterNotFound, CancelledByOperator, ContextLengthExceeded, NotReady
from nanoserve.kv_cache.block_pool import BlockNames
from nanoserve.request import Constraint, ConstraintReport, DraftSource, FinishReason, SamplingParams, TokenLogprob
from nanoserve.step_record import SchedulerStats

EOS = 256
# A token each byte, and EOS.
VOCABULARY = Vocabulary((*(bytes([i]) for i in range(256)), b"<eos>"), (EOS,), (EOS,))
COMPILER = ConstraintCompiler(lambda: VOCABULARY)
Events = AsyncGenerator[StreamEvent, None]
Script = Callable[[SamplingParams], Events]


class FakeCodec:
    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        kept = [t for t in token_ids if not (skip_special_tokens and t == EOS)]
        return b"".join(self.token_bytes(t) for t in kept).decode(errors="replace")


class FakeEngine:
    """Event loop thread. `calls` has the arguments of each generate(), `num_open` the streams not yet closed."""

    def __init__(self) -> None:
        self.model = ServedModel(
            name="fake",
            create_time_s=1_700_000_000.25,
            max_context_tokens=200,
            vocab_size=257,
            eos_token_ids=(EOS,),
            default_params=SamplingParams(temperature=0.75, top_k=40, max_tokens=99),
            block_names=BlockNames("fake", 16, is_cache_enabled=True),
            max_draft_tokens=8,
            draft_sources=(DraftSource.NGRAM, DraftSource.DRAFT_MODEL),
            draft_model="smaller",
            dialect=Dialect(reasoning_format("qwen3"), call_format("hermes")),
        )
        self.codec = FakeCodec()
        self.script: Script | None = None
        self.why_not_ready: str | None = None
        self.calls: list[dict[str, Any]] = []
        self.num_open = 0
        self.num_resets = 0
        # By name; None = it lies on the disk, and was not read yet.
        self.adapter_names: dict[str, AdapterInfo | None] = {}
        # Arguments of each unload_adapter().
        self.unloads: list[tuple[str, float]] = []
        self._operator_cancels: dict[str, list[asyncio.Event]] = {}

    async def generate(self, prompt: Any, params: SamplingParams, **options: Any) -> Events:
        self.calls.append({"prompt": prompt, "params": params, **options})
        if self.why_not_ready is not None:
            raise NotReady(self.why_not_ready, 1.5)
        if (name := options.get("adapter")) and name not in self.adapter_names:
            raise AdapterNotFound(name)
        self.num_open += 1
        try:
            events = self.script(params) if self.script else self._complete(prompt, params, options)
            async for event in events:
                yield event
        finally:
            self.num_open -= 1

    async def compile_constraint(self, constraint: Constraint) -> ConstraintReport:
        return (await asyncio.wrap_future(COMPILER.submit(constraint))).report

    async def tokenize(self, prompt: str | Chat, *, add_special_tokens: bool | None = None) -> tuple[list[int], str]:
        self.added_special_tokens = add_special_tokens
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt.messages)
        return list(text.encode()), text

    def cancel(self, label: str) -> int:
        waiting = self._operator_cancels.pop(label, [])
        for event in waiting:
            event.set()
        return len(waiting)

    async def reset_cache(self) -> int:
        self.num_resets += 1
        return 7

    def has_adapter(self, name: str) -> bool:
        return name in self.adapter_names

    async def load_adapter(
        self, name: str, path: str = "", *, is_pinned: bool = False, may_replace: bool = False
    ) -> AdapterInfo:
        """Of a folder named "gone" there is none. One whose path ends otherwise has other weights."""
        if path == "gone":
            raise AdapterNotFound(name)
        info = AdapterInfo(Adapter(name, f"digest-of-{path or name}"), f"/adapters/{path or name}", 8, 4096, is_pinned)
        loaded = self.adapter_names.get(name)
        if loaded is not None and loaded.adapter != info.adapter and not may_replace:
            raise AdapterInUse(name, "has other weights already")
        self.adapter_names[name] = info
        return info

    async def unload_adapter(self, name: str, drain_timeout_s: float) -> None:
        if self.adapter_names.pop(name, None) is None:
            raise AdapterNotFound(name)
        self.unloads.append((name, drain_timeout_s))

    async def list_adapters(self) -> AdapterStats:
        infos = [info for _, info in sorted(self.adapter_names.items()) if info is not None]
        statuses = tuple(AdapterStatus(info, Residency.ACTIVE, self.num_open, 2) for info in infos)
        return AdapterStats(statuses, sum(info.num_bytes for info in infos), 2**20, 16)

    def _adapter(self, name: str) -> Adapter:
        info = self.adapter_names[name]
        return Adapter(name, "digest-of-the-disk") if info is None else info.adapter

    def stats(self) -> Stats:
        scheduler = SchedulerStats(
            num_running=self.num_open,
            num_waiting=2,
            num_blocks=100,
            num_owned_blocks=self.num_open,
            num_cached_blocks=30,
            block_size=16,
            num_preemptions=4,
        )
        return Stats(scheduler, prefix_hit_ratio=0.25, draft_acceptance_ratio=0.75, tokens_per_s=12.5, uptime_s=61.5)

    def health(self) -> str | None:
        return self.why_not_ready

    async def drain(self, timeout_s: float) -> None:
        self.why_not_ready = "draining"
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.num_open:
                    await asyncio.sleep(0.01)

    def until_operator_cancel(self, label: str) -> Script:
        """A script that begins, and runs until cancel(label)."""

        async def script(params: SamplingParams) -> Events:
            cancelled = asyncio.Event()
            self._operator_cancels.setdefault(label, []).append(cancelled)
            yield Started(3, 0, params)
            await cancelled.wait()
            raise CancelledByOperator

        return script

    async def _complete(self, prompt: Any, params: SamplingParams, options: dict[str, Any]) -> Events:
        prompt_ids = prompt if isinstance(prompt, list) else (await self.tokenize(prompt))[0]
        if len(prompt_ids) >= self.model.max_context_tokens:
            raise ContextLengthExceeded(len(prompt_ids), self.model.max_context_tokens)
        if params.seed is None:
            params = dataclasses.replace(params, seed=random.getrandbits(20))
        adapter = self._adapter(name) if (name := options.get("adapter")) else None
        yield Started(len(prompt_ids), 1, params, adapter)
        if params.prompt_logprobs is not None:
            yield PromptLogprobs([logprob(t, params.prompt_logprobs) for t in prompt_ids])
        num_tokens = 0
        for index in range(params.n):
            room = self.model.max_context_tokens - len(prompt_ids)
            for delta in self._sequence(index, params, room, options["min_delta_tokens"]):
                num_tokens += len(delta.token_ids)
                yield delta
                await asyncio.sleep(0)
        yield Finished(len(prompt_ids), 1, num_tokens, 0.5, 0.25, 1.5, 3)

    def _sequence(self, index: int, params: SamplingParams, room: int, min_delta_tokens: int) -> list[Delta]:
        """A whole completion, cut into Deltas of the wanted size or of one and two tokens by turns."""
        seed = params.seed or 0
        phrase = f"naïve €{seed + index} café ".encode()
        ids = [phrase[k % len(phrase)] for k in range(params.max_tokens or 30)]
        reason, stop = FinishReason.LENGTH, None
        if params.max_tokens is None:
            ids, reason = [*ids, EOS], FinishReason.EOS
        if len(ids) > room:
            ids, reason = ids[:room], FinishReason.CONTEXT
        text = bytes(t for t in ids if t != EOS).decode(errors="replace")
        found = [s for s in params.stop if s in text]
        if found:
            stop = found[0]
            end = text.index(stop) + len(stop)
            ids = list(text[:end].encode())
            text = text[: end if params.include_stop else end - len(stop)]
            reason = FinishReason.STOP
        deltas, decoder, sent, start = [], codecs.getincrementaldecoder("utf-8")("replace"), 0, 0
        decoded = ""
        while start < len(ids):
            part = ids[start : start + (min_delta_tokens or 1 + start % 2)]
            start += len(part)
            is_last = start >= len(ids)
            decoded += decoder.decode(bytes(t for t in part if t != EOS), final=is_last)
            shown = text[: len(decoded)] if params.detokenize else ""
            deltas.append(
                Delta(
                    index=index,
                    text=shown[sent:],
                    token_ids=part,
                    logprobs=[] if params.logprobs is None else [logprob(t, params.logprobs) for t in part],
                    finish_reason=reason if is_last else None,
                    stop_string=stop if is_last else None,
                    stop_token_id=EOS if is_last and reason is FinishReason.EOS else None,
                )
            )
            sent = len(shown)
        return deltas


def logprob(token_id: int, alternatives: int) -> TokenLogprob:
    top = tuple(TokenLogprob(t, -0.5 - t, t + 1) for t in range(alternatives))
    return TokenLogprob(token_id, -0.5 - token_id, token_id + 1, top)
