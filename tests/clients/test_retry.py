"""gRPC retries by the service config that the client gives it. Real servers, real waiting; no upper bound on times."""

import asyncio
import gc
import time
from pathlib import Path

import grpc
import nanoserve_client as nc
import pytest
from grpc._cython import cygrpc
from nanoserve_client import transport
from nanoserve_client.v1 import model_pb2
from scripted_server import RichStatus, delta, hello, overloaded, started


def refuse_first(times, status, script, then):
    """A handler that refuses the first attempts, and the moments of all."""
    moments = []

    def handler(request, context):
        moments.append(time.monotonic())
        if len(script.requests) <= times:
            context.abort_with_status(status)
        return then(request, context)

    return handler, moments


NOT_READY = RichStatus(grpc.StatusCode.UNAVAILABLE, "starting")


async def test_refused_stream_is_tried_again(face, server):
    server.script.generate, _ = refuse_first(2, NOT_READY, server.script, hello)
    result = await face.call(face.connect(server.target).generate("x", request_id="mine").result)
    assert result.text == "Hello"
    # The server sees which attempt it is, and the same label on each.
    assert [m.get("grpc-previous-rpc-attempts") for m in server.script.metadata] == [None, "1", "2"]
    assert {m["x-request-id"] for m in server.script.metadata} == {"mine"}


async def test_what_comes_in_the_last_moment_of_a_server_is_tried_again(face, server):
    stopping = RichStatus(grpc.StatusCode.CANCELLED, "CANCELLED")
    server.script.generate, _ = refuse_first(1, stopping, server.script, hello)
    assert (await face.call(face.connect(server.target).generate("x").result)).text == "Hello"
    assert len(server.script.requests) == 2


async def test_refused_unary_call_is_tried_again(face, server):
    server.script.unary, _ = refuse_first(
        1, NOT_READY, server.script, lambda _request, _context: model_pb2.DetokenizeResponse(text="ok")
    )
    assert await face.call(face.connect(server.target).detokenize, [1]) == "ok"
    assert len(server.script.requests) == 2


async def test_four_attempts_are_all(face, server):
    server.script.generate, _ = refuse_first(9, NOT_READY, server.script, hello)
    with pytest.raises(nc.Unavailable, match="starting"):
        await face.deltas(face.connect(server.target).generate("x"))
    assert len(server.script.requests) == 4


async def test_pushback_of_the_server_is_waited_for(face, server):
    # Longer than any backoff of a first retry (0.1 s and a fifth).
    server.script.generate, moments = refuse_first(1, overloaded(1000), server.script, hello)
    result = await face.call(face.connect(server.target).generate("x").result)
    assert result.text == "Hello"
    first, second = moments
    assert second - first >= 0.95


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED])
async def test_other_failures_are_not_tried_again(face, server, code):
    server.script.generate, _ = refuse_first(9, RichStatus(code, "no"), server.script, hello)
    with pytest.raises(nc.NanoserveError):
        await face.deltas(face.connect(server.target).generate("x"))
    assert len(server.script.requests) == 1


async def test_stream_that_has_begun_is_not_tried_again(face, server):
    def generate(_request, context):
        yield started()
        yield delta(text="some", token_ids=(1,))
        context.abort_with_status(NOT_READY)

    server.script.generate = generate
    stream = face.connect(server.target).generate("x")
    assert (await face.next(stream)).text == "some"
    with pytest.raises(nc.Unavailable):
        await face.next(stream)
    assert len(server.script.requests) == 1


async def test_large_prompt_is_tried_again_too(face, server):
    """gRPC keeps 256 KiB of a call for a retry unless it is told to keep more."""
    server.script.generate, _ = refuse_first(1, NOT_READY, server.script, hello)
    result = await face.call(face.connect(server.target).generate("x" * (transport.MAX_REQUEST_BYTES - 100)).result)
    assert result.text == "Hello"
    assert len(server.script.requests) == 2


@pytest.mark.parametrize("client_type", [nc.Client, nc.AsyncClient])
async def test_stream_lives_on_when_nobody_holds_its_client(server, client_type):
    server.script.generate, _ = refuse_first(2, NOT_READY, server.script, hello)
    stream = client_type(server.target).generate("x")
    gc.collect()
    result = await stream.result() if client_type is nc.AsyncClient else await asyncio.to_thread(stream.result)
    assert result.text == "Hello"


def test_every_channel_option_exists_in_grpc():
    """gRPC ignores a key that it does not know, without a word."""
    library = Path(cygrpc.__file__).read_bytes()
    for key, _ in transport.CHANNEL_OPTIONS:
        assert b"\0" + key.encode() + b"\0" in library, key


async def test_a_caller_may_leave_retries_to_others(face, server):
    server.script.generate, _ = refuse_first(9, overloaded(1000), server.script, hello)
    with pytest.raises(nc.Overloaded):
        await face.deltas(face.connect(server.target, retries=False).generate("x"))
    assert len(server.script.requests) == 1
