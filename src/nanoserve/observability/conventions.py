"""OpenTelemetry's names for what we report (semantic conventions: RPC 1.45, GenAI 1.42), and our own beside them.

Here stand those that several files use. They are written out, because the GenAI names of the Python package are marked
as moved away.
"""

# RPC: https://opentelemetry.io/docs/specs/semconv/rpc/
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
ERROR_TYPE = "error.type"
# What a server's span calls an error; the others are the caller's doing.
SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

# GenAI: https://github.com/open-telemetry/semantic-conventions-genai
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"

# Seconds, as the conventions advise.
REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
RPC_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

# Ours.
GENERATE = "nanoserve.v1.GenerationService/Generate"
NANOSERVE = "nanoserve"
# ErrorInfo.reason of a status.
ERROR_REASON = "nanoserve.error.reason"
# "waiting" or "running".
PHASE = "nanoserve.phase"
# Who guessed: the value of a request.DraftSource.
DRAFT_SOURCE = "nanoserve.draft_source"
# Name of the adapter that a request was computed with, and the digest of its content.
ADAPTER = "nanoserve.adapter"
ADAPTER_REVISION = "nanoserve.adapter.revision"
# What an output must be, and whether it is: RequestRecord.constraint, and one of its outcomes.
CONSTRAINT = "nanoserve.constraint"
CONSTRAINT_OUTCOME = "nanoserve.constraint.outcome"


def of_generation(model: str, *, is_chat: bool) -> dict[str, str]:
    """What traces and metrics of a request both tell. model: the adapter's name, if one was asked for."""
    return {OPERATION: "chat" if is_chat else "text_completion", PROVIDER: NANOSERVE, REQUEST_MODEL: model}
