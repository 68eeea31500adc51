"""What an operator may choose: frozen dataclasses, one for each part of the server.

The command line is made from the fields below: an option's flag, type, default and help stand in one place. Every
"auto" is resolved once, by `build.py`, before anything that depends on it is made.
"""

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

BUILTIN_MODEL = Path(__file__).parent / "builtin"
BUILTIN_MODEL_NAME = "nanoserve-builtin"


def option(default: Any, help: str, *, flag: str | None = None, at_least: float | None = None) -> Any:
    """A field that is a flag of the command line; `flag` where it is not the field's name with dashes."""
    return field(default=default, metadata={"help": help, "flag": flag, "at_least": at_least})


def flag_of(option: "Field[Any]") -> str:
    """The flag of a field made by `option`; one without dashes is positional."""
    return option.metadata["flag"] or "--" + option.name.replace("_", "-")


class ConfigError(Exception):
    """The server cannot be started so; the message says which option is wrong, and what would do."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    path: str = option(
        str(BUILTIN_MODEL),
        "A folder in Hugging Face format, or a Hub id such as Qwen/Qwen3-0.6B. Default: the built-in model.",
        flag="path",
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.")
    served_name: str | None = option(
        None, "The name that callers use. Default: the path's last part.", flag="--served-model-name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto = the checkpoint's, but float32 on a CPU that has no fast arithmetic for it."
    )
    device: str = option("auto", "auto = cuda if there is one, else cpu.")
    trust_remote_code: bool = option(False, "Run Python code that the checkpoint brings.")
    max_context_tokens: int | None = option(
        None,
        "Tokens of prompt and completion together. Default: the model's own limit, or what the KV cache holds.",
        at_least=2,
    )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The paged KV cache."""

    kv_memory_bytes: int | None = option(
        None,
        "Memory for keys and values, such as 2GiB. Default: a share of what is free.",
        flag="--kv-memory",
        at_least=1,
    )
    block_size: int = option(16, "Tokens of a KV block.", at_least=1)
    enable_prefix_cache: bool = option(
        True, "Do not keep the blocks of finished sequences for prompts that begin alike.", flag="--no-prefix-cache"
    )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests share the steps."""

    max_num_seqs: int = option(64, "Sequences that run at once.", at_least=1)
    max_num_batched_tokens: int = option(
        1024, "Tokens of one step, of prompts and completions together; at least --max-num-seqs.", at_least=1
    )
    batching: Literal["continuous", "static"] = option(
        "continuous",
        "continuous = sequences join and leave at any step; static = a batch runs to its end before the next begins.",
    )
    max_waiting: int = option(1024, "Requests that may wait; one more is refused.", at_least=1)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The gRPC server."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 = all.")
    grpc_port: int = option(50051, "0 = any free port.", at_least=0)
    tls_cert: Path | None = option(None, "PEM file of the server's certificate; with --tls-key, turns TLS on.")
    tls_key: Path | None = option(None, "PEM file of the server's key.")
    tls_client_ca: Path | None = option(None, "PEM file of the authority that clients' certificates must come from.")
    api_keys: Path | None = option(None, "File of keys, one a line, # begins a comment. Default: no key is asked for.")
    admin_keys: Path | None = option(None, "The same for AdminService.")
    step_timeout_s: float = option(
        60.0,
        "Health says NOT_SERVING when work is pending and no step has ended for so long.",
        flag="--step-timeout",
        at_least=0.1,
    )
    drain_timeout_s: float = option(
        30.0, "How long running requests may take to finish after SIGTERM.", flag="--drain-timeout", at_least=0
    )


@dataclass(frozen=True, slots=True)
class Options:
    """Everything `nanoserve serve` takes."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be, or do not go together."""
        for section in (self.model, self.cache, self.scheduler, self.server):
            for each in fields(section):
                value, least = getattr(section, each.name), each.metadata["at_least"]
                # Not "value < least": that is false for NaN.
                if least is not None and value is not None and not value >= least:
                    raise ConfigError(f"{flag_of(each)} is {value}; it must be at least {least}")
        if self.server.grpc_port > 65535:
            raise ConfigError(f"--grpc-port is {self.server.grpc_port}; it must be at most 65535")
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.scheduler.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.scheduler.max_num_seqs}; each running sequence needs a token of every step"
            )
