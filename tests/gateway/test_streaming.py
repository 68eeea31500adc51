"""Work that ends when its caller goes away, or something else happens."""

import asyncio

import pytest
from nanoserve_gateway.streaming import unless_gone, until
from starlette.requests import ClientDisconnect


async def test_a_block_is_left_when_the_end_comes() -> None:
    end = asyncio.Event()
    reached = []
    async with until(end.wait):
        reached.append("begin")
        end.set()
        await asyncio.Event().wait()
        reached.append("never")
    assert reached == ["begin"]


async def test_a_block_that_ends_by_itself_does_not_wait() -> None:
    async with until(asyncio.Event().wait):
        pass


async def test_a_time_out_of_the_blocks_own_is_not_taken_for_the_end() -> None:
    with pytest.raises(TimeoutError):
        async with until(asyncio.Event().wait):
            raise TimeoutError


async def test_a_caller_who_goes_away_ends_what_is_awaited() -> None:
    messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, str]:
        return next(messages)

    with pytest.raises(ClientDisconnect):
        async with unless_gone(receive):
            await asyncio.Event().wait()
