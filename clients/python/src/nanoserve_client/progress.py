"""What one stream has said so far. Pure: the two clients' streams read the events, and this makes sense of them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from nanoserve_client.errors import Metadata, NanoserveError, from_status
from nanoserve_client.results import (
    Completion,
    Delta,
    Result,
    Started,
    Timing,
    TokenLogprob,
    UnenforcedKeyword,
    Usage,
    constraint_outcome_of,
    drafts_of,
    joined_calls,
)
from nanoserve_client.tracing import CallSpan
from nanoserve_client.v1 import generation_pb2 as pb


class Progress:
    """Turns the events of a stream into deltas, and gathers all of them for the result.

    The contract of the stream is `Started PromptLogprobs* Delta* Finished`, then status OK. Used by one thread at a
    time.
    """

    def __init__(
        self,
        request_id: str | None,
        span: CallSpan | None = None,
        parse: Callable[[str], Any] | None = None,
        *,
        is_parsed: bool = False,
    ) -> None:
        """parse: what makes Completion.parsed of a text. is_parsed: the server tells the parts of a text apart."""
        self.started: Started | None = None
        # The caller's label, to name the request by before the server has.
        self._request_id = request_id
        self._span = span
        self._parse = parse
        self._is_parsed = is_parsed
        self._prompt_logprobs: list[TokenLogprob] = []
        # By sequence, in order of arrival.
        self._deltas: defaultdict[int, list[Delta]] = defaultdict(list)
        self._finished: pb.Finished | None = None
        self._result: Result | None = None
        self._failure: NanoserveError | None = None

    def take(self, response: pb.GenerateResponse) -> Delta | None:
        """Note an event. Returns the delta if it is one; an event of an unknown kind is skipped."""
        match response.WhichOneof("event"):
            case "started":
                self.started = Started.of(response.started)
            case "prompt_logprobs":
                self._prompt_logprobs += map(TokenLogprob.of, response.prompt_logprobs.tokens)
            case "delta":
                delta = Delta.of(response.delta)
                self._deltas[delta.index].append(delta)
                return delta
            case "finished":
                self._finished = response.finished
        return None

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Those that have come."""
        return self._prompt_logprobs

    def end(self) -> None:
        """Note that the stream ended, by itself with status OK or earlier with `fail`.

        Raises the failure; or a NanoserveError if an OK stream lacks an event that it must have.
        """
        if self._failure is not None:
            raise self._failure
        self._end_span(grpc.StatusCode.OK)
        if self._result is None:
            self._result = self._gather()

    def fail(self, code: grpc.StatusCode, message: str | None, trailers: Metadata | None) -> NanoserveError:
        """Note that the stream ended with this status. Returns what to raise."""
        self._end_span(code)
        request_id = self.started.request_id if self.started else self._request_id
        self._failure = from_status(code, message, trailers, request_id)
        return self._failure

    def cancel(self) -> None:
        """Note that nobody reads on."""
        self._end_span(grpc.StatusCode.CANCELLED)

    def _end_span(self, code: grpc.StatusCode) -> None:
        if self._span is not None:
            self._span.end(code)

    def result(self) -> Result:
        """All that the stream said. Call it when `end` has returned."""
        if self._result is None:
            raise ValueError("the stream has not ended")
        return self._result

    def _gather(self) -> Result:
        completions = [self._join(index, deltas) for index, deltas in sorted(self._deltas.items())]
        if self.started is None or self._finished is None or None in completions:
            raise NanoserveError(
                grpc.StatusCode.DATA_LOSS,
                "the stream ended before the request did",
                reason="STREAM_INCOMPLETE",
                request_id=self.started.request_id if self.started else self._request_id,
            )
        usage, timing = self._finished.usage, self._finished.timing
        return Result(
            started=self.started,
            completions=tuple(c for c in completions if c is not None),
            usage=Usage(
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                drafts_of(usage),
                usage.reasoning_tokens,
            ),
            timing=Timing(
                queue_s=timing.queue.ToTimedelta().total_seconds(),
                prefill_s=timing.prefill.ToTimedelta().total_seconds(),
                decode_s=timing.decode.ToTimedelta().total_seconds(),
                preemptions=timing.preemptions,
            ),
            prompt_logprobs=tuple(self._prompt_logprobs),
            unenforced=tuple(map(UnenforcedKeyword.of, self._finished.unenforced)),
        )

    def _join(self, index: int, deltas: list[Delta]) -> Completion | None:
        """The whole sequence; None if it has not ended."""
        last = deltas[-1]
        if last.finish_reason is None:
            return None
        outcomes = self._finished.constraint_outcomes if self._finished is not None else ()
        return Completion(
            index=index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            finish_reason=last.finish_reason,
            stop_string=last.stop_string,
            stop_token_id=last.stop_token_id,
            constraint_outcome=constraint_outcome_of(outcomes[index]) if index < len(outcomes) else None,
            reasoning="".join(delta.reasoning for delta in deltas) if self._is_parsed else None,
            content="".join(delta.content for delta in deltas) if self._is_parsed else None,
            tool_calls=joined_calls(piece for delta in deltas for piece in delta.tool_calls),
            parse=self._parse,
        )
