"""A model in this process, from Python:

    from nanoserve import LLM, SamplingParams

    with LLM() as llm:                          # the built-in model; or LLM("Qwen/Qwen3-0.6B", max_num_seqs=16)
        for output in llm.chat(["What is TTFT?", "What is a KV cache?"], SamplingParams(temperature=0)):
            print(output.text)

It is the server in this process and a client of it, so that rules, errors and results are those of every other caller.
`LLM` is for threads, `AsyncLLM` for asyncio; `stream` gives the tokens of one request as they come. Keywords say what
outputs must be, those of the client's ConstraintOptions: `llm.chat("A city", schema=City)[0].parsed` is a City.
`LLM(adapters={"pirate": "./pirate"})` reads LoRA adapters, one of which answers `llm.chat("Hello", adapter="pirate")`.
"""

import asyncio
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from types import MappingProxyType
from typing import Any, Self, TypeVar, Unpack

from nanoserve_client import (
    AsyncClient,
    AsyncGenerateStream,
    Completion,
    ConstraintOptions,
    GenerateOptions,
    GenerateStream,
    Timing,
    TokenLogprob,
    UnenforcedKeyword,
    Usage,
)
from nanoserve_client.transport import refuse_unknown
from tqdm import tqdm

from nanoserve.config import ENGINE_SECTIONS, SECTIONS, ConfigError, Options, Setting, settings
from nanoserve.local import LocalServer
from nanoserve.request import CALLERS_NAMES, SamplingParams

T = TypeVar("T")

# A text, or token ids.
Prompt = str | Sequence[int]
# {"role": ..., "content": ...} each; a text is one message of the user.
Conversation = str | Sequence[Mapping[str, Any]]
# For all prompts, or one for each. None = the model's own values.
Params = SamplingParams | Sequence[SamplingParams] | None
# Name of an adapter, for all prompts, or one for each. None = the model as it is.
Adapters = str | Sequence[str | None] | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt."""

    # As it was given.
    prompt: Prompt | Conversation
    # One for each of the n sequences.
    outputs: tuple[Completion, ...]
    usage: Usage
    timing: Timing
    # One for each prompt token if `prompt_logprobs` was asked for, else empty.
    prompt_logprobs: tuple[TokenLogprob, ...]
    # With `relaxed`: keywords of the schema that were only checked when the output was complete.
    unenforced: tuple[UnenforcedKeyword, ...] = ()
    # The adapter that it was computed with, and the digest of its content. Empty = none.
    adapter: str = ""
    adapter_revision: str = ""

    @property
    def text(self) -> str:
        """The first sequence's text: the only one unless n was given."""
        return self.outputs[0].text

    @property
    def parsed(self) -> Any:
        """The first sequence's text as what the constraint says it is: see Completion.parsed."""
        return self.outputs[0].parsed


class AsyncLLM:
    """A model in this process, for one event loop.

        async with AsyncLLM() as llm:
            async for delta in llm.stream_chat("What is TTFT?"):
                print(delta.text, end="")

    Arguments, results and errors are those of LLM. Outside of the block there is no model: RuntimeError.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._options = make_options(model, options)
        # Within the block.
        self._inside: tuple[LocalServer, AsyncClient] | None = None

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[RequestOutput]:
        """Complete prompts as they stand. See LLM.generate."""
        send = self._client().generate
        return await run_batch(self._options, send, as_prompts(prompts), sampling_params, adapter, constraint)

    async def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[RequestOutput]:
        """Answer conversations, by the model's chat template. See LLM.chat."""
        send = self._client().chat
        return await run_batch(
            self._options, send, as_conversations(conversations), sampling_params, adapter, constraint
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> AsyncGenerateStream:
        """Complete one prompt, token by token."""
        return self._client().generate(prompt, **as_options(sampling_params, constraint, adapter))

    def stream_chat(
        self,
        conversation: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> AsyncGenerateStream:
        """Answer one conversation, token by token."""
        return self._client().chat(conversation, **as_options(sampling_params, constraint, adapter))

    async def __aenter__(self) -> Self:
        server = await asyncio.to_thread(LocalServer, self._options)
        self._inside = server, server.async_client()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._inside is not None
        (server, client), self._inside = self._inside, None
        await client.close()
        await asyncio.to_thread(server.stop)

    def _client(self) -> AsyncClient:
        if self._inside is None:
            raise RuntimeError("there is a model only within `async with AsyncLLM() as llm:`")
        return self._inside[1]


class LLM:
    """A model in this process. Any thread; several may call at once.

    `close`, or leaving the `with` block, frees the model. Bad requests raise what the client raises, InvalidRequest
    above all; one bad request of a batch ends the batch, and the error's note says which it was.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        """Load a model: a folder, a Hub id, or None for the one that is built in.

        options: fields of ModelOptions, CacheOptions, AdapterOptions and SchedulerConfig in nanoserve.config, such as
        dtype, max_num_seqs and kv_memory_bytes (bytes, or "2GiB"). adapters: {name: PEFT folder}, read now; or a folder
        of such folders, read as they are asked for. Raises ConfigError, and TypeError for an option that there is not.
        """
        self._options = make_options(model, options)
        self._server = LocalServer(self._options)
        self._client = self._server.client()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        use_tqdm: bool = True,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[RequestOutput]:
        """Complete prompts as they stand: a text, token ids, or a list of either. Results are in their order.

        adapter: the one that answers; the prompts of one batch may have many. use_tqdm: show a progress bar on a
        terminal. constraint: what every output must be.
        """
        given = as_prompts(prompts)
        return self._run(lambda client: client.generate, given, sampling_params, adapter, use_tqdm, constraint)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        use_tqdm: bool = True,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[RequestOutput]:
        """Answer conversations, by the model's chat template: messages, a question, or a list of either."""
        given = as_conversations(conversations)
        return self._run(lambda client: client.chat, given, sampling_params, adapter, use_tqdm, constraint)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> GenerateStream:
        """Complete one prompt, token by token. Leaving its `with` block, or dropping it, cancels the request."""
        return self._client.generate(prompt, **as_options(sampling_params, constraint, adapter))

    def stream_chat(
        self,
        conversation: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> GenerateStream:
        """Answer one conversation, token by token."""
        return self._client.chat(conversation, **as_options(sampling_params, constraint, adapter))

    def tokenize(self, prompt: Conversation) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation as `chat` sees it."""
        return self._client.tokenize(prompt).token_ids

    def close(self) -> None:
        """Cancel what runs, and free the model. May be called again."""
        self._client.close()
        self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        method: Callable[[AsyncClient], Callable[..., AsyncGenerateStream]],
        prompts: Sequence[Any],
        params: Params,
        adapter: Adapters,
        has_bar: bool,
        constraint: ConstraintOptions,
    ) -> list[RequestOutput]:
        async def run() -> list[RequestOutput]:
            # disable=None: shown on a terminal only.
            with tqdm(total=len(prompts), unit=" prompts", disable=None if has_bar else True) as bar:
                async with self._server.async_client() as client:
                    return await run_batch(
                        self._options, method(client), prompts, params, adapter, constraint, bar.update
                    )

        future = self._server.submit(run)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too
            future.cancel()
            raise


async def run_batch(
    options: Options,
    send: Callable[..., AsyncGenerateStream],
    prompts: Sequence[Any],
    params: Params,
    adapter: Adapters,
    constraint: ConstraintOptions,
    on_end: Callable[[], object] = lambda: None,
) -> list[RequestOutput]:
    """One result for each prompt; the first error cancels the others.

    No more requests run at once than keep the engine busy.
    """
    chosen = zip(
        one_for_each(prompts, params, SamplingParams, "sampling_params"),
        one_for_each(prompts, adapter, str, "adapter"),
        strict=True,
    )
    each = [as_options(one, constraint, name) for one, name in chosen]
    gate = asyncio.Semaphore(min(2 * options.scheduler.max_num_seqs, options.scheduler.max_waiting))

    async def one(index: int) -> RequestOutput:
        async with gate:
            try:
                async with send(prompts[index], **each[index]) as stream:
                    result = await stream.result()
            except Exception as error:
                error.add_note(f"prompt {index} of {len(prompts)}")
                raise
        on_end()
        return RequestOutput(
            prompt=prompts[index],
            outputs=result.completions,
            usage=result.usage,
            timing=result.timing,
            prompt_logprobs=result.prompt_logprobs,
            unenforced=result.unenforced,
            adapter=result.started.adapter,
            adapter_revision=result.started.adapter_revision,
        )

    tasks = [asyncio.create_task(one(index)) for index in range(len(prompts))]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# --------------------------------------------------------------------------------------- what callers give


def make_options(model: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> Options:
    """Options of the engine from keyword arguments. Raises TypeError for an unknown one, ConfigError for bad values."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in ENGINE_SECTIONS}
    known = {each.field: each for each in settings(*ENGINE_SECTIONS) if not each.is_positional}
    if model is not None:
        sections["model"]["path"] = os.fspath(model)
    for name, value in _with_folders_of_adapters(options).items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}; {hint}")
        sections[known[name].section][name] = _fitting(known[name], value)
    return Options(**{name: SECTIONS[name](**values) for name, values in sections.items()})


def _with_folders_of_adapters(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`adapters` by name becomes the option that names each with its folder."""
    named = options.get("adapters")
    if isinstance(named, os.PathLike):
        return {**options, "adapters": os.fspath(named)}
    if not isinstance(named, Mapping):
        return options
    if "adapter" in options:
        raise TypeError("adapter and adapters={...} are the same; give one of them")
    folders = {name: os.fspath(path) for name, path in named.items()}
    if odd := [folder for folder in folders.values() if "," in folder]:
        raise ConfigError(f"adapters has the folder {odd[0]!r}; its path may have no comma")
    others = {name: value for name, value in options.items() if name != "adapters"}
    return {**others, "adapter": ",".join(f"{name}={folder}" for name, folder in folders.items()) or None}


def _fitting(setting: Setting, value: Any) -> Any:
    """The value of a field, such as 2 << 30 for "2GiB". Raises ConfigError if it is not of the field's kind."""
    if value is None and setting.default is None:
        return None
    try:
        if setting.kind is not bool:
            return setting.parse(value)
        if not isinstance(value, bool):
            raise ValueError("it must be True or False")
        return value
    except ValueError as error:
        raise ConfigError(f"{setting.field} is {value!r}; {error}") from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt becomes a list of it. Raises TypeError for what is no prompt."""
    return _as_batch(prompts, Integral, "a text or token ids")


def as_conversations(conversations: Conversation | Sequence[Conversation]) -> list[Any]:
    """One conversation becomes a list of it. Raises TypeError for what is no conversation."""
    return _as_batch(conversations, Mapping, "a text or a list of messages")


def _as_batch(given: Any, part: type, kind: str) -> list[Any]:
    """part: what one prompt is a list of, unless it is a text. kind: what a prompt is, in words."""

    def is_one(value: Any) -> bool:
        return isinstance(value, str) or (_is_list(value) and all(isinstance(each, part) for each in value))

    if isinstance(given, str):
        return [given]
    if not _is_list(given):
        raise TypeError(f"a {type(given).__name__} was given; it must be {kind}, or a list of such")
    # An empty list is a batch of none.
    if len(given) > 0 and is_one(given):
        return [given]
    for index, one in enumerate(given):
        if not is_one(one):
            raise TypeError(f"prompt {index} of {len(given)} is a {type(one).__name__}; it must be {kind}")
    return list(given)


def _is_list(value: Any) -> bool:
    """Arrays are lists, too; texts and mappings are not."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | Mapping)


def one_for_each(prompts: Sequence[Any], given: Any, kind: type[T], name: str) -> list[T | None]:
    """The same for all prompts, or what a list has for each. Raises ValueError if their numbers differ, TypeError for
    what is of another kind."""
    if given is None or isinstance(given, kind):
        return [given] * len(prompts)
    if not _is_list(given) or not all(each is None or isinstance(each, kind) for each in given):
        raise TypeError(f"{name} must be a {kind.__name__}, or a list with one for each prompt")
    if len(given) != len(prompts):
        raise ValueError(f"{name} has {len(given)} values for {len(prompts)} prompts; one for each is needed")
    return list(given)


def as_options(
    params: SamplingParams | None,
    constraint: Mapping[str, object] = MappingProxyType({}),
    adapter: str | None = None,
) -> GenerateOptions:
    """SamplingParams by the names that callers of the service use, a constraint's options, and an adapter.

    Raises TypeError for what is no option of a constraint.
    """
    refuse_unknown(constraint, ConstraintOptions.__optional_keys__)
    options: dict[str, Any] = {**constraint, "adapter": adapter}
    for each in fields(params) if params is not None else ():
        value = getattr(params, each.name)
        options[CALLERS_NAMES.get(each.name, each.name)] = not value if each.default is True else value
    return options  # type: ignore[return-value]
