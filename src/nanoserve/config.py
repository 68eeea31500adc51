"""What an operator may choose: frozen dataclasses, one for each part of the server.

`Options` is what the command line fills in, every "auto" still open. `build.py` closes them, before anything else is
made, into the sections that the constructors take. This is the only module that reads the environment.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

BUILTIN_MODEL = Path(__file__).parent / "builtin"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    # A folder in Hugging Face format, or a Hub id.
    path: str = str(BUILTIN_MODEL)
    # Branch, tag or commit, for a Hub id.
    revision: str | None = None
    # The name callers use. None = the last part of the path ("nanoserve-builtin" for the built-in model).
    served_name: str | None = None
    # auto = the checkpoint's; float32 on a CPU without fast bfloat16.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # auto = cuda if there is one, else cpu.
    device: str = "auto"
    # Run Python code that the checkpoint brings.
    trust_remote_code: bool = False
    # Tokens of prompt and completion together. None = the model's own limit, less if the KV cache is smaller.
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The paged KV cache."""

    # None = a share of the free memory.
    kv_memory_bytes: int | None = None
    # Tokens of a block.
    block_size: int = 16
    # Blocks outlive their sequence, and are found again by their prefix.
    enable_prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests share the steps."""

    # Sequences that run at once.
    max_num_seqs: int = 64
    # Tokens of one step, prompts and completions together; at least max_num_seqs.
    max_num_batched_tokens: int = 1024
    # continuous = sequences join and leave at any step; static = a batch runs to its end before the next begins.
    batching: Literal["continuous", "static"] = "continuous"
    # Requests that wait; one more is refused.
    max_waiting: int = 1024


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The gRPC server."""

    host: str = "127.0.0.1"
    # 0 = any free port.
    grpc_port: int = 50051
    # PEM files. With a certificate and key the server speaks TLS; with client_ca it asks clients for theirs (mTLS).
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    # Files of keys, one a line, "#" begins a comment. None = no key is asked for.
    api_keys: Path | None = None
    admin_keys: Path | None = None
    # Work is pending and no step has ended for this long: health says NOT_SERVING.
    step_timeout_s: float = 60.0
    # How long running requests may take to finish after SIGTERM.
    drain_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """Everything `nanoserve serve` takes."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def is_offline() -> bool:
    """Whether the Hub must not be asked (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
