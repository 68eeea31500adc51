"""Client of the nanoserve LLM server, over gRPC: typed, streaming, synchronous and asyncio.

client.py · aio.py    the two clients: what waits, and nothing else;  calls.py: all that they share
requests.py           Python arguments → requests
results.py            responses → frozen values;  progress.py: what one stream has said so far
watching.py           the same for operators: snapshots and timelines
errors.py             status → exception
transport.py          channel options, retries, TLS, metadata, size limit
v1/                   the generated stubs of the contract, for whoever wants to speak it directly
"""

from nanoserve_client.aio import AsyncClient, AsyncEngineWatch, AsyncGenerateStream
from nanoserve_client.client import Client, EngineWatch, GenerateStream
from nanoserve_client.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NanoserveError,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from nanoserve_client.requests import (
    ChatGenerateOptions,
    ChatMessage,
    ChatOptions,
    GenerateOptions,
    Sampling,
    TokenizeOptions,
    Tool,
    ToolCall,
)
from nanoserve_client.results import (
    Completion,
    Delta,
    DraftSource,
    DraftUsage,
    FinishReason,
    Model,
    Result,
    Started,
    Stats,
    Timing,
    TokenLogprob,
    Tokens,
    Usage,
)
from nanoserve_client.transport import CallOptions, Tls
from nanoserve_client.watching import (
    EngineSnapshot,
    QueueWait,
    SequencePhase,
    SequenceSnapshot,
    StepPart,
    StepPreemption,
    StepSnapshot,
    Timeline,
    TimelineCacheHit,
    TimelineDecode,
    TimelineEnd,
    TimelineEntry,
    TimelineEvent,
    TimelinePreemption,
    TimelinePrefill,
    TimelineWait,
    WaitReason,
)

__all__ = [
    "AsyncClient",
    "AsyncEngineWatch",
    "AsyncGenerateStream",
    "CallOptions",
    "Cancelled",
    "ChatGenerateOptions",
    "ChatMessage",
    "ChatOptions",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "DraftSource",
    "DraftUsage",
    "EngineFailure",
    "EngineSnapshot",
    "EngineWatch",
    "FinishReason",
    "GenerateOptions",
    "GenerateStream",
    "InvalidRequest",
    "Model",
    "NanoserveError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "QueueWait",
    "Result",
    "Sampling",
    "SequencePhase",
    "SequenceSnapshot",
    "Started",
    "Stats",
    "StepPart",
    "StepPreemption",
    "StepSnapshot",
    "Timeline",
    "TimelineCacheHit",
    "TimelineDecode",
    "TimelineEnd",
    "TimelineEntry",
    "TimelineEvent",
    "TimelinePreemption",
    "TimelinePrefill",
    "TimelineWait",
    "Timing",
    "Tls",
    "TokenLogprob",
    "TokenizeOptions",
    "Tokens",
    "Tool",
    "ToolCall",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WaitReason",
]
