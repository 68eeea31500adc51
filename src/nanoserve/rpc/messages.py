"""Domain to proto: what the engine reports, as messages of the contract. validate.py is the way back."""

from collections.abc import Callable, Iterator, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

from nanoserve.adapter.vocabulary import AdapterInfo, AdapterStats, AdapterStatus, Residency
from nanoserve.constraint.outcome import Outcome
from nanoserve.engine.engine import ServedModel
from nanoserve.engine.statistics import Stats
from nanoserve.engine.stream import Delta, Finished, PromptLogprobs, Started
from nanoserve.request import ConstraintReport, DraftSource, FinishReason, SamplingParams, TokenLogprob, Treatment

# Tokens with 20 alternatives each: about 4 ms of the event loop's time, and far below the 4 MiB that clients take.
PROMPT_LOGPROBS_A_MESSAGE = 64
# In an answer: below the 4 MiB that clients take, however long the pointers are.
MAX_KEYWORD_USES = 1000

# The contract has the same names, with a prefix.
FINISH_REASONS = {reason: generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
DRAFT_SOURCES = {source: generation_pb2.DraftSource.Value(f"DRAFT_SOURCE_{source.name}") for source in DraftSource}
OUTCOMES = {each: generation_pb2.ConstraintOutcome.Value(f"CONSTRAINT_OUTCOME_{each.name}") for each in Outcome}
RESIDENCIES = {each: admin_pb2.AdapterResidency.Value(f"ADAPTER_RESIDENCY_{each.name}") for each in Residency}
KEYWORD_TREATMENTS: dict[Treatment, "model_pb2.KeywordTreatment.ValueType"] = {
    each: model_pb2.KeywordTreatment.Value(f"KEYWORD_TREATMENT_{each.name}")
    for each in Treatment
    if each is not Treatment.REFUSED
}

# The bytes of a token.
TokenBytes = Callable[[int], bytes]


def started(event: Started, *, request_id: str, model: str, arrival_s: float) -> generation_pb2.GenerateResponse:
    """`arrival_s` in Unix time."""
    return generation_pb2.GenerateResponse(
        started=generation_pb2.Started(
            request_id=request_id,
            model=model,
            create_time=timestamp(arrival_s),
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            sampling=_sampling(event.params),
            adapter=event.adapter.name if event.adapter else "",
            adapter_revision=event.adapter.revision if event.adapter else "",
        )
    )


def prompt_logprobs(event: PromptLogprobs, token_bytes: TokenBytes) -> Iterator[generation_pb2.GenerateResponse]:
    """In as many messages as it takes."""
    for start in range(0, len(event.tokens), PROMPT_LOGPROBS_A_MESSAGE):
        part = event.tokens[start : start + PROMPT_LOGPROBS_A_MESSAGE]
        yield generation_pb2.GenerateResponse(
            prompt_logprobs=generation_pb2.PromptLogprobs(tokens=_logprobs(part, token_bytes))
        )


def delta(event: Delta, token_bytes: TokenBytes) -> generation_pb2.GenerateResponse:
    message = generation_pb2.Delta(
        index=event.index,
        text=event.text,
        token_ids=event.token_ids,
        logprobs=_logprobs(event.logprobs, token_bytes),
    )
    if event.parts is not None:
        message.reasoning, message.content = event.parts.reasoning, event.parts.content
        for piece in event.parts.calls:
            message.tool_calls.add(
                index=piece.index,
                id=piece.id,
                name=piece.name,
                arguments_json=piece.arguments,
                complete=piece.is_complete,
            )
    if event.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[event.finish_reason]
    if event.stop_string is not None:
        message.stop_string = event.stop_string
    elif event.stop_token_id is not None:
        message.stop_token_id = event.stop_token_id
    return generation_pb2.GenerateResponse(delta=message)


def finished(event: Finished) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        finished=generation_pb2.Finished(
            usage=generation_pb2.Usage(
                prompt_tokens=event.prompt_tokens,
                cached_tokens=event.cached_tokens,
                completion_tokens=event.completion_tokens,
                draft_tokens=sum(totals.num_tokens for totals in event.drafts.values()),
                accepted_draft_tokens=sum(totals.num_accepted for totals in event.drafts.values()),
                drafts=[
                    generation_pb2.DraftUsage(
                        source=DRAFT_SOURCES[source], tokens=totals.num_tokens, accepted_tokens=totals.num_accepted
                    )
                    for source, totals in event.drafts.items()
                ],
                reasoning_tokens=event.reasoning_tokens,
            ),
            timing=generation_pb2.Timing(
                queue=duration(event.queue_s),
                prefill=duration(event.prefill_s),
                decode=duration(event.decode_s),
                preemptions=event.preemptions,
            ),
            constraint_outcomes=[OUTCOMES[each] for each in event.outcomes],
            unenforced=[
                generation_pb2.UnenforcedKeyword(pointer=use.pointer, keyword=use.keyword, why=use.why, field=use.field)
                for use in event.relaxed[:MAX_KEYWORD_USES]
            ],
        )
    )


def model(served: ServedModel) -> model_pb2.Model:
    return model_pb2.Model(
        name=served.name,
        create_time=timestamp(served.create_time_s),
        max_context_tokens=served.max_context_tokens,
        vocab_size=served.vocab_size,
        eos_token_ids=served.eos_token_ids,
        default_sampling=_sampling(served.default_params),
        max_draft_tokens=served.max_draft_tokens,
        draft_sources=[DRAFT_SOURCES[source] for source in served.draft_sources],
        draft_model=served.draft_model,
        reasoning_parser=served.dialect.reasoning.names[0] if served.dialect.reasoning else "",
        tool_call_parser=served.dialect.calls.names[0] if served.dialect.calls else "",
    )


def adapter_model(served: ServedModel, name: str, info: AdapterInfo | None) -> model_pb2.Model:
    """An adapter, among the models. info: None = it was not read yet."""
    message = model(served)
    message.name, message.base_model, message.lora_rank = name, served.name, info.rank if info else 0
    return message


def adapter(status: AdapterStatus) -> admin_pb2.Adapter:
    info = status.info
    return admin_pb2.Adapter(
        name=info.adapter.name,
        revision=info.adapter.revision,
        path=info.path,
        rank=info.rank,
        bytes=info.num_bytes,
        residency=RESIDENCIES[status.residency],
        pinned=info.is_pinned,
        running=status.num_running,
        waiting=status.num_waiting,
    )


def adapters(stats: AdapterStats) -> admin_pb2.ListAdaptersResponse:
    return admin_pb2.ListAdaptersResponse(
        adapters=map(adapter, stats.adapters),
        memory_bytes=stats.num_bytes,
        memory_limit_bytes=stats.max_bytes,
        slots=stats.num_slots,
    )


def constraint_check(report: ConstraintReport) -> model_pb2.CheckConstraintResponse:
    others = [use for use in report.keywords if use.treatment is not Treatment.RELAXED]
    return model_pb2.CheckConstraintResponse(
        enforced=not report.relaxed,
        keywords=[
            model_pb2.KeywordUse(
                pointer=use.pointer, keyword=use.keyword, treatment=KEYWORD_TREATMENTS[use.treatment], why=use.why
            )
            for use in [*report.relaxed, *others][:MAX_KEYWORD_USES]
        ],
        keyword_count=len(report.keywords),
        grammar_bytes=report.num_grammar_bytes,
        compile=duration(report.compile_s),
        first_mask=duration(report.first_mask_s),
    )


def stats(snapshot: Stats) -> admin_pb2.GetStatsResponse:
    scheduler = snapshot.scheduler
    return admin_pb2.GetStatsResponse(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        kv_blocks_total=scheduler.num_blocks,
        kv_blocks_used=scheduler.num_owned_blocks,
        kv_blocks_cached=scheduler.num_cached_blocks,
        kv_block_tokens=scheduler.block_size,
        prefix_hit_ratio=snapshot.prefix_hit_ratio,
        draft_acceptance_ratio=snapshot.draft_acceptance_ratio,
        tokens_per_second=snapshot.tokens_per_s,
        uptime=duration(snapshot.uptime_s),
        preemptions=scheduler.num_preemptions,
    )


def _sampling(params: SamplingParams) -> generation_pb2.Sampling:
    """Every scalar is set that has a value."""
    names = (field.name for field in generation_pb2.Sampling.DESCRIPTOR.fields)
    return generation_pb2.Sampling(**{name: getattr(params, name) for name in names})


def _logprobs(tokens: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[generation_pb2.TokenLogprob]:
    return [
        generation_pb2.TokenLogprob(
            token_id=token.token_id,
            token=token_bytes(token.token_id),
            logprob=token.logprob,
            rank=token.rank,
            top=_logprobs(token.top, token_bytes),
        )
        for token in tokens
    ]


def duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def timestamp(unix_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(unix_s * 1e6))
    return timestamp
