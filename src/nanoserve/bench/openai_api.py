"""Sends the requests of a workload through OpenAI's API, as completions of token ids."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

from nanoserve_client import Usage
from openai import APIConnectionError, APIError, AsyncOpenAI, NotFoundError

from nanoserve.bench.load import CallFailed, Send
from nanoserve.bench.workload import BenchRequest
from nanoserve.cli.terminal import CommandError


@contextlib.asynccontextmanager
async def over_openai(url: str, api_key: str, model: str) -> AsyncIterator[Send]:
    """Sends with OpenAI's client, and reads the lines themselves: its objects take longer to make than tokens do.

    Raises CommandError if OpenAI's API is not served at the URL.
    """
    client = AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0)

    async def send(request: BenchRequest, salt: str) -> AsyncGenerator[int | Usage, None]:
        call = client.completions.with_streaming_response.create(
            model=model,
            prompt=request.prompt,
            temperature=0,
            max_tokens=request.num_out,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "cache_salt": salt, "return_token_ids": True},
        )
        try:
            async with call as response:
                async for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise CallFailed(chunk["error"]["code"])
                    if (usage := chunk["usage"]) is not None:
                        cached = usage["prompt_tokens_details"]["cached_tokens"]
                        yield Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
                    elif count := len(chunk["choices"][0]["token_ids"]):
                        yield count
        except APIError as error:
            raise CallFailed(error.code or type(error).__name__) from error

    async with client:
        await _check(client, url)
        yield send


async def _check(client: AsyncOpenAI, url: str) -> None:
    """Raises CommandError if the URL leads nowhere: else each request would fail by itself, and none say why."""
    try:
        await client.models.list()
    except NotFoundError:
        hint = "" if url.rstrip("/").endswith("/v1") else f"; add /v1: {url.rstrip('/')}/v1"
        raise CommandError(f"OpenAI's API is not at {url}: there is no {url.rstrip('/')}/models{hint}") from None
    except APIConnectionError as error:
        raise CommandError(f"OpenAI's API cannot be reached at {url}: {error.__cause__ or error}") from None
    except APIError as error:
        raise CommandError(f"OpenAI's API at {url} refuses: {error.message}") from None
