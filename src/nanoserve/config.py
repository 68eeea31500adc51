"""What an operator may choose: frozen dataclasses, one for each part of the server.

The command line, the configuration file, the environment variables and their reference page are made from the fields
below: an option's name, type, default and help stand in one place. `Setting` is how they see a field. Every "auto" is
resolved once, by `build.py`, before anything that depends on it is made.
"""

import os
import re
import types
import typing
from collections.abc import MutableMapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

BUILTIN_MODEL = Path(__file__).parent / "builtin"
BUILTIN_MODEL_NAME = "nanoserve-builtin"
# The model that drafts for it, and what it is called.
BUILTIN_DRAFT = BUILTIN_MODEL / "draft"
BUILTIN_DRAFT_NAME = "builtin"
# Adapters that are made for it, and what chooses them.
BUILTIN_ADAPTERS = BUILTIN_MODEL / "adapters"
BUILTIN_ADAPTERS_NAME = "builtin"
# Of environment variables: NANOSERVE_MAX_NUM_SEQS is --max-num-seqs.
VARIABLE_PREFIX = "NANOSERVE_"
SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SWITCH_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class ConfigError(Exception):
    """The server cannot be started so; the message says which option is wrong, and what would do."""


def option(default: Any, help: str, *, flag: str | None = None, at_least: float | None = None) -> Any:
    """A field that people may set; `flag` where it is not the field's name with dashes.

    A flag without leading dashes may stand alone on the command line. The flag of a switch that is on by default says
    --no-something, and so does its help.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "at_least": at_least})


def address_of(host: str, port: int) -> str:
    """As clients take it: an IPv6 host is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def environment() -> MutableMapping[str, str]:
    """The process's variables; nothing else in the server reads or sets them."""
    return os.environ


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    path: str = option(
        str(BUILTIN_MODEL),
        "A folder in Hugging Face format, or a Hub id such as Qwen/Qwen3-0.6B or gpt2. Default: the built-in model.",
        flag="model",
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.")
    served_name: str | None = option(
        None, "The name that callers use. Default: the path's last part.", flag="--served-model-name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto = the checkpoint's, but float32 on a CPU that has no fast arithmetic for it."
    )
    draft_model: str | None = option(
        None,
        "A smaller model with the same vocabulary, which guesses the next tokens: a folder or a Hub id, or builtin for"
        " the one that is made for the built-in model.",
    )
    device: str = option("auto", "auto = cuda if there is one, else cpu.")
    compile: bool = option(
        True, "Do not compile parts of the model for speed; serve plain PyTorch.", flag="--no-compile"
    )
    trust_remote_code: bool = option(False, "Run Python code that the checkpoint brings.")
    max_context_tokens: int | None = option(
        None,
        "Tokens of prompt and completion together. Default: the model's own limit, or what the KV cache holds.",
        at_least=2,
    )
    reasoning_parser: str = option(
        "auto",
        "How the model writes its reasoning, such as deepseek_r1 or mistral; auto = as its chat template shows; none ="
        " it does not. Another name is answered with all that are known.",
    )
    tool_call_parser: str = option(
        "auto",
        "How the model writes calls of tools, such as hermes, llama3_json or openai; auto = as its chat template shows;"
        " none = it does not. Another name is answered with all that are known.",
    )

    @property
    def draft(self) -> "ModelOptions | None":
        """The same of the model that drafts. None = there is none."""
        if self.draft_model is None:
            return None
        path = str(BUILTIN_DRAFT) if self.draft_model == BUILTIN_DRAFT_NAME else self.draft_model
        return replace(self, path=path, revision=None, served_name=None, draft_model=None, max_context_tokens=None)


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
class AdapterOptions:
    """LoRA adapters."""

    adapter: str | None = option(
        None,
        "NAME=PATH of a PEFT folder to load at the start; more of them with commas between. Requests name one by NAME.",
    )
    adapters: Path | None = option(
        None,
        "Folder of PEFT folders: each is an adapter called like it, read when a request first asks for it; builtin ="
        " those that are made for the built-in model.",
    )
    adapter_memory_bytes: int = option(
        2 * 2**30, "Most memory for the weights of adapters that are read.", flag="--adapter-memory", at_least=1
    )
    adapter_slots: int = option(
        16, "Adapters that can be computed with in one step; their weights take memory a second time.", at_least=1
    )

    @property
    def root(self) -> Path | None:
        """Where adapters are found by their names. None = nowhere."""
        return BUILTIN_ADAPTERS if self.adapters == Path(BUILTIN_ADAPTERS_NAME) else self.adapters

    @property
    def are_wanted(self) -> bool:
        """Adapters are served."""
        return self.adapter is not None or self.adapters is not None


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
    speculate: str = option(
        "auto",
        "Guess the next tokens, and check the guesses along with the next token, where it pays: auto = in every way;"
        " ngram = from the text itself; suffix = from earlier answers to the same caller; draft = by --draft-model;"
        " off = only what a caller predicts. With :K, at most so many tokens at once, 1 to 64; else 16.",
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The gRPC server, and OpenAI's API beside it."""

    host: str = option("127.0.0.1", "Address of gRPC; 0.0.0.0 = all. OpenAI's API has --http-host.")
    grpc_port: int = option(50051, "0 = any free port.", at_least=0)
    http_host: str = option("127.0.0.1", "Address of OpenAI's API; 0.0.0.0 = all. gRPC has --host.")
    http_port: int = option(8000, "Port of OpenAI's API, in the clear. 0 = it is not served.", at_least=0)
    http_cors_origins: str | None = option(
        None, "Origins, with commas between them, whose pages may call OpenAI's API; * = all. Default: its own."
    )
    http_max_body_bytes: int = option(
        16 * 2**20, "Largest request of OpenAI's API.", flag="--http-max-body", at_least=1
    )
    http_timeout_s: float = option(
        600.0, "For requests of OpenAI's API without x-request-timeout.", flag="--http-timeout", at_least=0.001
    )
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
class ObservabilityOptions:
    """What the server tells of itself.

    Where traces go, OpenTelemetry's own variables say: OTEL_EXPORTER_OTLP_ENDPOINT and others.
    """

    metrics: bool = option(True, "Keep no metrics, and serve no /metrics beside OpenAI's API.", flag="--no-metrics")
    log_format: Literal["human", "json"] = option("human", "json = an object a line.")
    trace_content: bool = option(False, "Put prompts and answers into traces, for whoever can read those.")


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """A running server to talk to, instead of a model in this process."""

    target: str | None = option(None, "Address of the server, such as 127.0.0.1:50051.")
    api_key: str | None = option(
        None, "Key to call with. Better as NANOSERVE_API_KEY: other users of the machine see a command's arguments."
    )
    tls: bool = option(False, "Speak TLS.")
    tls_ca: Path | None = option(None, "PEM file that the server's certificate is checked against; turns TLS on.")
    client_cert: Path | None = option(None, "PEM file of the certificate to show, with --client-key; turns TLS on.")
    client_key: Path | None = option(None, "PEM file of its key.")

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigError("--client-cert and --client-key go together")


@dataclass(frozen=True, slots=True)
class Options:
    """Everything `nanoserve serve` takes."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    adapters: AdapterOptions = field(default_factory=AdapterOptions)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    observability: ObservabilityOptions = field(default_factory=ObservabilityOptions)

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be, or do not go together."""
        for setting in settings(*SERVE_SECTIONS):
            value = getattr(getattr(self, setting.section), setting.field)
            # Not "value < at_least": that is false for NaN.
            if setting.at_least is not None and value is not None and not value >= setting.at_least:
                raise ConfigError(f"{setting.flag} is {value}; it must be at least {setting.at_least}")
        for flag, port in (("--grpc-port", self.server.grpc_port), ("--http-port", self.server.http_port)):
            if port > 65535:
                raise ConfigError(f"{flag} is {port}; it must be at most 65535")
        if self.server.grpc_port == self.server.http_port != 0:
            raise ConfigError(f"--grpc-port and --http-port are both {self.server.http_port}; they must differ")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.model.device):
            raise ConfigError(f"--device is {self.model.device!r}; it must be auto, cpu, cuda or cuda:N")
        speculate = self.scheduler.speculate
        if not re.fullmatch(r"(auto|off|ngram|suffix|draft)(:([1-9]|[1-5]\d|6[0-4]))?", speculate):
            raise ConfigError(
                f"--speculate is {speculate!r}; it must be auto, off, ngram, suffix or draft, with or without :K for at"
                " most K tokens at once, 1 to 64"
            )
        if speculate.startswith("draft") and self.model.draft_model is None:
            raise ConfigError(f"--speculate is {speculate!r}; that needs a --draft-model")
        if self.model.draft_model is not None and not speculate.startswith(("auto", "draft")):
            raise ConfigError(f"--draft-model is of no use with --speculate {speculate}; it must be auto or draft")
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.scheduler.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.scheduler.max_num_seqs}; each running sequence needs a token of every step"
            )


SECTIONS: dict[str, Any] = {part.name: part.default_factory for part in fields(Options)} | {"client": ClientOptions}
SERVE_SECTIONS = tuple(part.name for part in fields(Options))
# What a model in this process needs.
ENGINE_SECTIONS = ("model", "cache", "adapters", "scheduler")


# --------------------------------------------------------------------------------- options as people see them


@dataclass(frozen=True, slots=True)
class Setting:
    """An option by its one name: `--max-num-seqs`, NANOSERVE_MAX_NUM_SEQS, `max-num-seqs` in a file."""

    section: str
    # Its field in the section's dataclass.
    field: str
    # The flag without leading dashes.
    name: str
    # bool = a switch; "size" = bytes, with a unit.
    kind: type | Literal["size"]
    # What may be chosen, if not everything of its kind.
    choices: tuple[str, ...]
    # May stand alone on the command line.
    is_positional: bool
    default: Any
    at_least: float | None
    # A sentence or two, with the default where it is not plain.
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def opposite(self) -> str:
        """The flag that turns a switch back."""
        return f"--{self.name.removeprefix('no-')}" if self.name.startswith("no-") else f"--no-{self.name}"

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.name.upper().replace("-", "_")

    @property
    def metavar(self) -> str:
        """What stands for the value in help."""
        if self.choices:
            return "|".join(self.choices)
        words: dict[Any, str] = {int: "N", float: "SECONDS", Path: "FILE", "size": "SIZE", bool: ""}
        return "MODEL" if self.is_positional else words.get(self.kind, "TEXT")

    @property
    def full_help(self) -> str:
        """The help with the default, unless it says it or there is none."""
        is_plain = self.default is None or self.kind is bool or "Default:" in self.help
        return self.help if is_plain else f"{self.help} Default: {self.shown_default}."

    @property
    def shown_default(self) -> str:
        """As a person would write it."""
        if self.kind == "size":
            return format_size(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def parse(self, value: object) -> Any:
        """The field's value for what stands in a flag or variable (text) or a file. Raises ValueError."""
        if self.kind is bool:
            is_given = SWITCH_WORDS.get(value.lower()) if isinstance(value, str) else value
            if not isinstance(is_given, bool):
                raise ValueError("it must be true or false")
            # The flag of a switch that is on by default says no.
            return is_given != self.default
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"it must be {', '.join(self.choices[:-1])} or {self.choices[-1]}")
            return value
        if self.kind in (int, float, "size"):
            return self._parse_number(value)
        if not isinstance(value, str) or not value:
            raise ValueError("it must be a text")
        return Path(value) if self.kind is Path else value

    def _parse_number(self, value: object) -> float:
        if isinstance(value, str) and self.kind == "size":
            return parse_size(value)
        try:
            if isinstance(value, str):
                return float(value) if self.kind is float else int(value)
        except ValueError:
            pass  # refused below
        # True is an int for Python only.
        if not isinstance(value, bool) and isinstance(value, (int, float) if self.kind is float else int):
            return value
        raise ValueError("it must be a number" if self.kind is float else "it must be a whole number")


def settings(*sections: str) -> list[Setting]:
    """The options of these sections, in order."""
    return [_setting(name, each) for name in sections for each in fields(SECTIONS[name])]


def _setting(section: str, each: "Field[Any]") -> Setting:
    hint = typing.get_type_hints(SECTIONS[section])[each.name]
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    is_choice = typing.get_origin(hint) is Literal
    flag = each.metadata["flag"] or "--" + each.name.replace("_", "-")
    return Setting(
        section=section,
        field=each.name,
        name=flag.removeprefix("--"),
        kind="size" if each.name.endswith("_bytes") else str if is_choice else hint,
        choices=typing.get_args(hint) if is_choice else (),
        is_positional=not flag.startswith("--"),
        default=each.default,
        at_least=each.metadata["at_least"],
        help=each.metadata["help"],
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GiB, 512MB or 1000. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b|)", text.strip().lower())
    if match is None:
        raise ValueError("it must be a size such as 2GiB, 512MB or a number of bytes")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def format_size(num_bytes: int) -> str:
    """A size as a person reads it, and as parse_size takes it: 1.5 GiB, 16 MiB, 96 KiB; rounded to a tenth."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{round(num_bytes / size, 1):g} {unit}"
    return f"{num_bytes} bytes"
