"""The error table, as a client sees it."""

import pickle

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoserve_client.v1 import generation_pb2 as pb
from reference.errors import SAMPLES

import nanoserve.errors
from nanoserve.errors import (
    CancelledByOperator,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Violation,
)
from nanoserve.rpc import errors
from nanoserve.rpc.errors import status_of

HI = pb.GenerateRequest(text="hi")
CODE = grpc.StatusCode


def raising(error):
    async def script(_params):
        raise error
        yield

    return script


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InvalidRequest([Violation("a.b", "bad")]), CODE.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (ContextLengthExceeded(9, 8), CODE.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"),
        (ModelNotFound("x", ["y"]), CODE.NOT_FOUND, "MODEL_NOT_FOUND"),
        (Overloaded(5, 0.25), CODE.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (NotReady("loading", 1.5), CODE.UNAVAILABLE, "NOT_READY"),
        (DeadlineExceeded("waiting", 3), CODE.DEADLINE_EXCEEDED, "DEADLINE"),
        (CancelledByOperator(), CODE.ABORTED, "CANCELLED_BY_OPERATOR"),
        (EngineFailure(), CODE.INTERNAL, "ENGINE_FAILURE"),
        (Unauthenticated("no key"), CODE.UNAUTHENTICATED, "UNAUTHENTICATED"),
        (PermissionDenied("wrong key"), CODE.PERMISSION_DENIED, "PERMISSION_DENIED"),
    ],
)
async def test_each_error_has_its_code_and_reason(served, failure_of, error, code, reason):
    served.engine.script = raising(error)
    failure = await failure_of(served.generation.Generate(HI, metadata=(("x-request-id", "r-1"),)))
    assert failure.code == code
    assert failure.message == str(error)
    info = failure.details["ErrorInfo"]
    assert (info.reason, info.domain) == (reason, "nanoserve")
    assert failure.details["RequestInfo"].request_id == "r-1"


def test_the_table_has_every_error_of_the_vocabulary():
    known = {
        cls
        for cls in vars(nanoserve.errors).values()
        if isinstance(cls, type) and issubclass(cls, nanoserve.errors.RequestError) and not cls.__subclasses__()
    }
    assert known == set(errors._TABLE)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: error.reason)
def test_an_error_comes_out_of_another_process_as_it_went_in(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))
    assert status_of(arrived, "r") == status_of(error, "r")


async def test_a_context_that_is_too_long_gives_both_counts(served, failure_of):
    served.engine.script = raising(ContextLengthExceeded(9000, 8192))
    failure = await failure_of(served.generation.Generate(HI))
    metadata = dict(failure.details["ErrorInfo"].metadata)
    assert metadata == {"prompt_tokens": "9000", "max_context_tokens": "8192"}


async def test_a_deadline_of_the_engines_names_phase_and_progress(served, failure_of):
    served.engine.script = raising(DeadlineExceeded("running", 17))
    failure = await failure_of(served.generation.Generate(HI))
    metadata = dict(failure.details["ErrorInfo"].metadata)
    assert metadata == {"phase": "running", "completion_tokens": "17"}


async def test_an_unknown_model_is_a_resource(served, failure_of):
    failure = await failure_of(served.generation.Generate(pb.GenerateRequest(text="hi", model="x")))
    assert failure.code == CODE.NOT_FOUND
    resource = failure.details["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("model", "x")


@pytest.mark.parametrize("error", [Overloaded(5, 0.25), NotReady("loading", 0.25)])
async def test_errors_that_pass_say_when_to_retry(served, failure_of, error):
    served.engine.script = raising(error)
    failure = await failure_of(served.generation.Generate(HI))
    assert failure.details["RetryInfo"].retry_delay.ToMilliseconds() == 250
    assert failure.trailers["grpc-retry-pushback-ms"] == "250"


async def test_a_full_queue_says_how_many_may_wait(served, failure_of):
    served.engine.script = raising(Overloaded(5, 0.25))
    failure = await failure_of(served.generation.Generate(HI))
    assert failure.details["ErrorInfo"].metadata["max_waiting"] == "5"


async def test_other_errors_do_not_speak_of_retries(served, failure_of):
    served.engine.script = raising(EngineFailure())
    failure = await failure_of(served.generation.Generate(HI))
    assert "RetryInfo" not in failure.details
    assert "grpc-retry-pushback-ms" not in failure.trailers


async def test_an_unexpected_error_is_logged_and_its_text_kept_from_the_caller(served, failure_of, caplog):
    served.engine.script = raising(KeyError("secret of the house"))
    failure = await failure_of(served.generation.Generate(HI, metadata=(("x-request-id", "r-2"),)))
    assert (failure.code, failure.reason) == (CODE.INTERNAL, "ENGINE_FAILURE")
    assert "secret" not in failure.message + repr(failure.trailers)
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "r-2" in record.getMessage()
    assert "secret of the house" in repr(record.exc_info[1])


async def test_a_client_with_a_retry_policy_gets_through_once_the_server_is_ready(served):
    """Retries are allowed only after a trailers-only answer, so this shows that there was one."""
    attempts = []

    async def ready_at_the_third_attempt(params):
        attempts.append(params)
        if len(attempts) < 3:
            raise NotReady("loading", 0.01)
        async for event in served.engine._complete("hi", params, {"min_delta_tokens": 0}):
            yield event

    served.engine.script = ready_at_the_third_attempt
    config = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4,
        "initialBackoff": "100s", "maxBackoff": "100s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{served.port}", options=[("grpc.service_config", config)]
    ) as channel:
        served.channel = channel
        events = [e.WhichOneof("event") async for e in served.generation.Generate(HI, timeout=20)]
    # Without the pushback, the client would have waited for 100 s.
    assert (events[0], events[-1], len(attempts)) == ("started", "finished", 3)


# ------------------------------------------------------------------------------------------- what travels


def test_the_first_sixteen_violations_travel_and_the_count_of_all():
    error = InvalidRequest([Violation(f"field[{i}]", "is bad") for i in range(40)])
    status = status_of(error, "r")
    parsed = parse(status)
    bad_request = parsed["BadRequest"]
    assert [v.field for v in bad_request.field_violations] == [f"field[{i}]" for i in range(16)]
    assert parsed["ErrorInfo"].metadata["violations"] == "40"


TEXTS = st.text(max_size=3000) | st.text("€\U0001f600%\n", min_size=500, max_size=3000)


@settings(deadline=None, max_examples=60)
@given(violations=st.lists(st.builds(Violation, TEXTS, TEXTS), min_size=1, max_size=30), label=TEXTS)
def test_trailers_stay_small_whatever_the_caller_sent(violations, label):
    for error in (InvalidRequest(violations), ModelNotFound(label, [label]), NotReady(label, 1e6)):
        status = status_of(error, label)
        assert errors._wire_size(status) <= 4096
        parse(status)


def test_short_texts_travel_whole():
    violations = [Violation("chat.messages[3].role", f"{i} is not allowed, " * 3) for i in range(16)]
    parsed = parse(status_of(InvalidRequest(violations), "r"))
    sent = [(v.field, v.description) for v in parsed["BadRequest"].field_violations]
    assert sent == [(v.field, v.description) for v in violations]


def parse(status):
    from google.rpc import error_details_pb2, status_pb2

    packed = status_pb2.Status.FromString(dict(status.trailers)["grpc-status-details-bin"])
    details = {}
    for one in packed.details:
        name = one.type_url.rpartition(".")[2]
        details[name] = getattr(error_details_pb2, name)()
        one.Unpack(details[name])
    return details
