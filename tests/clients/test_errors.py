"""What calls raise: every status, with details, without them, and with details that are broken."""

import socket

import grpc
import nanoserve_client as nc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from nanoserve_client.errors import from_status
from scripted_server import RichStatus, delta, overloaded, started

CODES = [
    (grpc.StatusCode.INVALID_ARGUMENT, nc.InvalidRequest),
    (grpc.StatusCode.UNAUTHENTICATED, nc.Unauthenticated),
    (grpc.StatusCode.PERMISSION_DENIED, nc.PermissionDenied),
    (grpc.StatusCode.NOT_FOUND, nc.NotFound),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, nc.Overloaded),
    (grpc.StatusCode.UNAVAILABLE, nc.Unavailable),
    (grpc.StatusCode.CANCELLED, nc.Cancelled),
    (grpc.StatusCode.ABORTED, nc.Cancelled),
    (grpc.StatusCode.INTERNAL, nc.EngineFailure),
    (grpc.StatusCode.UNIMPLEMENTED, nc.NanoserveError),
]

DRESSED = RichStatus(
    grpc.StatusCode.INVALID_ARGUMENT,
    "two fields are wrong",
    (
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="nanoserve", metadata={"total": "2"}),
        error_details_pb2.RequestInfo(request_id="made-by-server"),
        error_details_pb2.BadRequest(
            field_violations=[
                {"field": "sampling.top_p", "description": "above 0, up to 1"},
                {"field": "n", "description": "1 to 128"},
            ]
        ),
        # Of a type that this client does not read.
        error_details_pb2.Help(),
    ),
)


# A status whose one detail bears ErrorInfo's name and does not parse.
BROKEN_DETAIL = status_pb2.Status(
    details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
).SerializeToString()


def fail_with(status):
    def handler(_request, context):
        context.abort_with_status(status)

    return handler


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_exception_is_chosen_by_the_code(code, kind):
    error = from_status(code, "why", None, "mine")
    assert type(error) is kind
    assert (error.code, error.message, error.request_id) == (code, "why", "mine")
    assert (error.reason, error.violations, error.retry_after, error.metadata) == (None, [], None, {})
    assert str(error) == f"{code.name}: why"


def test_a_deadline_has_its_reason_and_words_whichever_end_notices_it_first():
    error = from_status(grpc.StatusCode.DEADLINE_EXCEEDED, "Stream removed", None, "mine")
    assert type(error) is nc.DeadlineExceeded
    assert (error.reason, error.violations, error.request_id) == ("DEADLINE", [], "mine")
    assert error.message == "the request did not end within its time limit"

    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="DEADLINE", metadata={"phase": "waiting"}))
    trailers = [("grpc-status-details-bin", status_pb2.Status(details=[info]).SerializeToString())]
    error = from_status(grpc.StatusCode.DEADLINE_EXCEEDED, "it was waiting", trailers, "mine")
    assert (error.reason, error.message, error.metadata) == ("DEADLINE", "it was waiting", {"phase": "waiting"})


async def read_stream(face, client):
    await face.deltas(client.generate("x", request_id="mine"))


async def tokenize(face, client):
    await face.call(client.tokenize, "x", request_id="mine")


@pytest.mark.parametrize("use", [read_stream, tokenize])
async def test_details_become_attributes(face, server, use):
    server.script.generate = server.script.unary = fail_with(DRESSED)
    with pytest.raises(nc.InvalidRequest) as failure:
        await use(face, face.connect(server.target))
    error = failure.value
    assert error.reason == "INVALID_REQUEST"
    assert error.request_id == "made-by-server"
    assert error.violations == [("sampling.top_p", "above 0, up to 1"), ("n", "1 to 128")]
    assert error.metadata == {"total": "2"}
    assert error.retry_after is None
    assert str(error) == "INVALID_ARGUMENT (INVALID_REQUEST): two fields are wrong"


async def test_failure_in_the_middle_comes_after_the_deltas(face, server):
    def generate(_request, context):
        yield started()
        yield delta(text="some")
        context.abort(grpc.StatusCode.INTERNAL, "the engine failed")

    server.script.generate = generate
    stream = face.connect(server.target).generate("x", request_id="mine")
    assert (await face.next(stream)).text == "some"
    with pytest.raises(nc.EngineFailure, match="the engine failed") as failure:
        await face.next(stream)
    assert failure.value.request_id == "made-by-server"
    # The failure stays: a result is never made of half a stream.
    with pytest.raises(nc.EngineFailure):
        await face.call(stream.result)


def test_retry_after_is_in_seconds():
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=250_000_000))
    status = RichStatus(grpc.StatusCode.UNAVAILABLE, packed=(retry,))
    assert from_status(status.code, "", status.trailing_metadata, None).retry_after == 2.25


@pytest.mark.parametrize(
    "trailers",
    [
        [("grpc-status-details-bin", b"\xff\xff")],
        [("grpc-status-details-bin", b"")],
        [("other", "value")],
        [("grpc-status-details-bin", BROKEN_DETAIL)],
    ],
    ids=["not a status", "empty", "another trailer", "not a detail"],
)
def test_broken_details_leave_the_status(trailers):
    error = from_status(grpc.StatusCode.NOT_FOUND, "no such model", trailers, "mine")
    assert isinstance(error, nc.NotFound)
    assert (error.message, error.reason, error.request_id) == ("no such model", None, "mine")


async def test_overload_that_lasts_says_when_to_come_back(face, server):
    # A negative pushback: do not retry.
    status = RichStatus(overloaded(1000).code, "full", overloaded(1000).packed, (("grpc-retry-pushback-ms", "-1"),))
    server.script.generate = fail_with(status)
    with pytest.raises(nc.Overloaded) as failure:
        await face.deltas(face.connect(server.target).generate("x"))
    assert (failure.value.reason, failure.value.retry_after) == ("OVERLOADED", 1.25)
    assert len(server.script.requests) == 1


async def test_server_that_is_not_there_is_unavailable(face):
    with socket.socket() as taken:
        # Bound, but nothing listens.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(nc.Unavailable):
            await face.deltas(face.connect(f"127.0.0.1:{taken.getsockname()[1]}").generate("x"))
