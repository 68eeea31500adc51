"""One line in the log for each RPC, at its end: who asked, how it went, where the time was. Never what was said."""

import logging
from collections.abc import Iterator
from typing import Any

from nanoserve.observer import CallRecord, Observer

logger = logging.getLogger(__name__)


class AccessLog(Observer):
    """The fields of a line are attributes of its record too, for logs in JSON."""

    def call_ended(self, call: CallRecord) -> None:
        fields = dict(_fields(call))
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        logger.info("%s", line, extra={"fields": fields})


def _fields(call: CallRecord) -> Iterator[tuple[str, Any]]:
    yield "rpc", call.method.rpartition("/")[2]
    yield "code", call.code
    yield "seconds", round(call.end_s - call.start_s, 6)
    if call.reason:
        yield "reason", call.reason
    if (request := call.request) is None:
        return
    yield "phase", "waiting" if request.started_s is None else "running"
    yield "prompt_tokens", request.num_prompt_tokens
    yield "cached_tokens", request.num_cached_tokens
    yield "completion_tokens", request.num_completion_tokens
    if request.num_preemptions:
        yield "preemptions", request.num_preemptions
    if request.finish_reasons:
        yield "finish_reasons", ",".join(reason.value for _, reason in sorted(request.finish_reasons.items()))
    if request.adapter:
        yield "adapter", request.adapter
    if request.adapter_revision:
        yield "adapter_revision", request.adapter_revision
    if request.constraint:
        yield "constraint", request.constraint
    if request.outcomes:
        yield "outcomes", ",".join(request.outcomes)
    ends = [request.started_s, request.first_token_s, request.last_token_s]
    begin_s = call.start_s
    for name, end_s in zip(("queue_s", "prefill_s", "decode_s"), ends, strict=True):
        if end_s is not None:
            yield name, round(end_s - begin_s, 6)
            begin_s = end_s
