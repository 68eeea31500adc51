"""One call of Engine.generate, from the moment it is made: what was asked, and what observers may know of it."""

from dataclasses import dataclass
from typing import Any

from nanoserve.engine.chat_template import Chat
from nanoserve.engine.reply import Reply, Wanted
from nanoserve.engine.stream import RequestStream
from nanoserve.errors import RequestError
from nanoserve.observer import RequestRecord
from nanoserve.request import SamplingParams

# A prompt: text as it is, token ids as they are, or a conversation for the chat template.
Prompt = str | list[int] | Chat


@dataclass(slots=True, eq=False)
class Arrival:
    """One call of `generate`: what was asked, and what became of it."""

    # Becomes Request.id.
    number: int
    # The caller's name for it.
    label: str
    prompt: Prompt
    params: SamplingParams
    priority: int
    # time.monotonic(), now and at the hard deadline.
    arrival_s: float
    deadline_s: float | None
    cache_salt: str
    skip_cache_read: bool
    wanted: Wanted
    # Name of an adapter. Empty = none.
    adapter: str
    # Of a conversation whose prompt is encoded.
    reply: Reply | None = None
    # An operator ended it while its prompt was encoded.
    is_cancelled: bool = False
    # None until its prompt is encoded; from then on `params` has the seed.
    stream: RequestStream | None = None
    end_s: float | None = None
    error: RequestError | None = None

    @property
    def _constraint(self) -> str:
        """By the name of the contract's field; "tools" where only calls are held to something."""
        if self.wanted.constraint is not None:
            return self.wanted.constraint.kind.value
        return "tools" if self.reply is not None and self.reply.constraint is not None else ""

    def record(self, *, wants_content: bool) -> RequestRecord:
        """What observers may know of it by now."""
        stream = self.stream
        content: dict[str, Any] = {}
        if wants_content:
            content["prompt"] = self.prompt.messages if isinstance(self.prompt, Chat) else self.prompt
            content["texts"] = tuple((stream and stream.texts) or [""] * self.params.n)
        return RequestRecord(
            label=self.label,
            arrival_s=self.arrival_s,
            number=self.number,
            params=self.params,
            priority=self.priority,
            is_chat=isinstance(self.prompt, Chat),
            id=stream.request.id if stream else "",
            num_prompt_tokens=len(stream.request.prompt_token_ids) if stream else 0,
            end_s=self.end_s,
            error=self.error,
            constraint=self._constraint,
            adapter=self.adapter,
            adapter_revision=stream.adapter_revision if stream else "",
            **(stream.progress.copied() if stream else {}),
            **content,
        )
